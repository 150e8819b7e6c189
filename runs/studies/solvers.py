"""Studies of solvers and their distillation, and of what the solver agents return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .contenders import Contender, Grid
from .engine import Study
from .stages import SMALL_UNET, Clone, Guide, Learn, Sample, Stage, fine_tune
from .world import LONG, MIXTURE, Scoring

# The two kinds of network: a noise predictor of a thousand noisings, and EDM's.
VP, EDM = Clone(noisings=LONG), Clone("ve")
UNIFORM: dict[str, Any] = {"schedule": "uniform", "schedule_options": {"end": 1.0}}
KARRAS: dict[str, Any] = {"schedule": "karras"}
SCORING = Scoring(20_000, held_out=2000)
COLUMNS = ("error", "factor error", "sliced_wasserstein_fresh", "mmd", "returned", "seconds")

Start = tuple[str, Clone, Sample]


def _vp(label: str, solver: str) -> Start:
    return label, VP, Sample(solver, **UNIFORM)


DDIM, IPNDM, DPM_2M = (
    _vp("DDIM", "ddim"),
    _vp("iPNDM-4", "ipndm"),
    _vp("DPM-Solver++ 2M", "dpm-solver++-2m"),
)
EDM_EULER: Start = ("DDIM (EDM)", EDM, Sample("euler", **KARRAS))
EDM_HEUN: Start = ("EDM Heun", EDM, Sample("heun", **KARRAS))
STARTS = (
    DDIM,
    IPNDM,
    _vp("DEIS-3", "deis"),
    _vp("DPM-Solver-2", "dpm-solver-2"),
    _vp("DPM-Solver-3", "dpm-solver-3"),
    _vp("DDIM (data)", "euler"),
    DPM_2M,
    _vp("DPM-Solver++ 2S", "dpm-solver++-2s"),
    _vp("DPM-Solver++ 3S", "dpm-solver++-3s"),
    EDM_EULER,
    EDM_HEUN,
)


def _distilled(
    title: str,
    starts: Iterable[Start],
    treatments: dict[str, dict[str, Any]],
    calls: tuple[int, ...] = (5, 10, 15),
) -> Study:
    """Return the study of D-ODE with several settings on several solvers."""
    contenders = tuple(
        Contender(label, (clone, sample, Learn("dode", settings)), solver)
        for solver, clone, sample in starts
        for label, settings in treatments.items()
        # The look-ahead form is for solvers of the clean sample.
        if settings.get("form") != "lookahead" or clone is EDM
    )
    envs = (MIXTURE, "SwissRoll", "Digits")
    return Study(title, Grid(envs, contenders, calls, (0, 1, 2), SCORING), COLUMNS)


# Networks that were trained for a moment only are rough, as third parties' networks may be, and a
# solver's errors on them are not those of theory. A good one takes ten times the rounds or more.
WEAK_ROUNDS = 100
SCHEDULE: dict[str, Any] = {"tuning_rounds": 0, "batch_size": 200, "schedule_rounds": 60}
TUNING: dict[str, Any] = {
    "schedule_rounds": 0,
    "start": "environment",
    "tuning_rounds": 100,
    "tuning_batch_size": 100,
    "batch_size": 200,
}
REFINED: dict[str, Any] = {"refine": "end-to-end", "refine_steps": 5}
# What takes minutes is tried, on a network, with few calls.
LEARNERS = (
    Contender("schedule learning", (Learn("schedule", SCHEDULE),)),
    Contender("D-ODE", (Learn("dode"),)),
    Contender("D-ODE, refined", (Learn("dode", REFINED),), envs=(MIXTURE,)),
    Contender("stage two alone", (Learn("schedule", TUNING),), envs=("Digits",), calls=(6,)),
)


def _weak(learner: Contender, start: Start) -> Contender:
    solver, clone, sample = start
    network = "EDM, to level 80" if clone is EDM else "noise predictor, linear-1000"
    stages = (replace(clone, rounds=WEAK_ROUNDS), sample, *learner.stages)
    return replace(learner, stages=stages, solver=f"{solver} ({network})")


WEAK_STARTS = (
    DDIM,
    DPM_2M,
    ("DDIM", EDM, Sample("ddim", **KARRAS)),
    ("DPM-Solver++ 2M", EDM, Sample("dpm-solver++-2m", **KARRAS)),
)

# Of the third order: as it falls to the first in the last steps, and as it does not.
LAST_STEPS = {
    "++2M": Sample("dpm-solver++-2m"),
    "++2M, lowered": Sample("dpm-solver++-2m", {"lower_order_final": True}),
    "++3M, full": Sample("dpm-solver++-3m", {"lower_order_final": False}),
    "++3M, lowered": Sample("dpm-solver++-3m", {"lower_order_final": True}),
    "++3M, full, as published": Sample(
        "dpm-solver++-3m", {"lower_order_final": False, "compat": True}
    ),
    "++3M, lowered, as published": Sample(
        "dpm-solver++-3m", {"lower_order_final": True, "compat": True}
    ),
}
GRIDS: dict[str, dict[str, Any]] = {
    "even times": {"schedule": "uniform", "schedule_options": {"end": 1e-3}},
    "Karras's times": {"schedule": "karras", "schedule_options": {"append_zero": False}},
}


def _last_steps() -> Study:
    contenders = []
    for env, clone in (("Digits", VP), ("SwissRoll", Clone("flow"))):
        for grid, times in GRIDS.items():
            if env == "Digits" and grid == "even times":
                times = UNIFORM
            contenders += [
                Contender(label, (clone, replace(sample, **times)), grid, (env,))
                for label, sample in LAST_STEPS.items()
            ]
    scoring = Scoring(0, held_out=500, reference_steps=300)
    return Study(
        "The order of the last of few steps, on trained networks",
        Grid(("Digits", "SwissRoll"), tuple(contenders), (5, 10, 14), (0, 1, 2), scoring),
        ("error",),
    )


# What is learned of a solver of few calls, from the least to the most.
LEARNED = {
    "D-ODE": ("dpm-solver++-2m", Learn("dode")),
    "D-ODE, all outputs": ("dpm-solver++-2m", Learn("dode", {"form": "all"})),
    "learned schedule": ("dpm-solver++-2m", Learn("schedule", {"tuning_rounds": 0})),
    **{
        f"solver learning, {name}": (solver, Learn("solver", preset=name))
        for name, solver in (
            ("ld3", "unipc-2"),
            ("s4s", "dpm-solver++-3m"),
            ("s4s-alt", "dpm-solver++-3m"),
            ("bns", "euler"),
            ("dyweight", "ipndm"),
            ("ddss", "ddim"),
            ("gs", "dpm-solver++-3m"),
            ("gas", "dpm-solver++-3m"),
            ("times", "dpm-solver++-2m"),
        )
    },
    "solver learning": ("dpm-solver++-3m", Learn("solver")),
}


# What learns of rewards alone, and what tunes the network, which an exact one cannot be.
BY_REWARD = {
    "RDPO": ("dpm-solver++-2m", Learn("rdpo")),
    "RDPO, cross-entropy": ("dpm-solver++-2m", Learn("rdpo", {"method": "cross-entropy"})),
}
_GS = Learn("solver", preset="gs")
GS_THEN_SFT, GS_SFD_SFT = "gs, then SFT", "gs, SFD, SFT"
OF_THE_NETWORK: dict[str, tuple[str, tuple[Learn, ...]]] = {
    "SFD": ("ddim", (Learn("sfd"),)),
    "PD": ("ddim", (Learn("pd"),)),
    "CD": ("consistency", (Learn("cd"),)),
    "solver learning, then SFD": ("dpm-solver++-3m", (Learn("solver"), Learn("sfd"))),
    GS_THEN_SFT: ("dpm-solver++-3m", (_GS, fine_tune("sft", 0))),
    GS_SFD_SFT: ("dpm-solver++-3m", (_GS, Learn("sfd"), fine_tune("sft", 0))),
}


def _learned(
    title: str,
    networks: dict[str, tuple[Stage, ...]],
    scoring: Scoring,
    metrics: tuple[str, ...],
    seeds: tuple[int, ...] = (0,),
    last: dict[str, Any] | None = None,
) -> Study:
    """Return the study of what is learned of a solver.

    Args:
        title: of the study.
        networks: by environment, how each is made.
        scoring: how samplers are scored.
        metrics: columns between the error and what was returned.
        seeds: of networks and learners.
        last: what `Sample` is given for the times, if not the solvers' default ones.
    """

    def sample(solver: str) -> Sample:
        return Sample(solver, **(last or {}))

    given = ("ddim", "dpm-solver++-2m", "dpm-solver++-3m", "unipc-2", "ipndm", "deis")
    rows: dict[str, tuple[Stage, ...]] = {solver: (sample(solver),) for solver in given}
    learned = LEARNED | BY_REWARD
    rows |= {name: (sample(solver), learn) for name, (solver, learn) in learned.items()}
    rows |= {name: (sample(solver), *learn) for name, (solver, learn) in OF_THE_NETWORK.items()}
    if scoring.conditional:  # a good picture of another class is a fake, too
        for name in (GS_THEN_SFT, GS_SFD_SFT):
            *stages, _ = rows[name]
            rows[name] = (*stages, fine_tune("sft", 0, mismatched=0.5))
    # An exact network cannot be tuned.
    tuned = tuple(env for env in networks if env != MIXTURE)
    contenders = tuple(
        Contender(label, (*networks[env], *stages), envs=(env,))
        for label, stages in rows.items()
        for env in (tuned if label in OF_THE_NETWORK else networks)
    )
    grid = Grid(tuple(networks), contenders, (5, 8), seeds, scoring)
    return Study(title, grid, ("error", *metrics, "returned", "seconds"))


def _of_images(env: str, conditional: bool, *metrics: str) -> Study:
    """Return the study on 28 x 28 images, guided if it is conditional."""
    clone = Clone("linear-1000", seed=0, conditional=conditional, **SMALL_UNET)
    return _learned(
        f"What is learned of a solver on {env}" + (", guidance 2" if conditional else ""),
        {env: (clone, Guide(2.0)) if conditional else (clone,)},
        Scoring(2000, 256, reference_steps=100, before=False, conditional=conditional),
        tuple(f"{name}[{env.lower()}-classifier]" for name in metrics),
        # The pixels are clean enough at the first noising to stop there.
        last=UNIFORM,
    )


STUDIES = {
    "solver-learning": _learned(
        "What is learned of a solver, in few calls",
        {MIXTURE: (VP,), "SwissRoll": (VP,), "Digits": (VP,)},
        Scoring(20_000, held_out=1000, reference_steps=400, before=False),
        ("sliced_wasserstein_fresh", "frechet_distance[digits-classifier]"),
        (0, 1, 2),
    ),
    "solver-learning-mnist": _of_images("MNIST", False, "frechet_distance"),
    "solver-learning-fashion": _of_images(
        "FashionMNIST", True, "frechet_distance", "class_accuracy"
    ),
    "last-steps": _last_steps(),
    "dode": _distilled(
        "D-ODE solvers against their base solvers (Kim, Tang & Yu 2024)", STARTS, {"distilled": {}}
    ),
    "dode-align": _distilled(
        "Teacher and student compared at the same time, or by index as the official code does",
        (("DDIM", VP, Sample("ddim", schedule="uniform_torch")), EDM_EULER, EDM_HEUN),
        {"time": {}, "index": {"align": "index", "teacher": "ddim"}},
    ),
    "dode-forms": _distilled(
        "What a step may mix in (Kim, Tang & Yu 2024, Table 2 and section 13)",
        (DDIM, EDM_EULER),
        {
            "difference": {},
            **{form: {"form": form} for form in ("two", "sep", "all", "general", "fixed")},
            "lookahead": {"form": "lookahead"},
        },
    ),
    "dode-all": _distilled(
        "One parameter a call as in the paper, or free weights on all outputs so far",
        STARTS,
        {"difference": {}, "all": {"form": "all"}},
        calls=(10,),
    ),
    "dode-refine": _distilled(
        "The plain fit of the paper, ours, and the same refined end to end",
        (DDIM, IPNDM, DPM_2M, EDM_HEUN),
        {
            "100 samples, no ridge": {"batches": 1, "ridge": 0.0},
            "greedy": {},
            "end-to-end": {"refine": "end-to-end", "refine_steps": 10},
        },
        calls=(10,),
    ),
    "returned": Study(
        "What learners return, and what they were given, on exact denoisers and weak networks",
        Grid(
            (MIXTURE, "Digits"),
            tuple(_weak(learner, start) for start in WEAK_STARTS for learner in LEARNERS),
            (6, 10),
            (0, 1, 2),
            Scoring(0, held_out=1000, reference_steps=400),
        ),
        ("error", "factor error", "returned", "tuned", "seconds"),
    ),
}
