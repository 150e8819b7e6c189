"""How much a sampler magnifies the rounding of float64, for tests that compare two orders of it."""

import dataclasses

import numpy as np
import torch


def rounding(table, denoiser, noise):
    """How far two orders of a table's sums may end apart, as a share of the finished samples.

    Every number of the table is moved by a random share of 1e-7, which shows how much the sampler
    magnifies a relative error of its terms. Each term is rounded about twice in each order; the
    factor 50 covers that, and that a few draws do not find the worst direction.
    """
    source, moves = np.random.default_rng(0), []
    finished = table.sample(denoiser, noise)
    for _ in range(4):
        scale, weights = (
            values * (1 + 1e-7 * source.choice([-1, 1], values.shape))
            for values in (table.scale, table.weights)
        )
        moved = dataclasses.replace(table, scale=scale, weights=weights)
        moves.append(float((moved.sample(denoiser, noise) - finished).abs().max()))
    scale = max(1.0, float(finished.abs().max()))
    return 50 * torch.finfo(torch.float64).eps * max(moves) / 1e-7 / scale
