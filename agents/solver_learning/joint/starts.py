"""Where the tables start: as given, with D-ODE's weights, on other times, or both.

The error at the end has many local optima in the times, and a descent leaves none of them. With the
weights in closed form a grid of times is judged in a second, so many of them can be tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

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
        teacher_of: a table, its schedule and, if any, further tables -> their common teacher.
        pool: the noises.
        denoiser: the network.
    """

    family: TableFamily
    build: Builder
    teacher_of: Callable[..., Teacher]
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
            losses = []
            for parameters in self._on(schedules, few):
                table = self.family.table(parameters)
                found = float(objective.shares(self.denoiser, table, few).mean())
                losses.append(found if math.isfinite(found) else math.inf)
            order = sorted(range(len(schedules)), key=losses.__getitem__)
            schedules = [schedules[i] for i in order[:FINALISTS]]
        return self._on(schedules, fitted)

    def _on(self, schedules: list[Schedule], batches: Sequence[Batch]) -> list[Parameters]:
        """Return the parameters of the base solver on each schedule, with distilled weights."""
        tables = [self.build(schedule) for schedule in schedules]
        if self.family.learn.weights:
            # A teacher for each asks the network as many times more, but a multistep solver needs
            # steps that are alike.
            if self.teacher_of(tables[0], schedules[0]).memoryless:
                tables = self._taught(tables, schedules[0], batches)
            else:
                pairs = zip(tables, schedules, strict=True)
                tables = [self._taught([table], times, batches)[0] for table, times in pairs]
        return list(map(self.family.parameters_of, schedules, tables))

    def _taught(
        self, tables: list[Tableau], schedule: Schedule, batches: Sequence[Batch]
    ) -> list[Tableau]:
        """Return tables with distilled weights, by one teacher on a refinement of a schedule."""
        teacher = self.teacher_of(tables[0], schedule, tables[1:])
        return distilled_tables(tables, teacher, batches, self.denoiser, self.family.learn.factors)


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


def distilled_tables(
    bases: Sequence[Tableau],
    teacher: Teacher,
    batches: Sequence[Batch],
    denoiser: Denoiser,
    with_noise: bool,
) -> list[Tableau]:
    """Return base solvers with D-ODE's weights on all outputs, fitted in closed form.

    Args:
        bases: the base solvers.
        teacher: its states are what the steps should lead to, those of one table after the other.
        batches: the noises.
        denoiser: the network.
        with_noise: whether the first step may change its factor of the state, too.
    """
    passed = [
        # On the CPU: they are as many as the steps of all tables.
        teacher.passed(denoiser.under(batch.condition), batch.noise, "cpu")
        for batch in batches
    ]
    targets, made = iter(teacher.targets), []
    for base in bases:
        own = list(islice(targets, base.steps))
        rows = directions(base, "all")
        if not with_noise:
            rows = [row[row[:, -1] == 0] for row in rows]
        taught = [
            StepBatch(batch.noise, torch.stack([found[i] for i in own]), batch.condition)
            for batch, found in zip(batches, passed, strict=True)
        ]
        fits = fit(base, rows, denoiser, taught, RIDGE)
        made.append(distilled(base, rows, [found.lambdas for found in fits]))
    return made
