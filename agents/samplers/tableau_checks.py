"""What a tableau's arrays have to fulfil."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch

from ...common.names import unknown_name
from ...envs.processes import NoiseProcess
from .sparse import NOT_LOWER, SparseRows

Output = Literal["epsilon", "sample"]
# What the optional arrays hold where they say nothing.
DEFAULTS: dict[str, float | bool] = {
    "current": 0.0,
    "clipped": 0.0,
    "covariance": 0.0,
    "cap": math.inf,
    "asked": True,
}
ARRAYS = ("times", "scale", "noise", "anchors", *DEFAULTS)


def check_arrays(arrays: Mapping[str, np.ndarray], weights: SparseRows, output: str) -> None:
    """Raise ValueError unless the arrays make a table: see `Tableau`.

    Args:
        arrays: those of `ARRAYS`, by name.
        weights: K x K, of which the shape is checked already.
        output: what the weights are of.
    """
    steps = len(arrays["scale"])
    for name, value in arrays.items():
        shape = (steps + 1,) if name == "times" else (steps,)
        if value.shape != shape:
            raise ValueError(f"Tableau.{name} has shape {value.shape}, expected {shape}.")
        # An infinite cap is none.
        if not np.isfinite(value[value != np.inf] if name == "cap" else value).all():
            raise ValueError(f"Tableau.{name} holds NaN or infinite numbers.")
    if not np.isfinite(weights.values).all():
        raise ValueError("Tableau.weights holds NaN or infinite numbers.")
    if (weights.columns > weights.rows).any() or (weights.columns < 0).any():
        raise ValueError(NOT_LOWER)
    if (arrays["noise"] < 0).any():
        raise ValueError("Tableau.noise holds negative standard deviations.")
    for name in ("covariance", "cap"):
        if (arrays[name] < 0).any():
            raise ValueError(f"Tableau.{name} holds negative numbers.")
    if output not in get_args(Output):
        raise unknown_name("tableau output", output, get_args(Output))
    if output != "sample" and arrays["clipped"].any():
        raise ValueError(
            "Tableau.clipped weighs predicted clean samples: it needs output 'sample', not "
            f"{output!r}."
        )
    if arrays["covariance"][~arrays["asked"]].any():
        raise ValueError(
            "Tableau.covariance comes from the network: it must be 0 in a step that is not asked."
        )
    anchors, own = arrays["anchors"], np.arange(steps)
    if ((anchors < 0) | (anchors > own)).any():
        raise ValueError("Tableau.anchors must point to states that exist: 0 <= a(j) <= j.")
    if arrays["current"][anchors == own].any():
        raise ValueError(
            "Tableau.current must be 0 where the anchor is the current state: use scale there."
        )


def check_times(times: np.ndarray, process: NoiseProcess) -> None:
    """Raise ValueError for times (K + 1,) outside a process, or without noise before the last."""
    if times.min() < 0 or times.max() > process.t_max:
        raise ValueError(f"Tableau.times must lie in [0, {process.t_max}].")
    if not bool((process.sigma(torch.from_numpy(times[:-1].copy())) > 0).all()):
        raise ValueError(
            "Tableau.times must have noise but for the last: no network is asked about clean "
            "samples."
        )


def check_asked_times(told: np.ndarray, times: np.ndarray, process: NoiseProcess) -> None:
    """Raise ValueError for times (K,) that a denoiser cannot be told about states at `times`."""
    if told.shape != times[:-1].shape:
        raise ValueError(
            f"Tableau.asked_times has shape {told.shape}, expected {times[:-1].shape}."
        )
    if not np.isfinite(told).all() or told.min() <= 0 or told.max() > process.t_max:
        raise ValueError(f"Tableau.asked_times must lie in (0, {process.t_max}].")


def check_asked(
    asked: np.ndarray, times: np.ndarray, told: np.ndarray, process: NoiseProcess
) -> None:
    """Raise ValueError for a step that is not asked where no signal is left, or of another time."""
    for time, other in zip(times[:-1][~asked].tolist(), told[~asked].tolist(), strict=True):
        if time != other:
            raise ValueError(
                "Tableau.asked_times must be those of the states in steps that are not asked: no "
                "denoiser is told them."
            )
        if process.levels(time)[0] == 0:
            raise ValueError(
                f"No signal is left at time {time:g} of {process!r}: the network must be asked "
                "there, since the state says nothing of the clean sample (afs does without it)."
            )
