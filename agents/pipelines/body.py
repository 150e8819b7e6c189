"""PipelineBody: a pipeline's network as a body that `Denoiser` asks, a prompt as a class."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .families import Family, Rows


class PipelineBody(nn.Module):
    """A pipeline's network, `body(sample, time)` or `body(sample, time, prompts)`.

    Samples and answers are float32, the network runs in the pipeline's type. Where they are more
    than `micro_batch` it is asked about some after the others. Under a gradient each of several
    calls is repeated when its own gradient is due, so that one call's graph is alive at a time.

    The network's weights are the pipeline's. They are no parameters of this module: nothing trains
    them, moves them, or saves them with what was learned.

    Args:
        family: of the pipeline.
        rows: (P + 1, ...) what the network is told of P prompts, and last of none; None for an
            unconditional network.
        micro_batch: samples of a call, at least 1; guided, each asks two of them.

    Attributes:
        calls: how many single samples the network was asked about without a gradient, and with one.
    """

    trains = False

    def __init__(self, family: Family, rows: Rows | None, micro_batch: int = 8) -> None:
        super().__init__()
        self._family = family
        self.rows = rows
        self.micro_batch = micro_batch
        self.calls = [0, 0]
        self.on_call: Any = None
        # Says where samples live, and of which type they are.
        device = family.network.device
        self.place = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        self.config: dict[str, Any] = {"shape": list(family.shape)}

    @property
    def family(self) -> Family:
        """The family of the pipeline."""
        return self._family

    def forward(self, sample: Tensor, time: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Return answers (N, *shape) float32 about samples, under the prompts' rows (N,)."""
        asks = self.trains or sample.requires_grad or time.requires_grad
        graph = torch.is_grad_enabled() and asks
        answers = []
        for first in range(0, len(sample), self.micro_batch):
            part = slice(first, first + self.micro_batch)
            asked = sample[part], time[part], None if prompts is None else prompts[part]
            if graph and len(sample) > self.micro_batch:
                answers.append(checkpoint(self._ask, *asked, use_reentrant=False))
            else:
                answers.append(self._ask(*asked))
            self._count(len(asked[0]), graph)
        return torch.cat(answers)

    def _ask(self, sample: Tensor, time: Tensor, prompts: Tensor | None) -> Tensor:
        network = self._family.network
        rows = {}
        if prompts is not None and self.rows is not None:
            index = prompts.cpu()
            rows = {name: row[index].to(sample.device) for name, row in self.rows.items()}
        answer = self._family.ask(sample.to(network.dtype), time, rows)
        return answer.to(sample.dtype)

    def _count(self, samples: int, graph: bool) -> None:
        self.calls[graph] += samples
        if self.on_call is not None:
            self.on_call(samples, graph)


class TrainedBody(PipelineBody):
    """A pipeline's network to be trained: its weights are parameters of this module, in place.

    A copy, such as the average of an agent's, has a network of its own; the pipeline's other parts
    are shared.

    Raises:
        ValueError: weights that are not float32, which Adam's small steps would leave as they are.
    """

    trains = True

    def __init__(self, family: Family, rows: Rows | None, micro_batch: int = 8) -> None:
        super().__init__(family, rows, micro_batch)
        if family.network.dtype != torch.float32:
            raise ValueError(
                f"The weights to train are {family.network.dtype}: open the pipeline with "
                "dtype=torch.float32."
            )
        self.network = family.network.requires_grad_(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedBody:
        """Copy the network; share what nothing trains."""
        family = copy.copy(self.family)
        family.network = copy.deepcopy(self.network, memo)
        twin = TrainedBody(family, self.rows, self.micro_batch)
        for ours, theirs in zip(self.parameters(), twin.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
        memo[id(self)] = twin
        return twin
