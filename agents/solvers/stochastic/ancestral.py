"""Ancestral sampling on any sub-sequence of times: DDPM's and Euler's (MATH.md 1.2)."""

from __future__ import annotations

import numpy as np

from ....common.arguments import checked
from ....envs.schedules import Schedule
from ...denoisers.denoiser import Variance
from ...samplers.tableau import Tableau
from ..ddim import ddim
from ..rows import one_step_tableau, with_last_std


@checked
def ancestral(
    schedule: Schedule,
    variance: Variance = "small",
    last_std: float | None = None,
    clip: bool = False,
) -> Tableau:
    """Build the Gaussian reverse chain whose mean is the posterior mean of q(x_s | x_t, x_0).

    From time t to the next time s, with beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 the
    variance that the process adds between them,

        x_s = (alpha_s / alpha_t) (x_t - (beta / sigma_t) epsilon) + std * noise
            = (alpha_t / alpha_s) (sigma_s / sigma_t)^2 x_t + (alpha_s beta / sigma_t^2) D + ...

    Args:
        schedule: the times, K + 1 of them.
        variance: "small" is the posterior variance (sigma_s / sigma_t)^2 beta, "large" is beta;
            both add no noise on the last transition to clean data. "beta" is beta on every
            transition, the last one included, so that every transition has a density (the toys of
            Fan & Lee 2023).
        last_std: standard deviation of the last transition, if it is to differ.
        clip: clamp the predicted clean sample D to [-1, 1] in the second form, as DDPM does on
            images; it changes samples of few steps strongly.

    Raises:
        ValueError: unknown variance, or a negative or non-finite `last_std`.
    """
    alpha, sigma = schedule.levels()
    ratio = alpha[:-1] / alpha[1:]
    beta = sigma[:-1] ** 2 - (ratio * sigma[1:]) ** 2
    std = np.sqrt(beta)
    if variance == "small":
        std *= sigma[1:] / sigma[:-1]
    if variance == "large" and sigma[-1] == 0:
        std[-1] = 0.0
    zeros = np.zeros_like(std)
    # Without signal at the first time the predicted noise says nothing of D.
    in_data = clip or alpha[0] == 0
    if in_data:
        scale, weight = ratio * (sigma[1:] / sigma[:-1]) ** 2, alpha[1:] * beta / sigma[:-1] ** 2
        weight, clipped = (zeros, weight) if clip else (weight, zeros)
    else:
        scale, weight, clipped = 1 / ratio, -beta / (ratio * sigma[:-1]), zeros
    table = one_step_tableau(
        f"ancestral ({variance}{', clipped' if clip else ''})",
        schedule.process,
        schedule.times.numpy(),
        scale=scale,
        weight=weight,
        noise=std,
        output="sample" if in_data else "epsilon",
        clipped=clipped,
    )
    return with_last_std(table, last_std)


@checked
def euler_ancestral(schedule: Schedule, eta: float = 1.0) -> Tableau:
    """Build k-diffusion's Euler ancestral: an Euler step too far, and noise back up to the level.

    With rho = sigma / alpha and xbar = x / alpha, the step from rho_t to rho_s is

        up = eta (rho_s / rho_t) sqrt(rho_t^2 - rho_s^2),    down = sqrt(rho_s^2 - up^2),
        xbar_s = xbar_t + (down - rho_t) epsilon + up noise = D + down epsilon + up noise

    which times alpha_s is `ddim` with this eta, whose standard deviation is alpha_s up; with eta 1
    it is `ancestral` with the small variance. So this is a name, in data prediction as `euler`.

    Args:
        schedule: the times; it may end at 0.
        eta: 0 is `euler`, 1 is DDPM ancestral sampling with the small variance.

    Raises:
        ValueError: eta outside [0, 1].
    """
    name = "euler-ancestral" + (f" (eta {eta:g})" if eta != 1 else "")
    return ddim(schedule, eta, output="sample").replace(name=name)
