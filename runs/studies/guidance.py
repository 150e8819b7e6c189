"""Studies of classifier-free guidance with few network calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .agents import COARSE_GRAIN, FINE_GRAIN
from .contenders import Contender, Grid
from .engine import Study
from .stages import COLOUR_UNET, SMALL_UNET, Clone, Guide, Learn, Sample, Stage, fine_tune
from .world import Scoring

NETWORKS = {
    "Digits": Clone("linear-1000", conditional=True, seed=0),
    "FashionMNIST": Clone("linear-1000", conditional=True, seed=0, **SMALL_UNET),
    "MNIST": Clone("linear-1000", conditional=True, seed=0, **SMALL_UNET),
    "ImageFolder": Clone("flow", conditional=True, seed=0, **COLOUR_UNET),
}
BY_CAPTION = replace(NETWORKS["ImageFolder"], conditional="captions")
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
# A folder holds few pictures out, and colour makes each sample dear.
OF_A_FOLDER = replace(SCORING, samples=500, held_out=64, reference_steps=50)


def _columns(env: str) -> tuple[str, ...]:
    features = f"{env.lower()}-classifier"
    of_images = ("class_accuracy", "frechet_distance", "precision", "recall")
    return (*(f"{metric}[{features}]" for metric in of_images), "seconds")


def at_own_times(clone: Clone, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Let a flow's solvers visit their default times: those named here are whole noisings."""
    if clone.process != "flow":
        return stages
    return tuple(
        Sample(each.solver, each.options) if isinstance(each, Sample) else each for each in stages
    )


def _scoring(env: str, clone: Clone, **changes: Any) -> Scoring:
    scoring = OF_A_FOLDER if env == "ImageFolder" else SCORING
    return replace(scoring, conditional=clone.conditional, **changes)


def _study(env: str, of: str, clone: Clone | None = None) -> Study:
    clone = clone or NETWORKS[env]
    chains: dict[str, tuple[Stage, ...]] = {label: (each,) for label, each in SOLVERS.items()}
    contenders = tuple(
        Contender(label, (clone, Guide(w), *at_own_times(clone, stages)), f"w = {w:g}", (env,))
        for w in GUIDANCES
        for label, stages in (chains | LEARNED).items()
    )
    return Study(
        f"Guided {of} in 5 and 10 calls: solvers and what is learned",
        Grid((env,), contenders, (5, 10), (0,), _scoring(env, clone)),
        ("evaluations", "error", *_columns(env)),
    )


def _fine_tuned(env: str, of: str, clone: Clone | None = None) -> Study:
    """Return the study of fine-tuning at guidance 1 and 2, against where it starts."""
    clone = clone or NETWORKS[env]
    fine = COARSE_GRAIN if env == "Digits" else FINE_GRAIN
    learners = {
        "sft": (fine, fine_tune("sft", 0)),
        "sft, half mismatched": (fine, fine_tune("sft", 0, mismatched=0.5)),
    }
    if env != "ImageFolder":  # where they have presets of their own
        learners |= {name: (COARSE_GRAIN, fine_tune(name, 0)) for name in ("sft-v", "sft-pg")}
    contenders = tuple(
        Contender(f"{label}, w = {w:g}", (clone, Guide(w), *at_own_times(clone, stages)))
        for label, stages in learners.items()
        for w in (1.0, 2.0)
    )
    scoring = _scoring(env, clone, held_out=0, before=True)
    title = f"Fine-tuning a conditional sampler of {of}"
    return Study(title, Grid((env,), contenders, (5, 10), (0, 1, 2), scoring), _columns(env))


STUDIES = {
    "guidance": _study("Digits", "digits"),
    "guidance-fashion": _study("FashionMNIST", "Fashion-MNIST"),
    "guidance-mnist": _study("MNIST", "MNIST"),
    "guidance-folder": _study("ImageFolder", "pictures of your sub-folders"),
    "guidance-captions": _study("ImageFolder", "pictures of your captions", BY_CAPTION),
    "guided-sft": _fine_tuned("Digits", "digits"),
    "guided-sft-fashion": _fine_tuned("FashionMNIST", "Fashion-MNIST"),
    "guided-sft-mnist": _fine_tuned("MNIST", "MNIST"),
    "guided-sft-folder": _fine_tuned("ImageFolder", "pictures of your sub-folders"),
    "guided-sft-captions": _fine_tuned("ImageFolder", "pictures of your captions", BY_CAPTION),
}
