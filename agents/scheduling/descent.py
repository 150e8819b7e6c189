"""Stage one: the levels go down their objective, watched on held-out noise (MATH.md 3.3 to 3.6)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...envs import Schedule
from ..denoiser import Denoiser
from ..training import frozen, learning_rate, set_learning_rate
from .levels import LevelMap, Space, noise_levels, schedule_at
from .objective import Objective, Slope
from .pool import Batch, Pool
from .watch import Watch

# Updates of the levels between two looks at held-out noise.
CHECK_INTERVAL = 10

# The step grows over so many updates: Adam's first ones go the whole rate along every parameter,
# which can strand levels at the noisy end where nothing pulls them back.
WARM_UP = 20


class Descent:
    """Adam on the levels' free parameters, and the schedule and the sampler that they make.

    Args:
        objective: what the levels should make small; its schedule is where they are at first.
        pool: what it is measured on.
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
        updates: how many of this stage are done.
        collapsed: whether a stage ended because the samples' variance fell.
    """

    def __init__(
        self,
        objective: Objective,
        pool: Pool,
        *,
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
        self.updates = 0
        self.collapsed = False
        self._move_to(self._parameters)

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

    def begin(self, denoiser: Denoiser, levels: Tensor | None = None) -> None:
        """Begin a stage: go to other levels (T,) if there are any, and remember where it began."""
        before = self._here()
        if levels is not None:
            self._move_to(self._map.parameters(levels))
        start = self._here()
        self._watch = Watch(before, start, self.error(denoiser), start)
        self._adam = torch.optim.Adam([self._parameters])

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
            self._move_to(self._watched.best)
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
        """Return the sampler's error on held-out noise."""
        return self.objective.error(denoiser, self.tableau, self.pool.held_out)

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
        self._move_to(self._parameters)
        metrics = {"disc_loss": slope.disc_loss}
        if slope.diff_loss is not None:
            metrics["diff_loss"] = slope.diff_loss
        ratio = metrics["variance_ratio"] = _variance(slope.ends) / _variance(batch.target)
        if self._watched.collapses(before, ratio, self.collapse):
            self._go_back(ratio)
        return metrics

    def _go_back(self, ratio: float) -> None:
        """Return to where the samples' variance was sound, and say so."""
        self.collapsed = True
        self._move_to(self._watched.sound)
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

    def _here(self) -> Tensor:
        return self._parameters.detach().clone()

    def _move_to(self, parameters: Tensor) -> None:
        """Set the levels' parameters, and build the sampler that they make."""
        with torch.no_grad():
            self._parameters.copy_(parameters)
        schedule = schedule_at(self.levels, self.objective.like)
        if self.integer_times:
            schedule = Schedule(schedule.process, schedule.times.round())
        self.schedule = schedule
        self.tableau = self.objective.build(schedule)

    def state(self) -> dict[str, Any]:
        """Return what the stage changed, but for how many updates are done."""
        return {
            "parameters": self._parameters.detach(),
            "descent": self._adam.state_dict(),
            "watch": None if self._watch is None else dict(vars(self._watch)),
            "collapsed": self.collapsed,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._adam.load_state_dict(state["descent"])
        self._watch = None if state["watch"] is None else Watch(**state["watch"])
        self.collapsed = state["collapsed"]
        self._move_to(state["parameters"].cpu())


def _variance(samples: Tensor) -> float:
    """Return the total variance of samples (N, *shape): the sum over their dimensions."""
    return float(samples.double().flatten(1).var(0).sum())
