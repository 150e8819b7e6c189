"""The exact moments of a stochastic sampler's samples, on Gaussian data: its denoiser is affine."""

from __future__ import annotations

import numpy as np
import torch

from fewstep.agents import Denoiser, Tableau


def moments(
    table: Tableau, denoiser: Denoiser, mean: float = 0.0, std: float = 1.0
) -> tuple[float, float]:
    """Return the mean and the standard deviation of the last state, from those of the first.

    It is affine in the first state and in the noise of each step: one run without noise, one of the
    first state's deviation, and one of each step's noise tell how.
    """
    states = torch.full((table.steps + 2, 1), mean, dtype=torch.float64)
    states[1] += std

    def transition(_state, moved, j):
        moved = moved.clone()
        moved[j + 2] += table.noise[j]
        return moved

    still = table.replace(noise=np.zeros(table.steps))
    with torch.no_grad():
        ends = still.sample(denoiser, states, transition=transition)
    return float(ends[0]), float((ends[1:] - ends[0]).norm())
