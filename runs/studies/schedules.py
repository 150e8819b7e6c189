"""Studies of schedule learning, and of what it composes with."""

from __future__ import annotations

from typing import Any

from .contenders import Contender, Grid
from .engine import Study
from .solvers import EDM, SCORING
from .stages import Learn, Sample, Stage
from .world import MIXTURE

STAGE_ONE: dict[str, Any] = {"tuning_rounds": 0}
FROM_KARRAS: dict[str, Any] = {**STAGE_ONE, "start": "karras"}
STAGE_TWO: dict[str, Any] = {"schedule_rounds": 0, "start": "environment"}
# With target="data" what was tuned is returned, whether or not it is nearer to the teacher.
LAMBDA: dict[str, Any] = {**STAGE_TWO, "target": "data", "tuning_weights": "lambda"}
EQ14: dict[str, Any] = {"gradient": "eq14"}
PAPER: dict[str, Any] = {**FROM_KARRAS, **EQ14, "target": "data"}
COLLAPSE: dict[str, Any] = {**FROM_KARRAS, "target": "data", "diffusion_weight": 0.0}
PROGRAMME: dict[str, Any] = {**STAGE_ONE, "gradient": "none"}

W2 = "sliced_wasserstein_fresh"
COLUMNS = ("error", "factor error", W2, f"factor {W2}", "mmd", "seconds")
NETWORKS = ("SwissRoll", "Digits")
TIMES, D_ODE = Learn("schedule", STAGE_ONE), Learn("dode", {"form": "all"})


def _study(title: str, envs: tuple[str, ...], calls: tuple[int, ...], *who: Contender) -> Study:
    """Return a study of learned schedules, three seeds."""
    return Study(title, Grid(envs, who, calls, (0, 1, 2), SCORING), COLUMNS)


def _learned(label: str, *settings: dict[str, Any]) -> Contender:
    """Return what learns a schedule for Euler's steps, by one agent or several."""
    return _on("euler", label, *(Learn("schedule", each) for each in settings))


def _on(solver: str, label: str, *stages: Stage) -> Contender:
    """Return what learns on top of a solver on Karras's schedule, with EDM's network."""
    return Contender(label, (EDM, Sample(solver), *stages), solver)


STUDIES = {
    "schedule": _study(
        "Two-stage schedule learning (Huang 2024, Table 1)",
        NETWORKS,
        (5, 10, 20),
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
    "schedule-mixture": _study(
        "Learned schedules of an exact denoiser (docs/MATH.md 3.6)",
        (MIXTURE,),
        (6, 10),
        _learned("exact, from Karras", FROM_KARRAS),
        _learned("eq. 14, from Karras", {**FROM_KARRAS, **EQ14}),
        _learned("eq. 14 + weights, from Karras", {**FROM_KARRAS, **EQ14, "weight_term": True}),
        _learned("trajectory programme", {**PROGRAMME, "start": "trajectory-dp"}),
        _learned("exact, from there", STAGE_ONE),
        _learned("L_diff programme", {**PROGRAMME, "start": "diffusion-dp"}),
        _learned("data, until it collapses", COLLAPSE),
        _learned("data, to the end", {**COLLAPSE, "collapse": 0.0}),
    ),
    "schedule-solvers": _study(
        "Learned schedules of other solvers, and D-ODE on them",
        (MIXTURE, *NETWORKS),
        (5, 10),
        *(
            contender
            for solver in ("euler", "ipndm", "dpm-solver++-2m")
            for contender in (
                _on(solver, "stage 1", TIMES),
                _on(solver, "D-ODE alone", D_ODE),
                _on(solver, "stage 1, then D-ODE", TIMES, D_ODE),
            )
        ),
    ),
}
