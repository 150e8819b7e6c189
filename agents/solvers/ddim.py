"""DDIM, the first-order solver, with its stochastic generalisation (MATH.md 1.1)."""

from __future__ import annotations

import numpy as np

from ...common.arguments import checked
from ...envs.schedules import Schedule
from ..samplers.tableau import Output, Tableau
from .rows import one_step_tableau


@checked
def ddim(
    schedule: Schedule, eta: float = 0.0, output: Output = "epsilon", clip: bool = False
) -> Tableau:
    """Build DDIM (Song et al. 2021): exact when the network's output is constant over the step.

        x_s = alpha_s D + sqrt(sigma_s^2 - std^2) epsilon + std noise

    with std = eta * (posterior standard deviation of the transition), and D and epsilon the
    predicted clean sample and noise, each of which gives the other.

    Args:
        schedule: the times, K + 1 of them; it may end at 0 (clean data).
        eta: 0 is deterministic DDIM, 1 is DDPM ancestral sampling with the small variance.
        output: what the table is written in, the same sampler either way; D-ODE takes differences
            of these outputs.
        clip: clamp D to [-1, 1], but not epsilon (MATH.md 1.11, for data in [-1, 1]); such a table
            is always written in D.

    Raises:
        ValueError: eta outside [0, 1], or unknown output.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    choices = [f"eta {eta:g}"] * (eta != 0) + ["clipped"] * clip
    name = f"ddim ({', '.join(choices)})" if choices else "ddim"
    return first_order(name, schedule, schedule.levels(), eta, "sample" if clip else output, clip)


def first_order(
    name: str,
    schedule: Schedule,
    levels: tuple[np.ndarray, np.ndarray],
    eta: float,
    output: Output = "epsilon",
    clip: bool = False,
) -> Tableau:
    """Build DDIM's formula from levels that need not be the process's own.

    Args:
        name: of the table.
        schedule: the times.
        levels: alpha and sigma at them, (K + 1,) each.
        eta: 0 to 1.
        output: "sample" if `clip`.
        clip: clamp D.
    """
    alpha, sigma = levels
    if alpha[0] == 0:
        # Without signal the predicted noise says nothing of the clean sample.
        output = "sample"
    with np.errstate(divide="ignore"):
        ratio = alpha[1:] / alpha[:-1]
    beta = sigma[:-1] ** 2 - (sigma[1:] / ratio) ** 2
    std = eta * np.sqrt(beta) * sigma[1:] / sigma[:-1]
    kept = np.sqrt(sigma[1:] ** 2 - std**2)
    clipped = None
    if output == "epsilon":
        scale, weight = ratio, kept - sigma[:-1] * ratio
    else:
        scale = kept / sigma[:-1]
        weight = alpha[1:] - alpha[:-1] * scale
    if clip:
        # The noise stays that of D as it was: epsilon = (x - alpha D) / sigma.
        weight, clipped = -alpha[:-1] * scale, alpha[1:]
    return one_step_tableau(
        name,
        schedule.process,
        schedule.times.numpy(),
        scale=scale,
        weight=weight,
        noise=std,
        output=output,
        clipped=clipped,
    )
