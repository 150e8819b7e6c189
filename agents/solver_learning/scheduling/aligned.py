"""Levels of the least bound of a Kullback-Leibler divergence (Sabour et al. 2024; MATH.md 3.11).

"Align Your Steps" bounds the divergence of a sampler that keeps the denoised sample of the last
level, D(x_i, l_i), until the next one, by that of their paths,

    sum over steps i -> j of  int_{l_j}^{l_i} E || D(x_l, l) - D(x_i, l_i) ||^2 dl / l^3,

where x_i is a further noising of x_l. For an exact denoiser the expectation is how much its mean
squared error grows from l to l_i. Finished samples of the network itself are noised, so nothing is
trained and no data are needed; on a grid of levels the best ones are a cheapest path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from .levels import level_of_time
from .programmes import cheapest_levels
from .rollout import chunk_size


def aligned_programme(
    denoiser: Denoiser, times: Tensor, clean: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Find levels of the least bound.

    Args:
        denoiser: the network.
        times: (M,) descending, > 0: the grid to choose from.
        clean: (N, *shape) samples, finished ones or data.
        count: T, how many levels to keep, at least 3.
        generator: source of their noise.

    Returns:
        (T,) descending levels, those of the first and the last time among them.
    """
    levels = level_of_time(denoiser.process, times)
    changes = denoised_changes(denoiser, times, levels, clean, generator)
    return cheapest_levels(levels, bound_of_steps(changes, levels).cpu().numpy(), count)


@torch.no_grad()
def denoised_changes(
    denoiser: Denoiser, times: Tensor, levels: Tensor, clean: Tensor, generator: torch.Generator
) -> Tensor:
    """Return E ||D(x_j, l_j) - D(x_i, l_i)||^2 of all pairs of levels of one noising, (M, M).

    Args:
        denoiser: the network.
        times: (M,) descending.
        levels: (M,) theirs.
        clean: (N, *shape).
        generator: source of the noise.
    """
    # From the clean end on: each level adds to the noise of the one below.
    added = torch.cat([levels.square().flip(0)[:1], levels.square().flip(0).diff()]).sqrt()
    alphas = denoiser.process.alpha(times).flip(0)
    squares: Tensor | float = 0.0
    size = chunk_size(2 * len(times), clean)
    for first in range(0, len(clean), size):
        rows = slice(first, first + size)
        part, state, answers = denoiser.at(rows), clean[rows], []
        for t, step, alpha in zip(
            times.flip(0).tolist(), added.tolist(), alphas.tolist(), strict=True
        ):
            noise = torch.empty_like(state).normal_(generator=generator)
            state = torch.add(state, noise, alpha=step)
            answers.append(part.denoised(alpha * state, t).flatten().double())
        flat = torch.stack(answers[::-1])
        own = flat.square().sum(1)
        squares = squares + (own[:, None] + own[None, :] - 2 * flat @ flat.T) / len(clean)
    assert isinstance(squares, Tensor)
    return squares.clamp_min(0)


def bound_of_steps(changes: Tensor, levels: Tensor) -> Tensor:
    """Return the bound's terms (M, M) of steps from i to j > i, by trapezoids in 1 / l^2.

    Args:
        changes: (M, M), see `denoised_changes`.
        levels: (M,) descending.
    """
    # dl / l^3 = -d(1 / (2 l^2))
    widths = (levels.pow(-2).diff() / 2).to(changes)
    parts = widths * (changes[:, :-1] + changes[:, 1:]) / 2
    sums = torch.cat([torch.zeros_like(parts[:, :1]), parts.cumsum(1)], dim=1)
    return sums - sums.diagonal()[:, None]
