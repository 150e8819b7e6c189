"""Studies of classifier-free guidance with few network calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .agents import COARSE_GRAIN, FINE_GRAIN
from .contenders import Contender, Grid
from .engine import Study
from .stages import SMALL_UNET, Clone, Guide, Learn, Sample, fine_tune
from .world import Scoring

NETWORKS = {
    "Digits": Clone("linear-1000", conditional=True, seed=0),
    "FashionMNIST": Clone("linear-1000", conditional=True, seed=0, **SMALL_UNET),
    "MNIST": Clone("linear-1000", conditional=True, seed=0, **SMALL_UNET),
}
GUIDANCES = (1.0, 2.0, 4.0)
# The pixels of an image are clean enough at the first noising to stop there.
TIMES: dict[str, Any] = {"schedule": "uniform", "schedule_options": {"end": 1.0}}
DDIM = Sample("ddim", **TIMES)
SOLVERS = {
    "DDIM": DDIM,
    "DPM-Solver++ 2M": Sample("dpm-solver++-2m", **TIMES),
    "UniPC-2": Sample("unipc-2", **TIMES),
    "iPNDM-4": Sample("ipndm", **TIMES),
}
SCHEDULE: dict[str, Any] = {"tuning_rounds": 0, "batch_size": 100, "schedule_rounds": 30}
TIMES_LEARNED = Learn("schedule", {**SCHEDULE, "batches": 1, "start": "environment"})
REFINED = Learn(
    "dode",
    {"form": "all", "refine": "end-to-end", "refine_steps": 5, "batches": 4, "batch_size": 64},
)
SOLVER = Learn("solver", {"batch_size": 50, "batches": 4, "rounds": 4})
SFD = Learn("sfd", {"rounds": 100, "batch_size": 64, "size": 64})
LEARNED = {
    "D-ODE on DDIM": (DDIM, Learn("dode", {"batches": 2, "batch_size": 64})),
    "learned schedule, DPM-Solver++ 2M": (SOLVERS["DPM-Solver++ 2M"], TIMES_LEARNED),
    "the same, its weights distilled": (SOLVERS["DPM-Solver++ 2M"], TIMES_LEARNED, REFINED),
    "solver learning on DPM-Solver++ 3M": (Sample("dpm-solver++-3m", **TIMES), SOLVER),
    "the same, then SFD": (Sample("dpm-solver++-3m", **TIMES), SOLVER, SFD),
}
SCORING = Scoring(2_000, held_out=256, reference_steps=100, before=False, conditional=True)


def _columns(env: str) -> tuple[str, ...]:
    features = f"{env.lower()}-classifier"
    of_images = ("class_accuracy", "frechet_distance", "precision", "recall")
    return (*(f"{metric}[{features}]" for metric in of_images), "seconds")


def _guided(env: str, guidance: float) -> list[Contender]:
    name, network = f"w = {guidance:g}", (NETWORKS[env], Guide(guidance))
    plain = [
        Contender(label, (*network, sample), name, (env,)) for label, sample in SOLVERS.items()
    ]
    learned = [Contender(label, (*network, *rest), name, (env,)) for label, rest in LEARNED.items()]
    return plain + learned


def _study(env: str, title: str) -> Study:
    contenders = tuple(each for w in GUIDANCES for each in _guided(env, w))
    return Study(
        title,
        Grid((env,), contenders, (5, 10), (0,), SCORING),
        ("evaluations", "error", *_columns(env)),
    )


def _fine_tuned(env: str, title: str) -> Study:
    """Return the study of fine-tuning at guidance 1 and 2, against where it starts."""
    fine = COARSE_GRAIN if env == "Digits" else FINE_GRAIN
    learners = {
        "sft": (fine, fine_tune("sft", 0)),
        "sft, half mismatched": (fine, fine_tune("sft", 0, mismatched=0.5)),
        "sft-v": (COARSE_GRAIN, fine_tune("sft-v", 0)),
    }
    contenders = tuple(
        Contender(f"{label}, w = {w:g}", (NETWORKS[env], Guide(w), *stages))
        for label, stages in learners.items()
        for w in (1.0, 2.0)
    )
    scoring = replace(SCORING, held_out=0, before=True)
    return Study(title, Grid((env,), contenders, (5, 10), (0, 1, 2), scoring), _columns(env))


STUDIES = {
    "guidance": _study("Digits", "Guided digits in 5 and 10 calls: solvers and what is learned"),
    "guidance-fashion": _study("FashionMNIST", "The same on Fashion-MNIST, with --data-dir"),
    "guidance-mnist": _study("MNIST", "The same on MNIST, with --data-dir"),
    "guided-sft": _fine_tuned("Digits", "Fine-tuning a conditional sampler of digits"),
    "guided-sft-fashion": _fine_tuned("FashionMNIST", "The same on Fashion-MNIST, with --data-dir"),
    "guided-sft-mnist": _fine_tuned("MNIST", "The same on MNIST, with --data-dir"),
}
