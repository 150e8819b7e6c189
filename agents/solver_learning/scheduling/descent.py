"""Stage one: the levels go down their objective, watched on held-out noise (MATH.md 3.3 to 3.6)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....common.optimisation import TrainingDivergedError, frozen, learning_rate, set_learning_rate
from ....envs import Schedule
from ...denoisers.denoiser import Denoiser
from ..selection import best_of
from .levels import LevelMap, Space, noise_levels, schedule_at
from .objective import Objective, Slope
from .pool import Batch, Pool
from .watch import Watch

# Updates of the levels between two looks at held-out noise.
CHECK_INTERVAL = 10

# The step grows over so many updates: Adam's first ones go the whole rate along every parameter,
# which can strand levels at the noisy end where nothing pulls them back.
WARM_UP = 20

# Levels nearer to each other than this share are one level to a solver, which divides by their
# distance.
LEAST_GAP = 1e-9

# Where a schedule comes from.
GIVEN, PROGRAMME, GRID, LEARNED = "given", "programme", "grid", "learned"


class Descent:
    """Adam on the levels' free parameters, and the schedule and the sampler that they make.

    Where there is a teacher a stage ends with the schedule that errs least on held-out noise: that
    from before, the one that the stage was to start from, or the best that it met; see
    `fewstep.agents.solver_learning.selection`. With data as the target it ends where the last
    update led.

    Args:
        objective: what the levels should make small; its schedule is where they start on a grid.
        pool: what it is measured on.
        given: the schedule that what is learned has to better.
        start: what the stage starts from: "given", a "grid" or a "programme".
        space: the scale on which levels are parameters.
        moves: False leaves them where the stage begins.
        integer_times: round the schedule's times.
        rounds: updates a stage.
        learning_rate: of Adam, warmed up and then falling on a cosine.
        collapse: the stage ends, and goes back, when the samples' variance stays below this share
            of what it was.

    Attributes:
        schedule: the schedule as it is now.
        tableau: the sampler on it.
        origin: where it comes from: "given", "grid", "programme" or "learned".
        compared: errors of the schedules that the last stage ended with a choice between, by their
            origin, on the noise that is only reported on; with data as the target of the given
            schedule and of what the stage ended with.
        updates: how many of this stage are done.
        collapsed: whether a stage ended because the samples' variance fell.
    """

    def __init__(
        self,
        objective: Objective,
        pool: Pool,
        *,
        given: Schedule,
        start: str,
        space: Space,
        moves: bool,
        integer_times: bool,
        rounds: int,
        learning_rate: float,
        collapse: float,
    ) -> None:
        self.objective = objective
        self.pool = pool
        self.moves = moves
        self.integer_times = integer_times
        self.rounds = rounds
        self.learning_rate = learning_rate
        self.collapse = collapse
        levels = noise_levels(objective.like)
        self._map = LevelMap(float(levels[-1]), float(levels[0]), space)
        self._parameters = torch.nn.Parameter(self._map.parameters(levels))
        self._adam = torch.optim.Adam([self._parameters])
        self._watch: Watch | None = None
        self._given = given
        self._start = start
        self.compared: dict[str, float] = {}
        self.updates = 0
        self.collapsed = False
        # What a programme finds is not known yet.
        self._move_to(*self._as_given if start == PROGRAMME else (self._here(), start))

    @property
    def levels(self) -> Tensor:
        """The noise levels sigma / alpha as they are now, (T,) descending, without a final 0."""
        return self._map.levels(self._parameters.detach())

    @property
    def done(self) -> bool:
        """Whether the stage is done."""
        return self.updates >= self.rounds

    @property
    def moved(self) -> float:
        """The largest change of a level's logarithm since the stage began."""
        before = self._map.levels(self._watched.before)
        return float((self.levels / before).log().abs().max())

    @property
    def _watched(self) -> Watch:
        assert self._watch is not None, "begin comes first"
        return self._watch

    def begin(
        self, denoiser: Denoiser, first: bool, levels: Sequence[Tensor] | None = None
    ) -> None:
        """Begin a stage, and remember what there was before it.

        Args:
            denoiser: the network that samples.
            first: whether the stage is the first one, before which there is the given schedule.
            levels: what a programme found, (T,) each; the best of them on the noise to learn on is
                what to start from, unless what there was before errs less on held-out noise. None
                starts from the grid, or from what there was before.
        """
        found, start = self._here(), self.origin
        before, origin = self._as_given if first else (found, start)
        self.compared = {}
        if first and self.pool.teacher is None:
            self._move_to(before, origin)
            self.compared[GIVEN] = self._reported_error(denoiser)
        if levels is not None:
            found, start = self._best_of(denoiser, levels), PROGRAMME
        self._move_to(found, start)
        error = self.error(denoiser)
        if levels is not None and self.pool.teacher is not None:
            self._move_to(before, origin)
            if (other := self.error(denoiser)) <= error:
                error = other
            else:
                self._move_to(found, start)
        here = self._here()
        self._watch = Watch(before, origin, first, found, here, error, here)
        self._adam = torch.optim.Adam([self._parameters])

    def skip(self, denoiser: Denoiser) -> None:
        """Choose between the given schedule and the start, where there is no stage one."""
        self.begin(denoiser, first=True)
        self._choose(denoiser)

    def update(self, denoiser: Denoiser, generator: torch.Generator) -> dict[str, float]:
        """Move the levels once; now and then, and at the end, compare them with the best.

        Args:
            denoiser: the network that samples.
            generator: source of real samples and fresh noise.

        Returns:
            What to log.
        """
        metrics = self._step(denoiser, generator) if self.moves else {}
        self.updates = self.rounds if self.collapsed else self.updates + 1
        if self.done or self.updates % CHECK_INTERVAL == 0:
            error = metrics["held_out_error"] = self.error(denoiser)
            self._watched.compare(self._here(), error)
        # The least error of a target of data is a collapsed sampler's: there the last one counts.
        if self.done and self.pool.teacher is not None:
            self._choose(denoiser)
        elif self.done:
            self.compared[self.origin] = self._reported_error(denoiser)
        for j, level in enumerate(self.levels.tolist()):
            metrics[f"level_{j:03d}"] = level
        return metrics

    def slope(self, denoiser: Denoiser, batch: Batch, generator: torch.Generator) -> Slope:
        """Return the objective on a batch, with its derivatives by the levels."""
        clean = None
        if self.objective.diffusion_weight:
            clean = self.pool.mdp.target.sample(self.pool.batch_size, generator)
        with frozen(denoiser):
            return self.objective.slope(denoiser, self.levels, batch, clean, generator)

    def error(self, denoiser: Denoiser) -> float:
        """Return the sampler's error on held-out noise, the mean square of a coordinate's."""
        return float(self.errors(denoiser, self.pool.held_out).mean())

    def errors(self, denoiser: Denoiser, batches: Sequence[Batch]) -> Tensor:
        """Return the sampler's error for each noise of some batches, see `Objective.errors`."""
        return self.objective.errors(denoiser, self.tableau, batches)

    def _step(self, denoiser: Denoiser, generator: torch.Generator) -> dict[str, float]:
        """Take one step of Adam, or one back if the samples have collapsed."""
        before = self._here()
        batch = self.pool.fitted[self.updates % self.pool.count]
        slope = self.slope(denoiser, batch, generator)
        self._adam.zero_grad()
        self._map.levels(self._parameters).backward(slope.gradient)
        done = self.updates / self.rounds
        rate = learning_rate(self.learning_rate, "cosine", done, self.updates, WARM_UP)
        set_learning_rate(self._adam, rate)
        self._adam.step()
        self._check_apart()
        self._move_to(self._here(), LEARNED)
        coordinates = batch.noise[0].numel()
        metrics = {"disc_loss": slope.disc_loss / coordinates}
        if slope.diff_loss is not None:
            metrics["diff_loss"] = slope.diff_loss / coordinates
        ratio = metrics["variance_ratio"] = _variance(slope.ends) / _variance(batch.target)
        if self._watched.collapses(before, ratio, self.collapse):
            self._go_back(ratio)
        return metrics

    def _go_back(self, ratio: float) -> None:
        """Return to where the samples' variance was sound, and say so."""
        self.collapsed = True
        self._move_to(self._watched.sound, self._origin_of(self._watched.sound))
        hint = (
            "The optimum of target='data' is a sampler that returns the mean of the data: take "
            "target='teacher', or a smaller schedule_learning_rate and fewer schedule_rounds."
            if self.pool.teacher is None
            else "Take a smaller schedule_learning_rate, or more batches."
        )
        warnings.warn(
            f"Schedule learning stopped after {self.updates + 1} updates: the samples' variance "
            f"fell from {self._watched.first_ratio:.2f} to {ratio:.2f} of the target's, and the "
            f"levels went back to where it had not. {hint}",
            stacklevel=2,
        )

    def _best_of(self, denoiser: Denoiser, found: Sequence[Tensor]) -> Tensor:
        """Return the parameters of the levels that err least on the noise to learn on."""
        parameters = [self._map.parameters(levels) for levels in found]
        if len(parameters) == 1 or self.pool.teacher is None:
            return parameters[0]
        errors = []
        for tried in parameters:
            self._move_to(tried, PROGRAMME)
            errors.append(float(self.errors(denoiser, self.pool.fitted).mean()))
        return parameters[int(np.nanargmin(errors))]

    def _choose(self, denoiser: Denoiser) -> None:
        """Go to the schedule that errs least on held-out noise; measure all that were compared."""
        watch = self._watched
        choices = {"before": watch.before, "start": watch.found, "best": watch.best}
        held_out = {}
        met: list[Tensor] = []
        for name, parameters in choices.items():
            if any(torch.equal(parameters, other) for other in met):
                continue
            met.append(parameters)
            self._move_to(parameters, self._origin_of(parameters))
            held_out[name] = self.errors(denoiser, self.pool.held_out)
            if name != "before" or watch.first:
                self.compared[self.origin] = self._reported_error(denoiser)
        chosen = choices[best_of(held_out)]
        self._move_to(chosen, self._origin_of(chosen))

    def _reported_error(self, denoiser: Denoiser) -> float:
        return float(self.errors(denoiser, self.pool.reported).mean())

    def _check_apart(self) -> None:
        """Raise TrainingDivergedError if the levels are not finite, or met."""
        levels = self.levels
        if not (levels[:-1] > (1 + LEAST_GAP) * levels[1:]).all():
            raise TrainingDivergedError(
                "a noise level",
                self.updates,
                f"Schedule learning diverged: after update {self.updates + 1} two noise levels "
                "are the same, or one is none. Lower schedule_learning_rate, "
                f"{self.learning_rate:g} here and 0.03 to 1 usually; checkpoints written before "
                "are good.",
            )

    @property
    def _as_given(self) -> tuple[Tensor, str]:
        """The given schedule's parameters and origin."""
        return self._map.parameters(noise_levels(self._given)), GIVEN

    def _origin_of(self, parameters: Tensor) -> str:
        """Return where parameters of this stage come from."""
        watch = self._watched
        if torch.equal(parameters, watch.before):
            return watch.origin
        return self._start if torch.equal(parameters, watch.found) else LEARNED

    def _here(self) -> Tensor:
        return self._parameters.detach().clone()

    def _move_to(self, parameters: Tensor, origin: str) -> None:
        """Set the levels' parameters, and build the sampler that they make."""
        with torch.no_grad():
            self._parameters.copy_(parameters)
        schedule = schedule_at(self.levels, self.objective.like)
        if self.integer_times:
            schedule = Schedule(schedule.process, schedule.times.round())
        # Exactly that: levels and parameters round.
        schedule = self._given if origin == GIVEN else schedule
        self.origin = origin
        self.schedule = schedule
        self.tableau = self.objective.build(schedule)

    def state(self) -> dict[str, Any]:
        """Return what the stage changed, but for how many updates are done."""
        return {
            "parameters": self._parameters.detach(),
            "descent": self._adam.state_dict(),
            "watch": None if self._watch is None else dict(vars(self._watch)),
            "collapsed": self.collapsed,
            "origin": self.origin,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._adam.load_state_dict(state["descent"])
        self._watch = None if state["watch"] is None else Watch(**state["watch"])
        self.collapsed = state["collapsed"]
        self._move_to(state["parameters"].cpu(), state["origin"])


def _variance(samples: Tensor) -> float:
    """Return the total variance of samples (N, *shape): the sum over their dimensions."""
    return float(samples.double().flatten(1).var(0).sum())
