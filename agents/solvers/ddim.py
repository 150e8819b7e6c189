"""DDIM, the first-order solver, with its stochastic generalisation (MATH.md 1.1)."""

from __future__ import annotations

import numpy as np

from ...envs.schedule import Schedule
from ..tableau import Tableau, one_step_tableau


def ddim(schedule: Schedule, eta: float = 0.0) -> Tableau:
    """Build DDIM in noise prediction: exact when the predicted noise is constant over the step.

        x_s = a x_t + [sqrt(sigma_s^2 - std^2) - a sigma_t] epsilon + std noise

    with a = alpha_s / alpha_t, std = eta * (posterior standard deviation of the transition).

    Args:
        schedule: the times, K + 1 of them; it may end at 0 (clean data).
        eta: 0 is deterministic DDIM, 1 is DDPM ancestral sampling with the small variance.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    alpha, sigma = schedule.levels()
    scale = alpha[1:] / alpha[:-1]
    beta = sigma[:-1] ** 2 - (sigma[1:] / scale) ** 2
    std = eta * np.sqrt(beta) * sigma[1:] / sigma[:-1]
    weight = np.sqrt(sigma[1:] ** 2 - std**2) - sigma[:-1] * scale
    name = "ddim" if eta == 0 else f"ddim (eta {eta:g})"
    return one_step_tableau(
        name, schedule.process, schedule.times.numpy(), scale=scale, weight=weight, noise=std
    )
