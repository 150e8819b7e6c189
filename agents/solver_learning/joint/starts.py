"""Where the tables start: as given, with D-ODE's weights, on other times, or both.

The error at the end has many local optima in the times, and a descent leaves none of them. With the
weights in closed form a grid of times is judged in a second, so many of them can be tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ....envs import Schedule
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ..distillation.fit import Batch as StepBatch
from ..distillation.fit import fit
from ..distillation.forms import directions, distilled
from ..distillation.teacher import Teacher
from ..scheduling.levels import noise_levels, schedule_at
from ..scheduling.pool import Batch, Pool
from ..scheduling.starts import PROGRAMMES, optimal_schedule
from .family import Builder, Parameters, TableFamily
from .settings import MOVING, Start
from .slopes import EndObjective

# The grids that are tried.
EXPONENTS, WARPS = (3.0, 7.0, 20.0), (0.5, 0.7, 1.0, 1.4)

# As D-ODE's own default.
RIDGE = 1e-4

# On so many noises the starts are tried, and so many of the best ones on all.
TRIED, FINALISTS = 100, 3


@dataclass(frozen=True)
class Starts:
    """Where the descent of a family of tables may start.

    Attributes:
        family: the tables.
        build: the base solver's builder.
        teacher_of: a table and its schedule -> their teacher.
        pool: the noises.
        denoiser: the network.
    """

    family: TableFamily
    build: Builder
    teacher_of: Callable[[Tableau, Schedule], Teacher]
    pool: Pool
    denoiser: Denoiser

    def best(self, kind: Start, objective: EndObjective) -> list[Parameters]:
        """Return the best of what there is to try, by an objective; none for "given"."""
        given, fitted = self.family.given, self.pool.fitted
        if kind == "given":
            return []
        schedules = [given]
        if kind in MOVING:
            schedules += moved_schedules(kind, self.pool, self.denoiser, self.build(given))
        if len(schedules) > FINALISTS:
            few = [next(fitted[0].split(TRIED))]

            def loss(schedule: Schedule) -> float:
                table = self.family.table(self._on(schedule, few))
                found = float(objective.contributions(self.denoiser, table, few).mean())
                return found if math.isfinite(found) else math.inf

            schedules = sorted(schedules, key=loss)[:FINALISTS]
        return [self._on(schedule, fitted) for schedule in schedules]

    def _on(self, schedule: Schedule, batches: Sequence[Batch]) -> Parameters:
        """Return the parameters of the base solver on a schedule, with distilled weights."""
        base, learn = self.build(schedule), self.family.learn
        if learn.weights:
            teacher = self.teacher_of(base, schedule)
            base = distilled_table(base, teacher, batches, self.denoiser, learn.factors)
        return self.family.parameters_of(schedule, base)


def moved_schedules(
    kind: Start, pool: Pool, denoiser: Denoiser, student: Tableau
) -> list[Schedule]:
    """Return the schedules of a start that moves the times; the best has to be tried out.

    Args:
        kind: one of `MOVING`.
        pool: the source of noise; its schedule gives the number of levels and the ends.
        denoiser: the network.
        student: the base solver on that schedule.
    """
    like = pool.like
    if kind == "dmn":
        return [optimal_schedule(like)]
    name = kind if kind in PROGRAMMES else "trajectory-dp"
    programme = PROGRAMMES[name](like, integer_times=False)
    found = [schedule_at(levels, like) for levels in programme.levels(pool, denoiser, student)]
    return found + (even_schedules(like) if kind == "search" else [])


def even_schedules(given: Schedule) -> list[Schedule]:
    """Return grids between the ends of a schedule: even in level^(1/r), or in a power of that."""
    levels = noise_levels(given)
    ramp = torch.linspace(0, 1, len(levels), dtype=levels.dtype)
    found = []
    for exponent in EXPONENTS:
        high, low = levels[0] ** (1 / exponent), levels[-1] ** (1 / exponent)
        for warp in WARPS:
            inner = (high + (low - high) * ramp**warp) ** exponent
            found.append(schedule_at(inner, given))
    return found


def distilled_table(
    base: Tableau,
    teacher: Teacher,
    batches: Sequence[Batch],
    denoiser: Denoiser,
    with_noise: bool,
) -> Tableau:
    """Return a base solver with D-ODE's weights on all outputs, fitted in closed form.

    Args:
        base: the base solver.
        teacher: its states are what the steps should lead to.
        batches: the noises.
        denoiser: the network.
        with_noise: whether the first step may change its factor of the state, too.
    """
    rows = directions(base, "all")
    if not with_noise:
        rows = [row[row[:, -1] == 0] for row in rows]
    made = [
        StepBatch(
            batch.noise,
            teacher.states(denoiser.under(batch.condition), batch.noise),
            batch.condition,
        )
        for batch in batches
    ]
    fits = fit(base, rows, denoiser, made, RIDGE)
    return distilled(base, rows, [found.lambdas for found in fits])
