"""Distillation: a scheduler of few steps, learned for a pipeline's network without any data.

Schedule learning moves the times that the sampler visits, D-ODE fits what each step makes of the
network's answers; the goal is where a fine solver ends from the same noise under the same prompt.
Both know a prompt as a class, see `pipelines.body`. What is learned is a table of a few hundred
numbers, which `TableauScheduler` runs in the pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ...envs import DiffusionMDP, Schedule
from ...envs.mdp import no_reward
from ...envs.schedules import make_schedule
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau
from ..solver_learning.agent import SolverAgent
from ..solver_learning.distillation.teacher import make_teacher
from ..solver_learning.dode import DODE
from ..solver_learning.schedule_learning import ScheduleLearning
from ..solver_learning.settings import DODESettings, ScheduleSettings, TuningSettings
from ..solvers import build_solver, default_schedule
from .families import Family
from .open import OpenedPipeline
from .prompts import Prompts, prompt_target
from .settings import DistilSettings

OWN = "own"


class Distillation:
    """The stages of learning a pipeline's scheduler.

    Args:
        denoiser: of the pipeline, under all prompts; it waits for one.
        given: the times to start from.
        prompts: those of the denoiser; None for an unconditional network.
        settings: what is learned.

    Attributes:
        base: the solver on the times to start from.
        fine_times: the teacher's, which refine those to start from: learned ones may lie so far
            apart that a refinement of them would be crude.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        given: Schedule,
        prompts: Prompts | None,
        settings: DistilSettings,
    ) -> None:
        self.settings, self.prompts, self.given = settings, prompts, given
        self.denoiser = denoiser
        self.base = build_solver(
            settings.solver, given, denoiser, **(settings.solver_options or {})
        )
        if not self.base.linear:
            raise ValueError(
                f"The solver '{self.base.name}' adds noise or clamps its predictions; what is "
                "learned is a deterministic one, such as dpm-solver++-2m, ddim or unipc-2."
            )
        teacher = make_teacher(self.base, given, settings.teacher, scale=settings.scale)
        self.fine_times = tuple(dict.fromkeys(teacher.tableau.times.tolist()))
        shape = denoiser.shape
        assert shape is not None  # a PipelineBody says it
        device = next(denoiser.parameters()).device
        self._target = prompt_target(shape, device, prompts)

    @property
    def stages(self) -> list[str]:
        """The names of the agents that learn, in their order."""
        kinds = {"times": [ScheduleLearning.name], "weights": [DODE.name]}
        return kinds.get(self.settings.learn, [ScheduleLearning.name, DODE.name])

    def agents(self) -> Iterator[SolverAgent]:
        """Yield the agents in their order; each has to have learned before the next is made."""
        given = self.given
        for name in self.stages:
            agent = self._agent(name, given)
            yield agent
            given = agent.schedule

    def _agent(self, name: str, given: Schedule) -> SolverAgent:
        settings = self.settings
        conditional = self.prompts is not None
        mdp = DiffusionMDP(self._target, given.process, given, no_reward, conditional)
        shared: dict[str, Any] = {
            "solver": settings.solver,
            "solver_options": settings.solver_options or {},
            "teacher": settings.teacher,
            "scale": settings.scale,
            "check_teacher": settings.check_teacher,
            "batch_size": settings.samples,
            "batches": 1,
        }
        if name == DODE.name:
            its: Any = DODESettings(form=settings.form, teacher_times=self.fine_times, **shared)
            return DODE(mdp, self.denoiser, its, seed=settings.seed + 1)
        its = ScheduleSettings(
            schedule_rounds=settings.rounds, tuning=TuningSettings(rounds=0), **shared
        )
        return ScheduleLearning(mdp, self.denoiser, its, seed=settings.seed)


def starting_schedule(opened: OpenedPipeline, settings: DistilSettings) -> Schedule:
    """Return the times that learning starts from.

    Raises:
        ValueError: an unknown schedule, or one that the process does not have.
    """
    if settings.schedule == OWN:
        return opened.own_schedule(settings.steps)
    process = opened.terms.process
    if settings.schedule is None:
        # Where times are learned the first and the last noise level stay.
        grid = None if settings.learn == "weights" else ScheduleLearning.grid
        return default_schedule(settings.solver, process, settings.steps, grid)
    return make_schedule(settings.schedule, process, settings.steps)


def usual_guidance(family: Family) -> float:
    """Return the guidance that the pipeline takes where it is told none; 1 of one without."""
    if not (family.splits or family.embeds_guidance):
        return 1.0
    call: Any = type(family.pipeline).__call__
    return float(inspect.signature(call).parameters["guidance_scale"].default)


def table_of(agents: list[SolverAgent]) -> Tableau:
    """Return what the last of the agents has learned."""
    return agents[-1].tableau
