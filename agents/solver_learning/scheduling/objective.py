"""What stage one minimises: gamma L_disc + diffusion_weight L_diff, and its slope in the levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ....envs.schedules.schedule import Schedule
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ..selection import coordinate_errors
from .adjoint import backpropagate, by_log_level
from .levels import noise_levels, schedule_at
from .pool import Batch
from .rollout import chunk_size, path_of
from .surrogate import Reading, surrogate_gradient
from .weights import diffusion_loss, squared_error


@dataclass(frozen=True)
class Slope:
    """An objective at some levels.

    Attributes:
        disc_loss: squared distance of the rollout's end from its target, summed over coordinates,
            the mean over samples.
        diff_loss: paper B's L_diff; None if it has no weight.
        gradient: (T,) float64 derivatives of the whole by the levels, on the CPU.
        ends: (N, *shape) where the rollouts ended.
    """

    disc_loss: float
    diff_loss: float | None
    gradient: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Objective:
    """Stage one's objective.

    Attributes:
        build: the solver's builder.
        like: a schedule with the ends of those that are built.
        reading: how to read Eq. 14; None takes the exact gradient.
        gamma: weight of L_disc.
        diffusion_weight: weight of L_diff, which needs real samples.
    """

    build: Callable[[Schedule], Tableau]
    like: Schedule
    reading: Reading | None
    gamma: float
    diffusion_weight: float

    def rows(self, tableau: Tableau) -> int:
        """Return how many steps lead to the smallest positive level, where ends are compared."""
        return tableau.steps - int(float(tableau.times[-1]) == 0)

    def calls(self, tableau: Tableau) -> int:
        """Return the network calls a sample that `slope` makes."""
        levels = len(noise_levels(self.like))
        if self.reading is None:
            # Each call is made once on the way down, and once more for its derivatives.
            calls = 2 * self.rows(tableau)
        else:
            extra = {"rollout": 0, "one-shot": 1, "convex": levels - 1}[self.reading.residual]
            calls = 2 * levels - 3 + extra
        return calls + (levels - 1 if self.diffusion_weight else 0)

    def slope(
        self,
        denoiser: Denoiser,
        levels: Tensor,
        batch: Batch,
        clean: Tensor | None,
        generator: torch.Generator,
    ) -> Slope:
        """Return the objective's value and derivatives on one batch.

        Args:
            denoiser: the network; its parameters should be frozen.
            levels: (T,) descending noise levels.
            batch: starts and targets.
            clean: (M, *shape) real samples for L_diff.
            generator: source of fresh noise.
        """
        schedule = schedule_at(levels, self.like)
        tableau = self.build(schedule)
        if self.reading is None:
            disc_loss, ends, sensitivity = backpropagate(
                tableau, denoiser, batch.noise, batch.target, self.rows(tableau)
            )
            gradient = by_log_level(self.build, schedule, sensitivity) / levels
        else:
            gradient, ends = self._estimate(tableau, denoiser, batch, generator)
            disc_loss = float(squared_error(ends, batch.target))
        gradient = self.gamma * gradient
        diff_loss = None
        if self.diffusion_weight:
            assert clean is not None
            diff_loss, by_level = diffusion_loss(denoiser, levels, clean, generator)
            gradient = gradient + self.diffusion_weight * by_level
        return Slope(disc_loss, diff_loss, gradient, ends)

    def _estimate(
        self, tableau: Tableau, denoiser: Denoiser, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return Eq. 14's derivatives by the levels, and where the rollouts end."""
        assert self.reading is not None
        total, ends = torch.zeros(()), []
        alpha = float(denoiser.process.alpha(tableau.times[self.rows(tableau)]))
        for part in batch.split(chunk_size(2 * (tableau.steps + 1), batch.noise)):
            path = path_of(tableau, denoiser, part.noise)
            # Eq. 14 compares with x itself where x_1 is meant: its own noise averages out.
            target = part.target / alpha if part.clean is None else part.clean
            gradient = surrogate_gradient(
                denoiser, path, target, self.reading, part.clean, generator
            )
            total = total + gradient * (len(part.noise) / len(batch.noise))
            ends.append(alpha * path.states[-1])
        return total, torch.cat(ends)

    @torch.no_grad()
    def errors(self, denoiser: Denoiser, tableau: Tableau, batches: Sequence[Batch]) -> Tensor:
        """Return the error of a sampler for each noise of the batches, without gradients.

        Where there is a teacher it is that of the finished sample; with data as the target it is
        L_disc's, at the smallest level.

        Returns:
            (N,) float64 mean squared differences per coordinate, on the CPU.
        """
        parts = []
        for batch in batches:
            states = tableau.states(denoiser, batch.noise)
            last = tableau.steps if batch.clean is None else self.rows(tableau)
            goal = batch.finished if batch.clean is None else batch.target
            parts.append(coordinate_errors(next(islice(states, last, None)), goal))
        return torch.cat(parts)
