"""Where the tables start: as given, with D-ODE's weights, on a programme's times, or both."""

from __future__ import annotations

from ....envs import Schedule
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ..distillation.fit import Batch as StepBatch
from ..distillation.fit import fit
from ..distillation.forms import directions, distilled
from ..distillation.teacher import Teacher
from ..scheduling.levels import schedule_at
from ..scheduling.pool import Pool
from ..scheduling.starts import LevelProgramme

# As D-ODE's own default.
RIDGE = 1e-4


def programme_schedules(pool: Pool, denoiser: Denoiser, student: Tableau) -> list[Schedule]:
    """Return what the dynamic programme finds; of several answers the best has to be tried out.

    Args:
        pool: the source of noise; its schedule gives the number of levels and the ends.
        denoiser: the network.
        student: the base solver on that schedule.
    """
    programme = LevelProgramme(pool.like, integer_times=False)
    return [schedule_at(found, pool.like) for found in programme.levels(pool, denoiser, student)]


def distilled_table(
    base: Tableau,
    teacher: Teacher,
    pool: Pool,
    denoiser: Denoiser,
    with_noise: bool,
) -> Tableau:
    """Return a base solver with D-ODE's weights on all outputs, fitted in closed form.

    Args:
        base: the base solver.
        teacher: its states are what the steps should lead to.
        pool: the noises.
        denoiser: the network.
        with_noise: whether the first step may change its factor of the state, too.
    """
    rows = directions(base, "all")
    if not with_noise:
        rows = [row[row[:, -1] == 0] for row in rows]
    batches = [
        StepBatch(
            batch.noise,
            teacher.states(denoiser.under(batch.condition), batch.noise),
            batch.condition,
        )
        for batch in pool.fitted
    ]
    fits = fit(base, rows, denoiser, batches, RIDGE)
    return distilled(base, rows, [found.lambdas for found in fits])
