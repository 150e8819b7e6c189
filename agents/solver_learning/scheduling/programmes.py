"""Schedules without gradients: exact dynamic programmes over a fine grid of levels.

They choose T of M grid levels, the first and the last among them, so that a sum of costs, one for
each pair of neighbours, is least.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from .levels import check_levels
from .rollout import Path, chunk_size, path_of

# GITS's factor on the cost of each step after another.
CHORD_GROWTH = 1.15


def cheapest_path(cost: np.ndarray, nodes: int, growth: float = 1.0) -> list[int]:
    """Choose `nodes` of M indices, 0 and M - 1 among them, whose steps cost least in sum.

    Args:
        cost: (M, M), cost[i, j] of a step from i to j > i; the rest is not read.
        nodes: how many, 2 to M.
        growth: factor by which the cost of each step counts more than that of the step before.

    Returns:
        The indices, ascending.

    Raises:
        ValueError: fewer than 2 nodes or more than there are.
    """
    size = len(cost)
    if not 2 <= nodes <= size:
        raise ValueError(f"A path needs 2 to {size} nodes, the grid's; got {nodes}.")
    steps = np.where(np.triu(np.ones_like(cost, dtype=bool), 1), cost, np.inf)
    best, origins = steps[0], []
    for step in range(1, nodes - 1):
        through = best[:, None] + growth**step * steps
        origins.append(through.argmin(0))
        best = through.min(0)
    path = [size - 1]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return [0, *reversed(path)]


def trajectory_programme(teacher: Tableau, denoiser: Denoiser, noise: Tensor, count: int) -> Tensor:
    """Find the nodes of a teacher's trajectories between which Euler's jumps err least.

    A jump from node i to node j starts on the teacher's trajectory and costs its mean squared
    distance from it at the end, ||x_i + (l_j / l_i - 1)(x_i - D_i) - x_j||^2, in EDM's units. All
    costs follow from one run of the teacher.

    Args:
        teacher: a deterministic solver with one network call a step, whose times are the grid.
        denoiser: the network.
        noise: (N, *shape) initial states.
        count: T, how many nodes to keep, at least 3.

    Returns:
        (T,) descending levels: those of the nodes kept, without a last step to 0.
    """
    levels, cost = _mean_cost(_jump_errors, 2, teacher, denoiser, noise)
    return cheapest_levels(levels, cost, count)


def chord_programme(teacher: Tableau, denoiser: Denoiser, noise: Tensor, count: int) -> Tensor:
    """Find nodes as GITS does (Chen et al. 2024): by how jumps leave the trajectories' chords.

    A trajectory's chord is the line through its first and its last state, and nearly all of its
    shape lies in its distance from that. A jump from node i to node j starts on the trajectory and
    costs the distance of its end from the chord less that of the trajectory's node j, the mean over
    samples, in EDM's units. Each step counts `CHORD_GROWTH` times as much as the one before.

    Args:
        teacher: see `trajectory_programme`, as for the other arguments and what is returned.
        denoiser: the network.
        noise: (N, *shape) initial states.
        count: T, how many nodes to keep, at least 3.
    """
    levels, cost = _mean_cost(chord_deviations, 4, teacher, denoiser, noise)
    return cheapest_levels(levels, cost, count, CHORD_GROWTH)


def _mean_cost(
    cost_of: Callable[[Path], Tensor],
    copies: int,
    teacher: Tableau,
    denoiser: Denoiser,
    noise: Tensor,
) -> tuple[Tensor, np.ndarray]:
    """Return a teacher's levels, and the mean over noises of what jumps between them cost.

    Args:
        cost_of: the sum over a path's samples, (M, M).
        copies: how many arrays of a path's size that takes at once.
        teacher: see `trajectory_programme`, as for the other arguments.
        denoiser: the network.
        noise: (N, *shape) initial states.
    """
    cost: Tensor | float = 0.0
    size = chunk_size(copies * (teacher.steps + 1), noise)
    for first in range(0, len(noise), size):
        rows = slice(first, first + size)
        run = path_of(teacher, denoiser.at(rows), noise[rows])
        cost = cost + cost_of(run) / len(noise)
    assert isinstance(cost, Tensor)
    return run.levels, cost.cpu().numpy()


def chord_deviations(run: Path) -> Tensor:
    """Return how much farther from the chord Euler's jumps from i end than nodes j > i lie, (T, T).

    Summed over samples.
    """
    levels = run.levels
    states = torch.stack([state.flatten(1).double() for state in run.states])  # (T, N, D)
    slopes = (states[:-1] - torch.stack([out.flatten(1).double() for out in run.outputs])) / (
        levels[:-1, None, None].to(states)
    )
    chord = states[0] - states[-1]
    along = chord / chord.norm(dim=1, keepdim=True)
    # Both without what lies along the chord.
    states = states - states[-1]
    states = states - (states * along).sum(2, keepdim=True) * along
    slopes = slopes - (slopes * along).sum(2, keepdim=True) * along
    cost = torch.zeros(len(levels), len(levels), dtype=states.dtype, device=states.device)
    own = states.norm(dim=2).sum(1)
    for i, slope in enumerate(slopes):
        gaps = (levels[i + 1 :] - levels[i]).to(states)
        ends = states[i] + gaps[:, None, None] * slope
        cost[i, i + 1 :] = ends.norm(dim=2).sum(1) - own[i + 1 :]
    return cost


def _jump_errors(run: Path) -> Tensor:
    """Return the squared errors (T, T), summed over samples, of Euler's jumps from i to j > i."""
    levels = run.levels
    flat = torch.stack([state.flatten().double() for state in run.states])
    slopes = [
        (state - output).flatten().double() / level
        for state, output, level in zip(run.states, run.outputs, levels.tolist(), strict=False)
    ]
    slope = torch.stack([*slopes, torch.zeros_like(slopes[0])])  # no jump starts at the last node
    # With the slope e_i = (x_i - D_i) / l_i the squared error of a jump expands into products.
    gap = (levels[None, :] - levels[:, None]).to(flat.device)
    squares = flat.square().sum(1)
    apart = squares[:, None] + squares[None, :] - 2 * flat @ flat.T
    along = (slope * flat).sum(1)[:, None] - slope @ flat.T
    return apart + 2 * gap * along + gap.square() * slope.square().sum(1)[:, None]


def cheapest_levels(grid: Tensor, cost: np.ndarray, count: int, growth: float = 1.0) -> Tensor:
    """Return the `count` levels (T,) of a descending grid (M,) whose steps cost least in sum."""
    levels = grid[cheapest_path(cost, count, growth)]
    check_levels(levels)
    return levels
