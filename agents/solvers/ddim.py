"""DDIM, the first-order solver, with its stochastic generalisation (MATH.md 1.1)."""

from __future__ import annotations

from typing import get_args

import numpy as np

from ...envs.names import unknown_name
from ...envs.schedule import Schedule
from ..tableau import Output, Tableau, one_step_tableau


def ddim(schedule: Schedule, eta: float = 0.0, output: Output = "epsilon") -> Tableau:
    """Build DDIM (Song et al. 2021): exact when the network's output is constant over the step.

        x_s = alpha_s D + sqrt(sigma_s^2 - std^2) epsilon + std noise

    with std = eta * (posterior standard deviation of the transition), and D and epsilon the
    predicted clean sample and noise, each of which gives the other.

    Args:
        schedule: the times, K + 1 of them; it may end at 0 (clean data).
        eta: 0 is deterministic DDIM, 1 is DDPM ancestral sampling with the small variance.
        output: what the table is written in, the same sampler either way; D-ODE takes differences
            of these outputs.

    Raises:
        ValueError: eta outside [0, 1], or unknown output.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    if output not in get_args(Output):
        raise unknown_name("output", output, get_args(Output))
    alpha, sigma = schedule.levels()
    ratio = alpha[1:] / alpha[:-1]
    beta = sigma[:-1] ** 2 - (sigma[1:] / ratio) ** 2
    std = eta * np.sqrt(beta) * sigma[1:] / sigma[:-1]
    kept = np.sqrt(sigma[1:] ** 2 - std**2)
    if output == "epsilon":
        scale, weight = ratio, kept - sigma[:-1] * ratio
    else:
        scale = kept / sigma[:-1]
        weight = alpha[1:] - alpha[:-1] * scale
    return one_step_tableau(
        "ddim" if eta == 0 else f"ddim (eta {eta:g})",
        schedule.process,
        schedule.times.numpy(),
        scale=scale,
        weight=weight,
        noise=std,
        output=output,
    )
