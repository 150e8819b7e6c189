"""What a state that is nearly noise says itself, where the network is not asked (MATH.md 1.19)."""

from __future__ import annotations

from torch import Tensor

from ...envs.processes import NoiseProcess
from .tableau_checks import Output


def guessed_output(
    process: NoiseProcess, output: Output, state: Tensor, t: float | Tensor
) -> Tensor:
    """Return epsilon = z / sqrt(alpha^2 + sigma^2) of a state z, or the D that follows from it.

    Args:
        process: the noise process.
        output: "epsilon", or "sample" for D.
        state: z (N, *shape).
        t: its time, a number or a tensor () that may require a gradient.
    """
    alpha: float | Tensor
    sigma: float | Tensor
    if isinstance(t, Tensor):
        alpha, sigma = process.alpha(t).to(state), process.sigma(t).to(state)
    else:
        alpha, sigma = process.levels(t)
    length = (alpha**2 + sigma**2) ** 0.5
    if output == "epsilon":
        return state / length
    # (z - sigma epsilon) / alpha, without its cancellation.
    return state * (alpha / (length * (length + sigma)))
