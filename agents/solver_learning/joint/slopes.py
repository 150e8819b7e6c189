"""The loss of a table on a batch, with its exact gradient by all that is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ..scheduling.adjoint import Sensitivity, pull_back
from ..scheduling.pool import Batch
from ..scheduling.rollout import chunk_size
from .family import Parameters, TableFamily
from .losses import EndLoss

# A critic's value of samples (N, *shape) under their classes, (N,); high on the teacher's.
Value = Callable[[Tensor, Tensor | None], Tensor]


class Rollouts(NamedTuple):
    """Where the noises of a batch were taken, and what that costs.

    Attributes:
        contributions: (N,) of the samples, float64 on the CPU.
        ends: (N, *shape) the finished samples.
        by_noise: (N, *shape) the derivative of each sample's own contribution by its noise.
    """

    contributions: Tensor
    ends: Tensor
    by_noise: Tensor


class Slope(NamedTuple):
    """A loss at some parameters.

    Attributes:
        loss: the mean of the contributions, without the critic's part.
        gradient: by the parameters, of the whole.
        rollouts: of each batch.
    """

    loss: float
    gradient: Parameters
    rollouts: list[Rollouts]


@dataclass(frozen=True)
class EndObjective:
    """A loss of finished samples, and what a critic adds to it.

    Attributes:
        family: the tables.
        loss: of their samples.
        adversarial: weight of the critic's value.
    """

    family: TableFamily
    loss: EndLoss
    adversarial: float = 0.0

    def slope(
        self,
        denoiser: Denoiser,
        parameters: Parameters,
        batches: Sequence[Batch],
        value: Value | None = None,
    ) -> Slope:
        """Return the loss with its derivatives: the mean over batches of one size.

        Args:
            denoiser: the network; its parameters should be frozen.
            parameters: of the table.
            batches: noises, and the teacher's finished samples.
            value: of the critic; None leaves it out.
        """
        leaves = {name: part.detach().requires_grad_() for name, part in parameters.items()}
        numbers = self.family.numbers(leaves)
        table = self.family.table(parameters, numbers)
        total, rollouts, loss = Sensitivity.zeros(table.steps), [], 0.0
        for batch in batches:
            error, found, sensitivity = self._roll(denoiser, table, batch, value)
            loss += error / len(batches)
            total = total.plus(sensitivity, 1 / len(batches))
            rollouts.append(found)
        numbers.backward(total)
        gradient = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in leaves.items()
        }
        return Slope(loss, gradient, rollouts)

    def _roll(
        self, denoiser: Denoiser, table: Tableau, batch: Batch, value: Value | None
    ) -> tuple[float, Rollouts, Sensitivity]:
        view, count = denoiser.under(batch.condition), len(batch.noise)
        contributions = torch.empty(count, dtype=torch.float64)
        whole = self._coupled_pull(table, view, batch)

        def pull(ends: Tensor, rows: slice) -> tuple[float, Tensor]:
            under = None if batch.condition is None else batch.condition[rows]
            if whole is None:
                each, by_end = self._pulled(ends, batch.finished[rows], under, count)
            else:
                each, by_end = whole[0][rows], whole[1][rows]
            contributions[rows] = each
            if value is not None:
                by_end = by_end - self.adversarial / count * _ascent(value, ends, under)
            return float(each.sum()) / count, by_end

        steps, by_level = table.steps, self.family.moves_levels
        pulled = pull_back(table, view, batch.noise, pull, steps, by_level=by_level)
        found = Rollouts(contributions, pulled.ends, count * pulled.starts)
        return pulled.error, found, pulled.sensitivity

    @torch.no_grad()
    def shares(self, denoiser: Denoiser, table: Tableau, batches: Sequence[Batch]) -> Tensor:
        """Return the loss's `EndLoss.shares` of a table's samples of all batches, on the CPU."""
        ends = [table.sample(denoiser.under(batch.condition), batch.noise) for batch in batches]
        goals = torch.cat([batch.finished for batch in batches])
        under = [batch.condition for batch in batches if batch.condition is not None]
        return self.loss.shares(torch.cat(ends), goals, torch.cat(under) if under else None)

    def _pulled(
        self, ends: Tensor, goal: Tensor, condition: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return contributions (n,), and the derivative of their sum / count by the ends."""
        leaf = ends.detach().requires_grad_()
        with torch.enable_grad():
            each = self.loss.contributions(leaf, goal, condition)
            (by_end,) = torch.autograd.grad(each.sum() / count, leaf)
        return each.detach().double().cpu(), by_end

    def _coupled_pull(
        self, table: Tableau, denoiser: Denoiser, batch: Batch
    ) -> tuple[Tensor, Tensor] | None:
        """Return both for all samples, where they depend on one another and come in parts."""
        noise = batch.noise
        size = chunk_size(2 * (table.steps + 1), noise)
        if not self.loss.coupled or size >= len(noise):
            return None
        with torch.no_grad():
            parts = [
                table.sample(denoiser.at(slice(i, i + size)), noise[i : i + size])
                for i in range(0, len(noise), size)
            ]
        return self._pulled(torch.cat(parts), batch.finished, batch.condition, len(noise))


def _ascent(value: Value, ends: Tensor, condition: Tensor | None) -> Tensor:
    """Return the derivative of each sample's value by the sample."""
    leaf = ends.detach().requires_grad_()
    with torch.enable_grad():
        (by_end,) = torch.autograd.grad(value(leaf, condition).sum(), leaf)
    return by_end
