"""Schedules without gradients: exact dynamic programmes over a fine grid of levels.

They choose T of M grid levels, the first and the last among them, so that a sum of costs, one for
each pair of neighbours, is least.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from .levels import check_levels
from .rollout import Path, chunk_size, path_of


def cheapest_path(cost: np.ndarray, nodes: int) -> list[int]:
    """Choose `nodes` of M indices, 0 and M - 1 among them, whose steps cost least in sum.

    Args:
        cost: (M, M), cost[i, j] of a step from i to j > i; the rest is not read.
        nodes: how many, 2 to M.

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
    for _ in range(nodes - 2):
        through = best[:, None] + steps
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
    cost: Tensor | float = 0.0
    size = chunk_size(2 * (teacher.steps + 1), noise)
    for first in range(0, len(noise), size):
        rows = slice(first, first + size)
        run = path_of(teacher, denoiser.at(rows), noise[rows])
        cost = cost + _jump_errors(run) / len(noise)
    assert isinstance(cost, Tensor)
    return cheapest_levels(run.levels, cost.cpu().numpy(), count)


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


def cheapest_levels(grid: Tensor, cost: np.ndarray, count: int) -> Tensor:
    """Return the `count` levels (T,) of a descending grid (M,) whose steps cost least in sum."""
    levels = grid[cheapest_path(cost, count)]
    check_levels(levels)
    return levels
