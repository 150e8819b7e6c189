"""Dynamic programmes that see what becomes of an error: how later steps shrink it or let it grow.

A jump to node j of a teacher's trajectory costs what is left of its error e at the end. To first
order that is J_j e, with J_j the Jacobian of the flow from node j to the end. For random signs u
E||J_j e||^2 = E(w_j . e)^2 with w_j = J_j^T u, so one pass of the adjoint gives what is needed of
all nodes, and inner products with the trajectory's states and outputs give the costs of all jumps.

The jumps are the solver's: Euler's, or where it reads several outputs those of second order, which
extrapolate the output from the node before. Costs then belong to triples of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Output, Tableau
from .levels import check_levels
from .programmes import cheapest_path
from .rollout import Path, chunk_size, path_of


def amplified_programmes(
    teacher: Tableau,
    output: Output,
    denoiser: Denoiser,
    noise: Tensor,
    orders: Sequence[int],
    generator: torch.Generator,
) -> list[Tensor]:
    """Find nodes of a teacher's trajectories between which jumps leave least error at the end.

    The first order holds for small errors only. On a trajectory near the border of two modes, or of
    a network that is rough in its sample, w_j can be huge where the error itself soon saturates. So
    there are two answers: with w_j as they are, and with none longer than the samples' median one.

    Args:
        teacher: a deterministic solver with one network call a step, whose times are the grid.
        output: which of the network's outputs the solver extrapolates.
        denoiser: the network; differentiable in its sample.
        noise: (N, *shape) initial states.
        orders: (T - 1,) how many outputs the solver reads in each jump: of 1 the jump is Euler's.
        generator: source of u.

    Returns:
        Both answers, (T,) descending levels each: those of the nodes kept, without a last step to
        0; none if an adjoint is not finite.
    """
    count = int((teacher.times > 0).sum())
    multistep = max(orders) > 1
    costs = [_Costs(count, multistep), _Costs(count, multistep)]
    portion = chunk_size(6 * (teacher.steps + 1), noise)
    chunks, sizes = [], []
    for first in range(0, len(noise), portion):
        rows = slice(first, first + portion)
        part, chunk = denoiser.at(rows), noise[rows]
        run = path_of(teacher, part, chunk)
        signs = torch.empty_like(chunk).bernoulli_(0.5, generator=generator)
        adjoint = adjoints(run, teacher.times, part, 2 * signs - 1)
        if not adjoint.isfinite().all():
            return []
        # Kept instead of the states: the median is that of all samples, of which a chunk may hold
        # one, and the size of these does not depend on that of a sample.
        chunks.append(_Products.of(run, adjoint))
        sizes.append(adjoint.norm(dim=2, keepdim=True))
    median = torch.cat(sizes).median(0, keepdim=True).values
    for products, size in zip(chunks, sizes, strict=True):
        shorter = (median / size).nan_to_num(1.0).clamp(max=1.0)
        share = len(size) / len(noise)
        for cost, seen in zip(costs, (products, products.scaled(shorter)), strict=True):
            cost.add(run.levels, output, seen, share)
    found = []
    for cost in costs:
        levels = run.levels[cost.cheapest(orders)]
        check_levels(levels)
        found.append(levels)
    return found


def adjoints(run: Path, times: np.ndarray, denoiser: Denoiser, end: Tensor) -> Tensor:
    """Return w_j = J_j^T u of all T nodes of trajectories, (N, T, D) float64.

    Args:
        run: trajectories on a grid so fine that Euler's steps follow them.
        times: of its states.
        denoiser: the network; differentiable in its sample.
        end: (N, *shape) u.
    """
    weights, weight = [end], end
    for i in reversed(range(len(run.states) - 1)):
        share = float(run.levels[i + 1] / run.levels[i])
        state = run.states[i].detach().requires_grad_()
        with torch.enable_grad():
            # At the very time: some networks know whole ones only.
            t = float(times[i])
            answer = denoiser.denoised(float(denoiser.process.alpha(t)) * state, t)
        pulled = None
        if answer.requires_grad:
            (pulled,) = torch.autograd.grad(answer, state, weight, allow_unused=True)
        weight = share * weight + (0.0 if pulled is None else (1 - share) * pulled)
        weights.append(weight)
    return torch.stack([weight.flatten(1).double() for weight in reversed(weights)], dim=1)


class _Products(NamedTuple):
    """What the costs of jumps are made of.

    Attributes:
        states: (N, j, i) float64 inner products of w_j with the trajectories' states.
        slopes: likewise with their derivatives by the level.
    """

    states: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, run: Path, adjoint: Tensor) -> _Products:
        """Return the products of w (N, T, D) along trajectories."""
        levels = run.levels.to(adjoint.device)
        states = torch.stack([state.flatten(1).double() for state in run.states], dim=1)
        # No jump starts at the last node.
        outputs = [*run.outputs, run.states[-1]]
        denoised = torch.stack([answer.flatten(1).double() for answer in outputs], dim=1)
        slopes = (states - denoised) / levels[:, None]
        return cls(adjoint @ states.mT, adjoint @ slopes.mT)

    def scaled(self, factors: Tensor) -> _Products:
        """Return those of w_j times factors (N, j, 1)."""
        return _Products(factors * self.states, factors * self.slopes)


class _Costs:
    """What jumps between M nodes leave at the end, mean squares of w_j . e.

    Attributes:
        first: (M, M), of Euler's jump from i to j > i.
        second: (M, M, M), of the jump of second order from i to j that reads h < i; None if none.
    """

    def __init__(self, nodes: int, multistep: bool) -> None:
        self.first = np.zeros((nodes, nodes))
        self.second = np.zeros((nodes, nodes, nodes)) if multistep else None

    def add(self, levels: Tensor, output: Output, products: _Products, share: float) -> None:
        """Add the costs on some trajectories, a share of all."""
        along_states, along_slopes = products  # (N, j, i), as all that follows
        levels = levels.to(along_states.device)
        arrived = along_states.diagonal(dim1=1, dim2=2)[:, :, None]
        missed = along_states + (levels[:, None] - levels[None, :]) * along_slopes - arrived
        self.first += share * missed.square().mean(0).T.cpu().numpy()
        if self.second is None:
            return
        read = along_slopes
        if output != "epsilon":
            # Of the denoised samples, x - level * slope.
            read = along_states - levels * along_slopes
        reach, distance = _extrapolation(levels, output)
        for j in range(2, len(levels)):
            error, seen = missed[:, j, :j], read[:, j, :j]
            both, squares = error.T @ seen / len(seen), seen.T @ seen / len(seen)
            # Means of error_i (O_i - O_h) and of (O_i - O_h)^2, both (h, i).
            mixed = both.diagonal()[None, :] - both.T
            change = squares.diagonal()[None, :] + squares.diagonal()[:, None] - 2 * squares
            factor = reach[:j, j][None, :] / distance[:j, :j].triu(1)
            factor = torch.where(distance[:j, :j].triu(1) > 0, factor, 0.0)
            own = error.square().mean(0)[None, :]
            cost = own + 2 * factor * mixed + factor.square() * change
            self.second[:j, :j, j] += share * cost.clamp_min(0).cpu().numpy()

    def cheapest(self, orders: Sequence[int]) -> list[int]:
        """Return the nodes of the cheapest path of len(orders) jumps from the first to the last."""
        if self.second is None:
            return cheapest_path(self.first, len(orders) + 1)
        ascending = np.triu(np.ones_like(self.first, dtype=bool), 1)
        first = np.where(ascending, self.first, np.inf)
        second = np.where(ascending[:, :, None] & ascending[None], self.second, np.inf)
        # best[h, i]: the least cost of a path that ends with the jump from h to i.
        best = np.full_like(first, np.inf)
        best[0] = first[0]
        origins = []
        for order in orders[1:]:
            through = best[:, :, None] + (second if order > 1 else first[None])
            origins.append(through.argmin(0))
            best = through.min(0)
        path = [int(best[:, -1].argmin()), len(first) - 1]
        for origin in reversed(origins):
            path.insert(0, int(origin[path[0], path[1]]))
        return path


def _extrapolation(levels: Tensor, output: Output) -> tuple[Tensor, Tensor]:
    """Return (M, M) r and d so that a jump adds r_ij / d_hi (O_i - O_h) to Euler's.

    Noise is extrapolated in the level, denoised samples in its logarithm (DPM-Solver++ 2M).
    """
    start, end = levels[:, None], levels[None, :]
    if output == "epsilon":
        # Levels fall: the distance is taken upwards, to be > 0.
        return -(end - start).square() / 2, start - end
    distance = (start / end).log()
    return (1 - end / start) * distance / 2, distance
