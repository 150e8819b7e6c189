"""What stage one minimises: the squared distance of a rollout's end from its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from ....envs.schedules import Schedule
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ...selection import coordinate_errors
from .adjoint import backpropagate, by_log_level
from .levels import schedule_at
from .pool import Batch

Builder = Callable[[Schedule], Tableau]


@dataclass(frozen=True)
class Slope:
    """An objective at some levels.

    Attributes:
        loss: squared distance of the rollout's end from its target, summed over coordinates, the
            mean over samples.
        gradient: (T,) float64 derivatives of the whole objective by the levels, on the CPU.
        others: what else is to be logged.
    """

    loss: float
    gradient: Tensor
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """Stage one's objective, with its exact gradient.

    Attributes:
        build: the solver's builder.
        like: a schedule with the ends of those that are built.
    """

    build: Builder
    like: Schedule

    def rows(self, tableau: Tableau) -> int:
        """Return how many steps lead to the smallest positive level, where ends are compared."""
        return tableau.steps - int(float(tableau.times[-1]) == 0)

    def slope(
        self, denoiser: Denoiser, levels: Tensor, batch: Batch, generator: torch.Generator
    ) -> Slope:
        """Return the objective's value and derivatives on one batch.

        Args:
            denoiser: the network; its parameters should be frozen.
            levels: (T,) descending noise levels.
            batch: starts and targets.
            generator: source of fresh noise, for objectives that need any.
        """
        loss, _, gradient = self.rollout_slope(denoiser, levels, batch)
        return Slope(loss, gradient)

    def rollout_slope(
        self, denoiser: Denoiser, levels: Tensor, batch: Batch
    ) -> tuple[float, Tensor, Tensor]:
        """Return the loss, where the rollouts end (N, *shape), and the exact gradient (T,)."""
        schedule = schedule_at(levels, self.like)
        tableau = self.build(schedule)
        loss, ends, sensitivity = backpropagate(
            tableau,
            denoiser.under(batch.condition),
            batch.noise,
            batch.target,
            self.rows(tableau),
        )
        return loss, ends, by_log_level(self.build, schedule, sensitivity) / levels

    @torch.no_grad()
    def errors(self, denoiser: Denoiser, tableau: Tableau, batches: Sequence[Batch]) -> Tensor:
        """Return a sampler's errors, mean squares of a coordinate (N,) float64, on the CPU."""
        return torch.cat([self._errors_of(denoiser, tableau, batch) for batch in batches])

    def _errors_of(self, denoiser: Denoiser, tableau: Tableau, batch: Batch) -> Tensor:
        """Return the errors of the finished samples of a batch."""
        return self.errors_at(tableau.steps, batch.finished, denoiser, tableau, batch)

    def errors_at(
        self, step: int, goal: Tensor, denoiser: Denoiser, tableau: Tableau, batch: Batch
    ) -> Tensor:
        """Return the errors of the states after so many steps."""
        states = tableau.states(denoiser.under(batch.condition), batch.noise)
        return coordinate_errors(next(islice(states, step, None)), goal)
