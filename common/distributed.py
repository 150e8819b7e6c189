"""Processes: data-parallel training, in which any number of processes repeat what one would do.

All processes draw the same random numbers, those of the whole batch, and each takes its share, so a
run does not depend on how many there are: N processes with batches of B do what one does with
batches of N * B, to rounding (but for dropout in cloning, whose noise is each process's own).
Gradients meet once an optimizer step. `torchrun` starts the processes; without it there is one, and
nothing here costs anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .even import even_normal


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together.

    Attributes:
        rank: 0 to count - 1; 0 writes files and logs.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Return the processes of `torch.distributed`, or a single one where it is not in use."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, batch: Tensor, dim: int = 0, groups: int = 1) -> Tensor:
        """Return this process's share of a batch that all have drawn.

        Args:
            batch: its dimension `dim` holds `groups` batches one after the other, each of which is
                shared out in equal parts.
            dim: which dimension.
            groups: how many batches.

        Returns:
            The same tensor where there is one process, else a copy of 1 / count of it.
        """
        if self.count == 1:
            return batch
        parts = batch.unflatten(dim, (groups, self.count, -1))
        return parts.select(dim + 1, self.rank).flatten(dim, dim + 1).contiguous()

    def noise(
        self,
        like: Tensor,
        generator: torch.Generator | None = None,
        groups: int = 1,
        even: bool = False,
    ) -> Tensor:
        """Draw normal noise shaped like a tensor: this process's share of what all of them draw.

        Args:
            like: the tensor.
            generator: source of randomness.
            groups: see `share`.
            even: spread each of these batches evenly, see `even_normal`.
        """
        everyone = like.new_empty(self.count * len(like), *like.shape[1:])
        everyone = everyone.normal_(generator=generator)
        if even:
            everyone = even_normal(everyone, generator, groups)
        return self.share(everyone, groups=groups)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their means over the processes, in one message a type."""
        if self.count == 1:
            return
        by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                # A network may leave a parameter out on one process and not on another.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                key = (parameter.grad.dtype, parameter.grad.device)
                by_type.setdefault(key, []).append(parameter.grad)
        for gradients in by_type.values():
            message = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(message)
            message /= self.count
            pieces = message.split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of 0-d tensors over the processes, in one message."""
        if self.count == 1 or not values:
            return dict(values)
        message = torch.stack([value.detach().float() for value in values.values()])
        dist.all_reduce(message)
        return dict(zip(values, message / self.count, strict=True))

    def largest(self, value: Tensor) -> Tensor:
        """Return the largest of a 0-d tensor over the processes."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def std(self, values: Tensor) -> Tensor:
        """Return the standard deviation (unbiased) of all processes' values, 0-d."""
        if self.count == 1:
            return values.std()
        exact = values.double()
        total = torch.stack([exact.sum(), exact.new_tensor(exact.numel())])
        dist.all_reduce(total)
        squares = (exact - total[0] / total[1]).square().sum()
        dist.all_reduce(squares)
        return (squares / (total[1] - 1)).sqrt().to(values.dtype)

    def gather(self, batch: Tensor) -> Tensor:
        """Return all processes' equally large batches (N, ...) in one, (count * N, ...)."""
        if self.count == 1:
            return batch
        parts = [torch.empty_like(batch) for _ in range(self.count)]
        dist.all_gather(parts, batch.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Tell whether the flag is set on any process; `device` is one that can communicate."""
        if self.count == 1:
            return flag
        message = torch.tensor([float(flag)], device=device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        return bool(message.item())

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


# A single process, which trains by itself.
ALONE = Processes()
