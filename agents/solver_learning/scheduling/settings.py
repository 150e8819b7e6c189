"""Which settings of `ScheduleLearning` go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from ....common.checks import at_least, not_negative, positive
from ....common.names import unknown_name
from .levels import EVEN
from .starts import ENVIRONMENT, Programme
from .surrogate import Reading
from .tuning import TuningWeights

LevelTarget = Literal["teacher", "data"]
Gradient = Literal["exact", "eq14", "none"]

_NAMES: dict[str, tuple[str, ...]] = {
    "start": (*get_args(Programme), *EVEN, ENVIRONMENT),
    "target": get_args(LevelTarget),
    "gradient": get_args(Gradient),
    "tuning_weights": get_args(TuningWeights),
}
_LEAST = {
    "schedule_rounds": 0,
    "batch_size": 2,
    "batches": 1,
    "tuning_rounds": 0,
    "tuning_batch_size": 1,
    "alternations": 1,
}


def check_settings(
    settings: Mapping[str, Any], solver: str, reading: Reading, has_data: bool
) -> None:
    """Raise ValueError for unknown names, numbers out of range and settings at odds.

    Args:
        settings: the constructor's keyword arguments, `ScheduleLearning.settings`.
        solver: whose schedule is learned.
        reading: of Eq. 14, made of three of the settings.
        has_data: whether the environment has real samples.
    """
    for what, known in _NAMES.items():
        if settings[what] not in known:
            raise unknown_name(what, settings[what], known)
    _check_numbers(settings)
    target, gradient, start = settings["target"], settings["gradient"], settings["start"]
    if settings["tuning_weights"] == "rollout" and target != "teacher":
        raise ValueError("tuning_weights='rollout' needs target='teacher'.")
    if settings["integer_times"] and (gradient != "none" or start in EVEN):
        raise ValueError(
            "integer_times leaves nothing to differentiate: take gradient='none', and start "
            "from a dynamic programme or the environment's schedule."
        )
    if gradient == "eq14":
        if solver not in ("euler", "ddim"):
            raise ValueError(
                f"gradient='eq14' is derived for Euler's steps: take solver='euler' or 'ddim' "
                f"instead of '{solver}', or gradient='exact'."
            )
        if reading.needs_data and target != "data":
            raise ValueError(
                f"residual='{reading.residual}' with network_input='{reading.input}' compares "
                "with real samples: it needs target='data'."
            )
    if not has_data:
        _check_without_data(settings)


def _check_numbers(settings: Mapping[str, Any]) -> None:
    for what, least in _LEAST.items():
        at_least(least, **{what: settings[what]})
    weights = ("gamma", "last_weight", "tolerance", "collapse", "diffusion_weight")
    not_negative(**{what: settings[what] for what in weights})
    rates = ("schedule_learning_rate", "tuning_learning_rate", "max_grad_norm")
    positive(**{what: settings[what] for what in rates})
    in_stage_one = settings["schedule_rounds"] or settings["gradient"] == "none"
    if not in_stage_one and not settings["tuning_rounds"]:
        raise ValueError("There is nothing to do: schedule_rounds and tuning_rounds are both 0.")


def _check_without_data(settings: Mapping[str, Any]) -> None:
    weights = settings["tuning_weights"]
    users = {
        f"tuning_weights='{weights}'": weights != "rollout" and settings["tuning_rounds"],
        "target='data'": settings["target"] == "data",
        "diffusion_weight": settings["diffusion_weight"],
        "start='diffusion-dp'": settings["start"] == "diffusion-dp",
    }
    for what, used in users.items():
        if used:
            raise ValueError(f"{what} needs real samples, and there are none here.")
