"""Studies of chains of agents, each from what the last one left, and of quality against time."""

from __future__ import annotations

from typing import Any

from ...agents import AGENTS
from . import timeline
from .contenders import Contender, Grid
from .engine import Study
from .solvers import VP
from .stages import SMALL_UNET, Clone, Learn, Sample, Stage, fine_tune
from .world import Scoring

# What an agent learns on where nothing was learned before that it could take up.
SOLVERS = {
    "dode": "dpm-solver++-2m",
    "schedule": "dpm-solver++-2m",
    "solver": "dpm-solver++-3m",
    "rdpo": "dpm-solver++-3m",
    "cd": "consistency",
    "sft-pg": "ancestral",
    "sft-v": "ancestral",
    "sft": "ancestral",
}
STAGES: dict[str, Learn] = {
    "dode": Learn("dode", {"form": "all"}),
    "schedule": Learn("schedule", {"tuning_rounds": 0}),
    "gs": Learn("solver", preset="gs"),
    **{name: fine_tune(name, evaluations=0) for name in ("sft-pg", "sft-v", "sft")},
}


def chain(*names: str, clone: Clone = VP, **solvers: str) -> Contender:
    """Return the contender whose agents learn one after the other.

    Each takes over the network and the times. One that takes a finished table takes that of the
    last, too; for another a solver of its kind is built on the times.

    Args:
        names: keys of `STAGES` or `AGENTS`.
        clone: the network.
        solvers: by name of an agent, other than those of `SOLVERS`.
    """
    stages: list[Stage] = [clone]
    for name in names:
        learn = STAGES.get(name, Learn(name))
        if len(stages) == 1 or not AGENTS[learn.agent].takes_tableau:
            stages.append(Sample((SOLVERS | solvers).get(learn.agent, "ddim")))
        stages.append(learn)
    return Contender(" > ".join(names), tuple(stages))


# How good a solver of the network is that nobody trained, with more and more calls.
YARDSTICK = "DDIM"
METHODS = ("dode", "sfd", "pd", "cd", "sft-pg", "sft-v", "sft", "gs", "solver")
CHAINS = (
    ("schedule", "dode"),
    ("solver", "sfd"),
    ("solver", "sft"),
    ("solver", "rdpo"),
    ("pd", "sft"),
    ("solver", "sfd", "sft-v"),
    ("solver", "sfd", "sft-pg"),
    ("solver", "sfd", "sft"),
)


def _against_time(env: str, column: str, scoring: dict[str, Any], clone: Clone = VP) -> Study:
    """Return the study of an environment, judged by a column and by the error to the ODE."""
    yard = Contender(YARDSTICK, (clone, Sample("ddim")), calls=(5, 10, 20, 50))
    learners = [chain(*names, clone=clone) for names in (*zip(METHODS), *CHAINS)]
    return Study(
        f"Quality against time on {env}, five calls",
        Grid((env,), (yard, *learners), (5,), (0,), Scoring(**scoring, timeline=True)),
        (column, "error"),
        YARDSTICK,
        timeline.present,
    )


COMPOSED = ("schedule",), ("dode",), ("schedule", "dode"), ("sft-pg",), ("schedule", "sft-pg")
STUDIES = {
    "quality-time": _against_time(
        "SwissRoll",
        "sliced_wasserstein_fresh",
        {"samples": 20_000, "held_out": 1000, "reference_steps": 400},
    ),
    "quality-time-digits": _against_time(
        "Digits",
        "frechet_distance[digits-classifier]",
        {"samples": 2000, "held_out": 500, "reference_steps": 200},
    ),
    "quality-time-mnist": _against_time(
        "MNIST",
        "frechet_distance[mnist-classifier]",
        {"samples": 2000, "held_out": 256, "reference_steps": 100},
        Clone("linear-1000", seed=0, **SMALL_UNET),
    ),
    "composition": Study(
        "What learning the times, distillation and SFT-PG add to one another, in five calls",
        Grid(
            ("SwissRoll",),
            (
                Contender("DDIM", (VP, Sample("ddim"))),
                Contender("DDPM", (VP, Sample("ancestral"))),
                *(chain(*names, schedule="ddim", dode="ddim") for names in COMPOSED),
                chain("sft-pg", "dode", dode="ddim"),
            ),
            calls=(5,),
            scoring=Scoring(20_000),
        ),
        ("sliced_wasserstein", "sliced_wasserstein_fresh", "mmd", "training calls", "seconds"),
    ),
}
