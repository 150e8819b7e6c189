"""Which parts a schedule learner is made of: the main ones, or those of the paper's readings."""

from __future__ import annotations

from typing import get_args

import torch

from ....envs import DiffusionMDP, Schedule
from ...denoisers.denoiser import Denoiser
from ..distillation.teacher import Teacher
from ..settings import ScheduleSettings
from .descent import GIVEN, GRID, PROGRAMME, Descent
from .objective import Builder, Objective
from .paper.parts import (
    DataDescent,
    DataPool,
    DataTuning,
    DiffusionProgramme,
    PaperObjective,
)
from .pool import Pool
from .starts import PROGRAMMES, LevelProgramme, Programme
from .tuning import Tuning


def make_objective(
    settings: ScheduleSettings, build: Builder, like: Schedule, mdp: DiffusionMDP
) -> Objective:
    """Return what stage one minimises."""
    of_data, by_eq14 = settings.target == "data", settings.gradient == "eq14"
    if not (of_data or by_eq14 or settings.diffusion_share):
        return Objective(build, like)
    return PaperObjective(
        build,
        like,
        mdp.target,
        of_data=of_data,
        reading=settings.reading if by_eq14 else None,
        gamma=settings.paper.gamma,
        diffusion_weight=settings.diffusion_share,
        kind=mdp.kind,
    )


def make_pool(
    settings: ScheduleSettings,
    mdp: DiffusionMDP,
    like: Schedule,
    teacher: Teacher,
    denoiser: Denoiser,
    seed: int,
) -> Pool:
    """Return where rollouts start, and where they should end."""
    kind = DataPool if settings.target == "data" else Pool
    return kind(mdp, like, teacher, denoiser, settings.batch_size, settings.batches, seed)


def make_programme(settings: ScheduleSettings, like: Schedule) -> LevelProgramme | None:
    """Return the dynamic programme that finds the start, or None for the other starts."""
    if settings.start not in get_args(Programme):
        return None
    kinds = {**PROGRAMMES, "diffusion-dp": DiffusionProgramme}
    return kinds[settings.start](like, settings.integer_times)


def make_descent(
    settings: ScheduleSettings, objective: Objective, pool: Pool, given: Schedule, found: bool
) -> Descent:
    """Return stage one.

    Args:
        settings: of the learner.
        objective: what is minimised.
        pool: what it is measured on.
        given: the environment's own schedule.
        found: whether a programme finds the start.
    """
    same = torch.allclose(objective.like.times, given.times, rtol=1e-9, atol=0.0)
    start = PROGRAMME if found else GIVEN if same else GRID
    kind = DataDescent if settings.target == "data" else Descent
    return kind(objective, pool, given, start, settings)


def make_tuning(settings: ScheduleSettings, denoiser: Denoiser, pool: Pool) -> Tuning:
    """Return stage two."""
    weights = settings.tuning_weights
    if weights == "rollout":
        return Tuning(denoiser, pool, settings.tuning)
    return DataTuning(
        denoiser, pool, settings.tuning, weights=weights, last_weight=settings.paper.last_weight
    )
