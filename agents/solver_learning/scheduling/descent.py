"""Stage one: the levels go down their objective, watched on held-out noise (MATH.md 3.3 to 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....common.optimisation import TrainingDivergedError, frozen, learning_rate, set_learning_rate
from ....envs import Schedule
from ...denoisers.denoiser import Denoiser
from ...selection import best_of
from ..settings import ScheduleSettings
from .levels import LevelMap, noise_levels, schedule_at
from .objective import Objective, Slope
from .pool import Batch, Pool

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


@dataclass
class Stage:
    """What a stage remembers of the levels' parameters on its way.

    Attributes:
        before: what there was before the stage.
        origin: where that came from, see `Descent.origin`.
        first: whether that is what the learner was given.
        found: what the stage was to start from.
        best: those of the least error on held-out noise.
        error: that error, the mean.
    """

    before: Tensor
    origin: str
    first: bool
    found: Tensor
    best: Tensor
    error: float


class Descent:
    """Adam on the levels' free parameters, and the schedule and the sampler that they make.

    A stage ends with the schedule that errs least on held-out noise: that from before, the one that
    the stage was to start from, or the best that it met; see
    `fewstep.agents.selection`.

    Args:
        objective: what the levels should make small; its schedule is where they start on a grid.
        pool: what it is measured on.
        given: the schedule that what is learned has to better.
        start: what the stage starts from: "given", a "grid" or a "programme".
        settings: of the learner.

    Attributes:
        schedule: the schedule as it is now.
        tableau: the sampler on it.
        origin: where it comes from: "given", "grid", "programme" or "learned".
        compared: errors of the schedules that the last stage ended with a choice between, by their
            origin, on the noise that is only reported on.
        rounds: updates a stage.
        updates: how many of this stage are done.
        collapsed: whether a stage ended early, and went back.
    """

    collapsed = False

    def __init__(
        self,
        objective: Objective,
        pool: Pool,
        given: Schedule,
        start: str,
        settings: ScheduleSettings,
    ) -> None:
        self.objective = objective
        self.pool = pool
        self.integer_times = settings.integer_times
        self.learning_rate = settings.level_rate
        self.rounds, self.moves = settings.level_rounds, settings.gradient != "none"
        levels = noise_levels(objective.like)
        self._map = LevelMap(float(levels[-1]), float(levels[0]), settings.space)
        self._parameters = torch.nn.Parameter(self._map.parameters(levels))
        self._adam = torch.optim.Adam([self._parameters])
        self._stage: Stage | None = None
        self._given = given
        self._start = start
        self.compared: dict[str, float] = {}
        self.updates = 0
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
        before = self._map.levels(self.stage.before)
        return float((self.levels / before).log().abs().max())

    @property
    def stage(self) -> Stage:
        """What the stage remembers."""
        assert self._stage is not None, "begin comes first"
        return self._stage

    def begin(self, denoiser: Denoiser, first: bool, found: Sequence[Tensor] | None = None) -> None:
        """Begin a stage, and remember what there was before it.

        Args:
            denoiser: the network that samples.
            first: whether the stage is the first one, before which there is the given schedule.
            found: what a programme found, (T,) each; the best of them on the noise to learn on is
                what to start from, unless what there was before errs less on held-out noise. None
                starts from the grid, or from what there was before.
        """
        start, origin = self._here(), self.origin
        before = self._as_given if first else (start, origin)
        if found is not None:
            start, origin = self._best_of(denoiser, found), PROGRAMME
        self.compared = {}
        self._move_to(start, origin)
        error = self.error(denoiser)
        if found is not None:
            self._move_to(*before)
            if (other := self.error(denoiser)) <= error:
                error = other
            else:
                self._move_to(start, origin)
        self._stage = Stage(*before, first, start, self._here(), error)
        self._adam = torch.optim.Adam([self._parameters])

    def skip(self, denoiser: Denoiser, found: Sequence[Tensor] | None = None) -> None:
        """Choose between the given schedule and the start, where there is no stage one.

        Args:
            denoiser: the network that samples.
            found: see `begin`.
        """
        self.begin(denoiser, True, found)
        self._end(denoiser)

    def update(self, denoiser: Denoiser, generator: torch.Generator) -> dict[str, float]:
        """Move the levels once; now and then, and at the end, compare them with the best.

        Args:
            denoiser: the network that samples.
            generator: source of real samples and fresh noise.

        Returns:
            What to log.
        """
        metrics = self._step(denoiser, generator) if self.moves else {}
        self.updates += 1
        if self.done or self.updates % CHECK_INTERVAL == 0:
            error = metrics["held_out_error"] = self.error(denoiser)
            if error < self.stage.error:
                self.stage.best, self.stage.error = self._here(), error
        if self.done:
            self._end(denoiser)
        for j, level in enumerate(self.levels.tolist()):
            metrics[f"level_{j:03d}"] = level
        return metrics

    def slope(self, denoiser: Denoiser, batch: Batch, generator: torch.Generator) -> Slope:
        """Return the objective on a batch, with its derivatives by the levels."""
        with frozen(denoiser):
            return self.objective.slope(denoiser, self.levels, batch, generator)

    def error(self, denoiser: Denoiser) -> float:
        """Return the sampler's error on held-out noise, the mean square of a coordinate's."""
        return float(self.errors(denoiser, self.pool.held_out).mean())

    def errors(self, denoiser: Denoiser, batches: Sequence[Batch]) -> Tensor:
        """Return the sampler's error for each noise of some batches, see `Objective.errors`."""
        return self.objective.errors(denoiser, self.tableau, batches)

    def _step(self, denoiser: Denoiser, generator: torch.Generator) -> dict[str, float]:
        """Take one step of Adam."""
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
        return {"disc_loss": slope.loss / batch.noise[0].numel(), **slope.others}

    def _best_of(self, denoiser: Denoiser, found: Sequence[Tensor]) -> Tensor:
        """Return the parameters of the levels that err least on the noise to learn on."""
        parameters = [self._map.parameters(levels) for levels in found]
        if len(parameters) == 1:
            return parameters[0]
        errors = []
        for tried in parameters:
            self._move_to(tried, PROGRAMME)
            errors.append(float(self.errors(denoiser, self.pool.fitted).mean()))
        return parameters[int(np.nanargmin(errors))]

    def _end(self, denoiser: Denoiser) -> None:
        """Go to the schedule that errs least on held-out noise; measure all that were compared."""
        stage = self.stage
        choices = {"before": stage.before, "start": stage.found, "best": stage.best}
        held_out = {}
        met: list[Tensor] = []
        for name, parameters in choices.items():
            if any(torch.equal(parameters, other) for other in met):
                continue
            met.append(parameters)
            self._move_to(parameters, self._origin_of(parameters))
            held_out[name] = self.errors(denoiser, self.pool.held_out)
            if name != "before" or stage.first:
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
        stage = self.stage
        if torch.equal(parameters, stage.before):
            return stage.origin
        return self._start if torch.equal(parameters, stage.found) else LEARNED

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
            "stage": None if self._stage is None else dict(vars(self._stage)),
            "origin": self.origin,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._adam.load_state_dict(state["descent"])
        self._stage = None if state["stage"] is None else Stage(**state["stage"])
        self._move_to(state["parameters"].cpu(), state["origin"])
