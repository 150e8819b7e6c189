"""Distances between two sets of samples, each reported beside its sampling floor.

`sliced_wasserstein` is the metric of Fan & Lee (2023) and scales to 200,000 samples; `wasserstein`
is the exact one, for a few thousand; `mmd` is the kernel two-sample distance. Inputs are tensors or
arrays (N, *shape), flattened; the arithmetic is float64. One set of real samples does not score 0
against another: `floor` measures what it scores, and below that no sampler can be told from the
truth.

For images, `fid`, `kid` and `precision_recall` (see `fidelity`) compare features, not pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.arguments import as_tensor, at_least, checked
from ..checks import check_finite, check_samples
from ..mmd import distances, kernel_mean, resolve_bandwidth

Samples = Tensor | NDArray
Array = NDArray[np.float64]
Item = TypeVar("Item")
Result = TypeVar("Result")

# Seeds that NumPy knows, which draws the directions.
_SEEDS = 2**32
# Projections handled at once by a thread: 13 MB for 200,000 samples.
_CHUNK = 8


class SlicedWasserstein:
    """Sliced p-Wasserstein distance to one set of real samples, which is projected and sorted once.

        ( mean over directions of W_p(projected samples, projected real samples)^p )^(1/p)

    Bonneel et al. 2015. It costs half of `sliced_wasserstein` when several sets meet the same real
    one. Equal to POT's `sliced_wasserstein_distance` with the same seed, for any two sizes.

    Args:
        real: real samples (M, *shape); kept as n_projections * M float64 numbers.
        p: order, at least 1.
        n_projections: number of random directions.
        seed: of the directions.

    Raises:
        TypeError: a value of another type.
        ValueError: bad samples, p below 1, no projections, or a seed out of range.
    """

    @checked
    def __init__(
        self, real: Samples, p: float = 2, n_projections: int = 100, seed: int = 0
    ) -> None:
        _check_order(p)
        at_least(1, n_projections=n_projections)
        if not 0 <= seed < _SEEDS:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}.")
        points = _points("real", real)
        self.p = p
        self.n_projections = n_projections
        self._shape = points.shape[1:]
        # POT loads SciPy, which takes as long as all the rest of this package.
        from ot.sliced import get_random_projections

        directions = get_random_projections(*self._shape, n_projections, seed).T
        self._directions = np.array_split(directions, -(-n_projections // _CHUNK))
        self._quantiles = _in_threads(lambda part: _quantiles(part, points), self._directions)

    def __call__(self, samples: Samples) -> float:
        """Return the distance of samples (N, *shape) to the real ones.

        Raises:
            ValueError: bad samples, or of another dimension than the real ones.
        """
        points = _points("samples", samples, self._shape)
        ours, theirs, mass = _monotone_plan(len(points), self._quantiles[0].shape[1])

        def cost(part: tuple[Array, Array]) -> float:
            directions, real = part
            gap = _quantiles(directions, points)[:, ours] - real[:, theirs]
            np.abs(gap, out=gap)
            gap **= self.p
            return float((gap @ mass).sum())

        total = sum(_in_threads(cost, zip(self._directions, self._quantiles, strict=True)))
        return (total / self.n_projections) ** (1 / self.p)


@checked
def sliced_wasserstein(
    x: Samples, y: Samples, p: float = 2, n_projections: int = 100, seed: int = 0
) -> float:
    """Return the sliced p-Wasserstein distance of x (N, *shape) and y (M, *shape).

    See `SlicedWasserstein` for the definition, the arguments and the errors.
    """
    a, b = _pair(x, y)
    return SlicedWasserstein(b, p, n_projections, seed)(a)


@checked
def wasserstein(x: Samples, y: Samples, p: float = 1, max_samples: int = 5000) -> float:
    """Return the exact p-Wasserstein distance, Euclidean ground cost, by POT's network simplex.

    Args:
        x: samples (N, *shape).
        y: samples (M, *shape).
        p: order, at least 1.
        max_samples: refuse more on a side: memory grows with N * M, time faster.

    Raises:
        TypeError: a value of another type.
        ValueError: bad samples, p below 1, or more than `max_samples`.
        RuntimeError: the solver gave up before the optimum.
    """
    _check_order(p)
    a, b = _pair(x, y)
    if max(len(a), len(b)) > max_samples:
        raise ValueError(
            f"The exact distance takes at most {max_samples} samples a side, got {len(a)} and "
            f"{len(b)}: pass fewer, raise max_samples, or use sliced_wasserstein."
        )
    from ot import emd2

    cost = distances(torch.from_numpy(a), torch.from_numpy(b)).numpy() ** p
    total, log = emd2([], [], cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"The optimal transport solver failed: {log['warning']}")
    return float(total) ** (1 / p)


@checked
def mmd(x: Samples, y: Samples, kernel: str = "energy", bandwidth: float | None = None) -> float:
    """Return the maximum mean discrepancy, the root of the unbiased estimate of its square.

    Gretton et al. 2012, Eq. 3; 0 where that estimate is negative. The energy kernel gives the root
    of the energy distance. Time grows with (N + M)^2, memory does not.

    Args:
        x: samples (N, *shape), N > 1.
        y: samples (M, *shape), M > 1.
        kernel: "energy" or "gaussian", see `MMDCritic`.
        bandwidth: of the Gaussian; the median distance in a pool of both sets if None, so pass one
            to compare several sets.

    Raises:
        TypeError: a value of another type.
        ValueError: bad samples, fewer than two, an unknown kernel or a bad bandwidth.
    """
    a, b = (torch.from_numpy(points) for points in _pair(x, y))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"mmd needs two samples a side, got {len(a)} and {len(b)}.")
    bandwidth = resolve_bandwidth(kernel, bandwidth, torch.cat([a[:500], b[:500]]))
    # k(x, x), which the mean over distinct pairs leaves out.
    diagonal = 0.0 if bandwidth is None else 1.0

    def mean(u: Tensor, v: Tensor) -> float:
        return float(kernel_mean(u, v, bandwidth).mean())

    def mean_of_distinct(u: Tensor) -> float:
        return (len(u) * mean(u, u) - diagonal) / (len(u) - 1)

    return max(0.0, mean_of_distinct(a) + mean_of_distinct(b) - 2 * mean(a, b)) ** 0.5


@checked
def floor(
    metric: Callable[[Samples, Samples], float],
    draw: Callable[[int, int], Samples],
    n: int,
    seed: int = 0,
) -> float:
    """Return a metric's sampling floor: its value between two independent real sets of n samples.

    Args:
        metric: of two sets of samples, such as `sliced_wasserstein`.
        draw: `draw(n, seed)` gives n real samples, independent for different seeds, such as a
            target's `sample_fresh`.
        n: samples a set, as many as the sampler will be judged by.
        seed: of the first set; the second has seed + 1.

    Raises:
        TypeError: a value of another type.
        ValueError: no samples, or what the metric and `draw` refuse.
    """
    at_least(1, n=n)
    return metric(draw(n, seed), draw(n, seed + 1))


def _quantiles(directions: Array, points: Array) -> Array:
    """Project points (N, d) on directions (L, d) and sort: (L, N)."""
    projected = directions @ points.T
    # In place and along memory: several times faster than sorting columns or sorting in torch.
    projected.sort(axis=1)
    return projected


def _monotone_plan(
    n: int, m: int
) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64] | slice, Array]:
    """Return the optimal plan between n and m sorted points of equal mass on a line.

    It moves the unit mass in pieces, from left to right. A piece ends where a point of either side
    is used up: at the multiples of m and of n, in units of 1 / (n m).

    Returns:
        For each piece: the point it comes from, the point it goes to, its mass.
    """
    if n == m:
        return slice(None), slice(None), np.full(n, 1 / n)
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    starts = np.concatenate([[0], ends[:-1]])
    return starts // m, starts // n, (ends - starts) / (n * m)


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map in threads, results in order; NumPy lets go of the interpreter lock while it sorts."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))


def _points(name: str, samples: Samples, shape: tuple[int, ...] | None = None) -> Array:
    """Check samples (N, *shape) and flatten them to float64 points (N, d)."""
    tensor = as_tensor(name, samples).cpu()
    check_samples(name, tensor)
    check_finite(name, tensor)
    points = tensor.flatten(1)
    check_samples(name, points, shape)
    return points.double().numpy()


def _pair(x: Samples, y: Samples) -> tuple[Array, Array]:
    points = _points("x", x)
    return points, _points("y", y, points.shape[1:])


def _check_order(p: float) -> None:
    if not 1 <= p < np.inf:
        raise ValueError(f"p must be at least 1 and finite, got {p}.")
