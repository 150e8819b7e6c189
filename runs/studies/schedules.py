"""Studies of schedule learning, and of what it composes with."""

from __future__ import annotations

from typing import Any

from .contenders import Contender, Grid
from .engine import Study
from .solvers import EDM, SCORING, VP
from .stages import Learn, Sample, Stage, fine_tune
from .world import MIXTURE, Scoring

STAGE_ONE: dict[str, Any] = {"tuning_rounds": 0}
FROM_KARRAS: dict[str, Any] = {**STAGE_ONE, "start": "karras"}
STAGE_TWO: dict[str, Any] = {"schedule_rounds": 0, "start": "environment"}
# With target="data" what was tuned is returned, whether or not it is nearer to the teacher.
LAMBDA: dict[str, Any] = {**STAGE_TWO, "target": "data", "tuning_weights": "lambda"}
PAPER: dict[str, Any] = {**FROM_KARRAS, "target": "data", "gradient": "eq14"}
COLLAPSE: dict[str, Any] = {**FROM_KARRAS, "target": "data", "diffusion_weight": 0.0}
PROGRAMME: dict[str, Any] = {"gradient": "none", "tuning_rounds": 0}
D_ODE = Learn("dode", {"form": "all"})

NETWORKS = ("SwissRoll", "Digits")
COLUMNS = (
    "error",
    "factor error",
    "sliced_wasserstein_fresh",
    "factor sliced_wasserstein_fresh",
    "mmd",
    "seconds",
)


def _learned(label: str, *settings: dict[str, Any]) -> Contender:
    """Return what learns a schedule for Euler's steps on EDM's network, by one agent or several."""
    return Contender(label, (EDM, Sample("euler"), *(Learn("schedule", each) for each in settings)))


def _on(solver: str, label: str, *stages: Stage) -> Contender:
    return Contender(label, (EDM, Sample(solver), *stages), solver)


def _five(label: str, *stages: Stage) -> Contender:
    """Return a contender of the study of composition: from DDIM, or from DDPM."""
    return Contender(label, (VP, *stages))


TIMES = Learn("schedule", STAGE_ONE)
SFT_PG = fine_tune("sft-pg", evaluations=0)
DDIM, DDPM = Sample("ddim"), Sample("ancestral")

STUDIES = {
    "schedule": Study(
        "Two-stage schedule learning (Huang 2024, Table 1)",
        Grid(
            NETWORKS,
            (
                _learned("stage 1", FROM_KARRAS),
                _learned("stage 2 only", STAGE_TWO),
                _learned("two-stage", FROM_KARRAS, STAGE_TWO),
                _learned("trajectory programme", {**PROGRAMME, "start": "trajectory-dp"}),
                _learned("stage 1 from there", STAGE_ONE),
                _learned("L_diff programme", {**PROGRAMME, "start": "diffusion-dp"}),
                _learned("stage 2 only, lambda", LAMBDA),
                _learned("original weights", {**LAMBDA, "tuning_weights": "original"}),
                _learned("two-stage, lambda", FROM_KARRAS, LAMBDA),
                _learned("stage 1, data (paper)", PAPER),
                _learned("two-stage, data (paper)", PAPER, LAMBDA),
            ),
            calls=(5, 10, 20),
            seeds=(0, 1, 2),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "schedule-mixture": Study(
        "Learned schedules of an exact denoiser (docs/MATH.md 3.6)",
        Grid(
            (MIXTURE,),
            (
                _learned("exact, from Karras", FROM_KARRAS),
                _learned("eq. 14, from Karras", {**FROM_KARRAS, "gradient": "eq14"}),
                _learned(
                    "eq. 14 + weights, from Karras",
                    {**FROM_KARRAS, "gradient": "eq14", "weight_term": True},
                ),
                _learned("trajectory programme", {**PROGRAMME, "start": "trajectory-dp"}),
                _learned("exact, from there", STAGE_ONE),
                _learned("L_diff programme", {**PROGRAMME, "start": "diffusion-dp"}),
                _learned("data, until it collapses", COLLAPSE),
                _learned("data, to the end", {**COLLAPSE, "collapse": 0.0}),
            ),
            calls=(6, 10),
            seeds=(0, 1, 2),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "schedule-solvers": Study(
        "Learned schedules of other solvers, and D-ODE on them",
        Grid(
            (MIXTURE, *NETWORKS),
            tuple(
                contender
                for solver in ("euler", "ipndm", "dpm-solver++-2m")
                for contender in (
                    _on(solver, "stage 1", TIMES),
                    _on(solver, "D-ODE alone", D_ODE),
                    _on(solver, "stage 1, then D-ODE", TIMES, D_ODE),
                )
            ),
            calls=(5, 10),
            seeds=(0, 1, 2),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "composition": Study(
        "What learning the times, distillation and SFT-PG add to one another, in five calls",
        Grid(
            ("SwissRoll",),
            (
                _five("DDIM", DDIM),
                _five("times", DDIM, TIMES),
                _five("D-ODE", DDIM, D_ODE),
                _five("times, D-ODE", DDIM, TIMES, D_ODE),
                _five("DDPM", DDPM),
                _five("SFT-PG", DDPM, SFT_PG),
                _five("times, SFT-PG", DDIM, TIMES, DDPM, SFT_PG),
                _five("SFT-PG, DDIM, D-ODE", DDPM, SFT_PG, DDIM, D_ODE),
            ),
            calls=(5,),
            scoring=Scoring(20_000, held_out=2000),
        ),
        ("sliced_wasserstein", "sliced_wasserstein_fresh", "mmd", "training calls", "seconds"),
    ),
}
