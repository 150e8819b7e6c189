"""DDPM ancestral sampling on any sub-sequence of times (MATH.md 1.2)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from ...envs.names import unknown_name
from ...envs.schedule import Schedule
from ..tableau import Tableau, one_step_tableau

Variance = Literal["small", "large", "beta"]


def ancestral(
    schedule: Schedule, variance: Variance = "small", last_std: float | None = None
) -> Tableau:
    """Build the Gaussian reverse chain whose mean is the posterior mean of q(x_s | x_t, x_0).

    From time t to the next time s, with beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 the
    variance that the process adds between them,

        x_s = (alpha_s / alpha_t) (x_t - (beta / sigma_t) epsilon) + std * noise

    Args:
        schedule: the times, K + 1 of them.
        variance: "small" is the posterior variance (sigma_s / sigma_t)^2 beta, "large" is beta;
            both add no noise on the last transition to clean data. "beta" is beta on every
            transition, the last one included, so that every transition has a density (paper A's
            toys).
        last_std: standard deviation of the last transition, if it is to differ.

    Raises:
        ValueError: unknown variance, or a negative or non-finite `last_std`.
    """
    if variance not in get_args(Variance):
        raise unknown_name("variance", variance, get_args(Variance))
    if last_std is not None and not 0 <= last_std < np.inf:
        raise ValueError(f"last_std must be a finite number >= 0, got {last_std}.")
    alpha, sigma = schedule.levels()
    ratio = alpha[:-1] / alpha[1:]
    beta = sigma[:-1] ** 2 - (ratio * sigma[1:]) ** 2
    std = np.sqrt(beta)
    if variance == "small":
        std *= sigma[1:] / sigma[:-1]
    if variance == "large" and sigma[-1] == 0:
        std[-1] = 0.0
    if last_std is not None:
        std[-1] = last_std
    return one_step_tableau(
        f"ancestral ({variance})",
        schedule.process,
        schedule.times.numpy(),
        scale=1 / ratio,
        weight=-beta / (ratio * sigma[:-1]),
        noise=std,
    )
