"""The parts of schedule learning in the readings of Huang (2024), each in place of a main one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .....common.conditions import Kind
from .....envs import Schedule, Target
from ....denoisers.denoiser import Denoiser
from ....samplers.tableau import Tableau
from ...settings import ScheduleSettings
from ..descent import GIVEN, PROGRAMME, Descent, Stage
from ..levels import schedule_at
from ..objective import Objective, Slope
from ..pool import Batch, Pool
from ..rollout import chunk_size, path_of
from ..starts import LevelProgramme
from ..tuning import Tuning
from .loss import TuningWeights, diffusion_loss, diffusion_programme, squared_error, tuning_loss
from .surrogate import Reading, surrogate_gradient

# The samples' variance has collapsed when it stays low for so many updates: a first large step may
# overshoot and come back.
PATIENCE = 5


class DataPool(Pool):
    """Rollouts that start from noised data, and should end at the data (MATH.md 3.3)."""

    def _draw(self, generator: torch.Generator) -> Batch:
        """Draw real samples, and noise them twice, independently."""
        clean = self.mdp.target.sample(self.batch_size, generator)
        ends = self.like.times[self.like.times > 0][[0, -1]].tolist()
        first, last = (
            self.mdp.process.add_noise(
                clean, t, torch.empty_like(clean).normal_(generator=generator)
            )
            for t in ends
        )
        return Batch(first, last, clean)


@dataclass(frozen=True)
class PaperObjective(Objective):
    """gamma L_disc + diffusion_weight L_diff, whose gradient may be Eq. 14's estimate.

    Attributes:
        target: source of real samples for L_diff.
        of_data: whether the rollouts should end at data: then they are compared there, at the
            smallest level, instead of as finished samples.
        reading: how to read Eq. 14; None takes the exact gradient.
        gamma: weight of L_disc.
        diffusion_weight: weight of L_diff.
        kind: of the real samples' conditions; None if the network is asked under none.
    """

    target: Target
    of_data: bool
    reading: Reading | None
    gamma: float
    diffusion_weight: float
    kind: Kind | None = None

    def slope(
        self, denoiser: Denoiser, levels: Tensor, batch: Batch, generator: torch.Generator
    ) -> Slope:
        """See `Objective.slope`; beside it log L_diff, and the samples' variance."""
        clean = condition = None
        if self.diffusion_weight:
            clean, condition = self.target.draw(len(batch.noise), generator, self.kind)
        if self.reading is None:
            loss, ends, gradient = self.rollout_slope(denoiser, levels, batch)
        else:
            gradient, ends = self._estimate(self.reading, denoiser, levels, batch, generator)
            loss = float(squared_error(ends, batch.target))
        gradient = self.gamma * gradient
        others = {"variance_ratio": _variance(ends) / _variance(batch.target)}
        if clean is not None:
            network = denoiser.under(condition)
            diff_loss, by_level = diffusion_loss(network, levels, clean, generator)
            gradient = gradient + self.diffusion_weight * by_level
            others["diff_loss"] = diff_loss / batch.noise[0].numel()
        return Slope(loss, gradient, others)

    def _estimate(
        self,
        reading: Reading,
        denoiser: Denoiser,
        levels: Tensor,
        batch: Batch,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return Eq. 14's derivatives by the levels, and where the rollouts end."""
        tableau = self.build(schedule_at(levels, self.like))
        total, ends = torch.zeros(()), []
        alpha = float(denoiser.process.alpha(tableau.times[self.rows(tableau)]))
        for part in batch.split(chunk_size(2 * (tableau.steps + 1), batch.noise)):
            network = denoiser.under(part.condition)
            path = path_of(tableau, network, part.noise)
            # Eq. 14 compares with x itself where x_1 is meant: its own noise averages out.
            clean = part.finished if self.of_data else None
            target = part.target / alpha if clean is None else clean
            gradient = surrogate_gradient(network, path, target, reading, clean, generator)
            total = total + gradient * (len(part.noise) / len(batch.noise))
            ends.append(alpha * path.states[-1])
        return total, torch.cat(ends)

    def _errors_of(self, denoiser: Denoiser, tableau: Tableau, batch: Batch) -> Tensor:
        if not self.of_data:
            return super()._errors_of(denoiser, tableau, batch)
        return self.errors_at(self.rows(tableau), batch.target, denoiser, tableau, batch)


class DataDescent(Descent):
    """A stage one that compares nothing, and ends where its last update led.

    The least error of a target of data is a collapsed sampler's. So the stage watches the samples'
    variance instead: it ends, and goes back, when that stays below a share of what it was.
    """

    def __init__(
        self,
        objective: Objective,
        pool: Pool,
        given: Schedule,
        start: str,
        settings: ScheduleSettings,
    ) -> None:
        super().__init__(objective, pool, given, start, settings)
        self.collapse = settings.paper.collapse
        # The last parameters at which the variance had not fallen, how many updates ago that was,
        # and the ratio of variances that the stage began with.
        self._sound, self._low = self._here(), 0
        self._first_ratio: float | None = None

    def begin(self, denoiser: Denoiser, first: bool, found: Sequence[Tensor] | None = None) -> None:
        """Measure what was given; start from what a programme found, whatever that is worth."""
        here, origin = self._here(), self.origin
        before = self._as_given if first else (here, origin)
        self.compared = {}
        if first:
            self._move_to(*before)
            self.compared[GIVEN] = self._reported_error(denoiser)
        if found is not None:
            here, origin = self._map.parameters(found[0]), PROGRAMME
        self._move_to(here, origin)
        self._stage = Stage(*before, first, here, self._here(), self.error(denoiser))
        self._sound, self._low, self._first_ratio = self._here(), 0, None
        self._adam = torch.optim.Adam([self._parameters])

    def _step(self, denoiser: Denoiser, generator: torch.Generator) -> dict[str, float]:
        before = self._here()
        metrics = super()._step(denoiser, generator)
        ratio = metrics["variance_ratio"]
        if self._first_ratio is None:
            self._first_ratio = ratio
        # Samples that spread wider than their targets may well come together.
        if ratio >= self.collapse * min(self._first_ratio, 1.0):
            self._sound, self._low = before, 0
        else:
            self._low += 1
        if self._low >= PATIENCE:
            self._go_back(ratio)
        return metrics

    def _go_back(self, ratio: float) -> None:
        """Return to where the samples' variance was sound, and say so."""
        self.collapsed = True
        self._move_to(self._sound, self._origin_of(self._sound))
        warnings.warn(
            f"Schedule learning stopped after {self.updates + 1} updates: the samples' variance "
            f"fell from {self._first_ratio:.2f} to {ratio:.2f} of the target's, and the levels "
            "went back to where it had not. The optimum of target='data' is a sampler that returns "
            "the mean of the data: take target='teacher', or a smaller schedule_learning_rate and "
            "fewer schedule_rounds.",
            stacklevel=2,
        )
        self.updates = self.rounds - 1

    def _end(self, denoiser: Denoiser) -> None:
        self.compared[self.origin] = self._reported_error(denoiser)

    def state(self) -> dict[str, Any]:
        """See `Descent.state`."""
        return {
            **super().state(),
            "collapsed": self.collapsed,
            "sound": [self._sound, self._low, self._first_ratio],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        self.collapsed = state["collapsed"]
        self._sound, self._low, self._first_ratio = state["sound"]


class DataTuning(Tuning):
    """A stage two that minimises a denoising loss on real samples, at the schedule's levels.

    Args:
        weights: "lambda" or "original", see `tuning_loss`.
        last_weight: see there.
    """

    def __init__(self, *arguments: Any, weights: TuningWeights, last_weight: float) -> None:
        super().__init__(*arguments)
        self.weights, self.last_weight = weights, last_weight

    def _loss(self, tableau: Tableau, levels: Tensor, generator: torch.Generator) -> Tensor:
        mdp, size = self.pool.mdp, self.settings.batch_size
        clean, condition = mdp.target.draw(size, generator, mdp.kind)
        network = self.denoiser.under(condition)
        loss = tuning_loss(network, levels, clean, self.weights, self.last_weight, generator)
        loss.backward()
        return loss.detach()


class DiffusionProgramme(LevelProgramme):
    """The levels of least L_diff on real samples."""

    def levels(self, pool: Pool, denoiser: Denoiser, student: Tableau) -> list[Tensor]:
        """See `LevelProgramme.levels`."""
        times, generator = self.grid().times, pool.fresh_generator()
        clean, condition = pool.mdp.target.draw(pool.batch_size, generator, pool.mdp.kind)
        network = denoiser.under(condition)
        return [diffusion_programme(network, times[times > 0], self.count, clean, generator)]


def _variance(samples: Tensor) -> float:
    """Return the total variance of samples (N, *shape): the sum over their dimensions."""
    return float(samples.double().flatten(1).var(0).sum())
