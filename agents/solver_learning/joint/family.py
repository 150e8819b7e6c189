"""The tables that a solver learner chooses from, as functions of free parameters (MATH.md 5.1).

With t the learned times, and p(t), W(t) the base solver's table on them,

    z_{j+1} = (p_j(t) + dp_j) z_{a(j)} + sum_k (W_jk(t) + dW_jk) O(z_k, log l_k + xi_k)

The base solver's numbers are one node of an autograd graph over the levels, whose derivative is
that of schedule learning (`scheduling.adjoint.by_log_level`); everything else is plain arithmetic.
So a gradient is two factors: `pull_back` differentiates an error by the numbers of the table, and
`Numbers.backward` follows them back to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....envs.schedules import Schedule
from ...samplers.tableau import Tableau
from ..scheduling.adjoint import Sensitivity, Stacks, by_log_level, log_levels
from ..scheduling.levels import LevelMap, noise_levels, schedule_at
from .noise_form import in_noise_form
from .settings import LearnSettings

Builder = Callable[[Schedule], Tableau]
Parameters = dict[str, Tensor]

TIMES, FACTORS, WEIGHTS, SHIFTS = "times", "factors", "weights", "shifts"

# A shift is at most this share of the least gap between the logarithms of two levels (LD3).
LARGEST_SHIFT = 0.5


class Numbers(NamedTuple):
    """The numbers of a table of K steps, float64 on the CPU, with the graph that made them.

    Attributes:
        asked: (K,) logarithms of the levels that the network is told.
        scale: (K,).
        weights: (K, K).
        current: (K,).
    """

    asked: Tensor
    scale: Tensor
    weights: Tensor
    current: Tensor

    def backward(self, sensitivity: Sensitivity) -> None:
        """Add an error's derivatives to the `grad` of the parameters, given those by the table."""
        found = (
            sensitivity.levels,
            sensitivity.scale,
            sensitivity.weights,
            sensitivity.current,
        )
        pairs = [
            (number, torch.from_numpy(gradient))
            for number, gradient in zip(self, found, strict=True)
            if number.requires_grad
        ]
        torch.autograd.backward([number for number, _ in pairs], [pull for _, pull in pairs])


class TableFamily:
    """The tables that some parameters make of a base solver.

    Parameters are float64 tensors on the CPU by name, those that are learned: "times" (T - 2,) of a
    `LevelMap`; "factors" (K,) and "weights" (K, K), changes in units of the largest number of the
    given table's row; "shifts" (K,).

    Args:
        build: the base solver's builder; deterministic tables.
        given: the schedule that gives the number of steps and the ends.
        learn: what is learned, and how.

    Raises:
        ValueError: "shares" of a step whose weights sum to 0; or shifts alone, of a single call.
    """

    def __init__(self, build: Builder, given: Schedule, learn: LearnSettings) -> None:
        self.learn, self.given = learn, given
        self._build, self._stack = build, getattr(build, "stack", None)
        if learn.form == "noise":
            self._build, self._stack = (lambda schedule: in_noise_form(build(schedule))), None
        self.reference = self._build(given)
        # Levels, and the times and the base solver's table there, that were asked for last.
        self._latest = torch.empty(0), given, self.reference
        if self.reference.steps == 1 and not (learn.times or learn.factors or learn.weights):
            raise ValueError(
                "Nothing is left to learn: the first network call is told its own level, and there "
                "is no other; take more steps, or learn.weights=True."
            )
        base = numbers_of(self.reference)
        lower = torch.ones_like(base.weights).tril()
        largest = base.weights.abs().amax(1, keepdim=True)
        if learn.coefficients == "shares":
            self._check_sums(base)
            largest = torch.ones_like(largest)
        self.units = {
            FACTORS: torch.where(base.scale != 0, base.scale.abs(), 1.0),
            WEIGHTS: torch.where(largest > 0, largest, 1.0) * lower,
        }
        # The first call is told the level that the noise is drawn for.
        moves = torch.from_numpy(np.array(self.reference.asked)).double()
        moves[0] = 0.0
        self._moves = moves
        self._map: LevelMap | None = None
        if learn.times:
            levels = noise_levels(given)
            self._map = LevelMap(float(levels[-1]), float(levels[0]), learn.space)

    @property
    def moves_levels(self) -> bool:
        """Whether the network has to be differentiable in its level."""
        return self.learn.times or self.learn.shifts

    def zeros(self) -> Parameters:
        """Return the parameters of the given table."""
        steps = self.reference.steps
        made = {}
        if self._map is not None:
            made[TIMES] = self._map.parameters(noise_levels(self.given))
        shapes = {FACTORS: (steps,), WEIGHTS: (steps, steps), SHIFTS: (steps,)}
        switches = {
            FACTORS: self.learn.factors,
            WEIGHTS: self.learn.weights,
            SHIFTS: self.learn.shifts,
        }
        for name, shape in shapes.items():
            if switches[name]:
                made[name] = torch.zeros(shape, dtype=torch.float64)
        return made

    def parameters_of(self, schedule: Schedule, table: Tableau) -> Parameters:
        """Return the parameters that make a table of the base solver's form on a schedule.

        What is not learned stays the base solver's, whatever the table says.
        """
        made = self.zeros()
        if self._map is not None:
            made[TIMES] = self._map.parameters(noise_levels(schedule))
        wanted = numbers_of(in_noise_form(table) if self.learn.form == "noise" else table)
        with torch.no_grad():
            here = self.numbers(made)
        if WEIGHTS in made:
            missed = wanted.weights - here.weights
            if self.learn.coefficients == "shares":
                missed = missed / self._sums(made)
            made[WEIGHTS] = torch.where(self.units[WEIGHTS] > 0, missed / self.units[WEIGHTS], 0.0)
        if FACTORS in made:
            made[FACTORS] = (wanted.scale - here.scale) / self.units[FACTORS]
        return made

    def levels(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the noise levels of the states (T,), descending, without a final 0."""
        if self._map is None:
            return noise_levels(self.given)
        return self._map.levels(parameters[TIMES].detach())

    def schedule(self, parameters: Mapping[str, Tensor]) -> Schedule:
        """Return the times of the states."""
        return self._base(parameters)[0]

    def numbers(self, parameters: Mapping[str, Tensor], base: Numbers | None = None) -> Numbers:
        """Return the table's numbers, differentiable in the parameters.

        Args:
            parameters: of the table.
            base: the base solver's numbers at the same times, if they are known already.
        """
        asked, scale, weights, current = base or self.base_numbers(parameters)
        coefficients = self.learn.coefficients
        if coefficients == "free":
            _, scale, weights, current = numbers_of(self.reference)
        elif coefficients == "shares":
            start = numbers_of(self.reference).weights
            weights = weights.sum(1, keepdim=True) * start / start.sum(1, keepdim=True)
        if WEIGHTS in parameters:
            change = self.units[WEIGHTS] * parameters[WEIGHTS]
            if coefficients == "shares":
                change = change * weights.sum(1, keepdim=True)
            weights = weights + change
        if FACTORS in parameters:
            scale = scale + self.units[FACTORS] * parameters[FACTORS]
        if SHIFTS in parameters:
            asked = asked + self._moves * parameters[SHIFTS]
        return Numbers(asked, scale, weights, current)

    def table(self, parameters: Mapping[str, Tensor], numbers: Numbers | None = None) -> Tableau:
        """Return the table of parameters, whose numbers may be known already."""
        _, base = self._base(parameters)
        with torch.no_grad():
            found = self.numbers(parameters) if numbers is None else numbers
        told = base.evaluation_times.copy()
        if SHIFTS in parameters:
            moved = (self._moves * parameters[SHIFTS].detach() != 0).numpy()
            logs = self._within(found.asked.detach())
            told[moved] = base.process.time_of_log_snr(-logs).numpy()[moved]
        return base.replace(
            name=f"learned {base.name}",
            scale=found.scale.detach().numpy(),
            weights=np.tril(found.weights.detach().numpy()),
            current=found.current.detach().numpy(),
            asked_times=told,
        )

    def cut_shifts(self, parameters: Parameters) -> None:
        """Cut shifts that are larger than `LARGEST_SHIFT` times the least gap, in place."""
        if SHIFTS in parameters:
            logs = self.levels(parameters).log()
            most = LARGEST_SHIFT * float(-logs.diff().max()) if len(logs) > 1 else 0.0
            parameters[SHIFTS].data.clamp_(-most, most)

    def _within(self, logs: Tensor) -> Tensor:
        """Return log levels, kept inside the process."""
        process = self.given.process
        ends = [float(-process.log_snr(t)) for t in (process.t_min, process.t_max)]
        return logs.clamp(*ends)

    def base_numbers(self, parameters: Mapping[str, Tensor]) -> Numbers:
        """Return the base solver's numbers at the times of parameters, differentiable in them."""
        if self._map is None:
            return numbers_of(self.reference)
        logs = self._map.levels(parameters[TIMES]).log()
        schedule, base = self._base(parameters)
        follow = self.learn.coefficients != "free"
        return Numbers(*_BaseNumbers.apply(logs, base, schedule, self._build, self._stack, follow))

    def _base(self, parameters: Mapping[str, Tensor]) -> tuple[Schedule, Tableau]:
        """Return the times of parameters, and the base solver's table there; the last are kept."""
        if self._map is None:
            return self.given, self.reference
        levels = self.levels(parameters)
        if not torch.equal(levels, self._latest[0]):
            schedule = schedule_at(levels, self.given)
            self._latest = levels, schedule, self._build(schedule)
        return self._latest[1:]

    def _sums(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the base solver's sums of weights (K, 1)."""
        return self.base_numbers(parameters).weights.sum(1, keepdim=True)

    def _check_sums(self, base: Numbers) -> None:
        if not bool(base.weights.sum(1).all()):
            raise ValueError(
                f"learn.coefficients='shares' divides each step of '{self.reference.name}' by its "
                "sum of weights, and one of them is 0: take 'added'."
            )


def numbers_of(table: Tableau) -> Numbers:
    """Return the numbers of a table, without a graph."""
    current = table.current
    assert current is not None
    arrays = (log_levels(table), table.scale, table.weights, current)
    return Numbers(*(torch.from_numpy(np.array(array)) for array in arrays))


class _BaseNumbers(torch.autograd.Function):
    """The numbers of a base solver's table as functions of the logarithms of its levels."""

    @staticmethod
    def forward(
        ctx: Any,
        logs: Tensor,
        base: Tableau,
        schedule: Schedule,
        build: Builder,
        stack: Stacks | None,
        follow: bool,
    ) -> Any:
        ctx.schedule, ctx.build, ctx.stack, ctx.follow = schedule, build, stack, follow
        return tuple(numbers_of(base))

    @staticmethod
    def backward(ctx: Any, *pulls: Tensor) -> Any:
        asked, *others = (pull.numpy() for pull in pulls)
        if not ctx.follow:
            others = [np.zeros_like(pull) for pull in others]
        sensitivity = Sensitivity(asked, *others)
        gradient = by_log_level(ctx.build, ctx.schedule, sensitivity, ctx.stack)
        return gradient, None, None, None, None, None
