"""The studies of schedule learning that `fewstep benchmark` runs: declared.

A study is a grid of cells, environment x solver x steps x seed, on EDM denoisers (VE). In each
cell the solver on Karras's schedule and all contenders sample from the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .solver_studies import MIXTURE


@dataclass(frozen=True)
class Learner:
    """A way to learn a schedule.

    Attributes:
        settings: of `ScheduleLearning`.
        after: label of the learner whose schedule this one starts from; Karras's if None.
        dode: settings of `DODE` on the learned schedule afterwards; None leaves it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    dode: dict[str, Any] | None = None

    @property
    def tunes(self) -> bool:
        """Whether it changes the network."""
        return self.settings.get("tuning_rounds") != 0


@dataclass(frozen=True)
class ScheduleStudy:
    """A comparison of learned schedules with Karras's.

    Attributes:
        title: what it asks.
        learners: label -> how.
        solvers: keys of `SOLVERS`.
        environments: where; "Mixture" has an exact denoiser, the others train one.
        budgets: steps K, one network call each.
        seeds: of the denoiser's training, the learning and the held-out noise.
    """

    title: str
    learners: dict[str, Learner]
    solvers: tuple[str, ...] = ("euler",)
    environments: tuple[str, ...] = ("SwissRoll", "Digits")
    budgets: tuple[int, ...] = (5, 10, 20)
    seeds: tuple[int, ...] = (0, 1, 2)


STAGE_ONE: dict[str, Any] = {"tuning_rounds": 0}
FROM_KARRAS: dict[str, Any] = {**STAGE_ONE, "start": "karras"}
STAGE_TWO: dict[str, Any] = {"schedule_rounds": 0, "start": "environment"}
# With target="data" what was tuned is returned, whether or not it is nearer to the teacher.
LAMBDA: dict[str, Any] = {**STAGE_TWO, "target": "data", "tuning_weights": "lambda"}
PAPER: dict[str, Any] = {**FROM_KARRAS, "target": "data", "gradient": "eq14"}
COLLAPSE: dict[str, Any] = {**FROM_KARRAS, "target": "data", "diffusion_weight": 0.0}
PROGRAMME: dict[str, Any] = {"gradient": "none", "tuning_rounds": 0}

SCHEDULE_STUDIES: dict[str, ScheduleStudy] = {
    "schedule": ScheduleStudy(
        "Two-stage schedule learning (paper B, Table 1)",
        {
            "stage 1": Learner(FROM_KARRAS),
            "stage 2 only": Learner(STAGE_TWO),
            "two-stage": Learner(STAGE_TWO, after="stage 1"),
            "trajectory programme": Learner({**PROGRAMME, "start": "trajectory-dp"}),
            "stage 1 from there": Learner(STAGE_ONE),
            "L_diff programme": Learner({**PROGRAMME, "start": "diffusion-dp"}),
            "stage 2 only, lambda": Learner(LAMBDA),
            "original weights": Learner({**LAMBDA, "tuning_weights": "original"}),
            "two-stage, lambda": Learner(LAMBDA, after="stage 1"),
            "stage 1, data (paper)": Learner(PAPER),
            "two-stage, data (paper)": Learner(LAMBDA, after="stage 1, data (paper)"),
        },
    ),
    "schedule-mixture": ScheduleStudy(
        "Learned schedules of an exact denoiser (docs/MATH.md 3.6)",
        {
            "exact, from Karras": Learner(FROM_KARRAS),
            "eq. 14, from Karras": Learner({**FROM_KARRAS, "gradient": "eq14"}),
            "eq. 14 + weights, from Karras": Learner(
                {**FROM_KARRAS, "gradient": "eq14", "weight_term": True}
            ),
            "trajectory programme": Learner({**PROGRAMME, "start": "trajectory-dp"}),
            "exact, from there": Learner(STAGE_ONE),
            "L_diff programme": Learner({**PROGRAMME, "start": "diffusion-dp"}),
            "data, until it collapses": Learner(COLLAPSE),
            "data, to the end": Learner({**COLLAPSE, "collapse": 0.0}),
        },
        environments=(MIXTURE,),
        budgets=(6, 10),
    ),
    "schedule-solvers": ScheduleStudy(
        "Learned schedules of other solvers, and D-ODE on them",
        {
            "stage 1": Learner(STAGE_ONE),
            "D-ODE alone": Learner({**PROGRAMME, "start": "karras"}, dode={"form": "all"}),
            "stage 1, then D-ODE": Learner(
                {**PROGRAMME, "start": "environment"}, after="stage 1", dode={"form": "all"}
            ),
        },
        solvers=("euler", "ipndm", "dpm-solver++-2m"),
        environments=(MIXTURE, "SwissRoll", "Digits"),
        budgets=(5, 10),
    ),
}
