"""The energy distance between a sampler's samples and others, with what chance does to it.

    D = 2 E|x - y| - E|x - x'| - E|y - y'|

is MMD^2 with the kernel -|x - y| (Gretton et al. 2012), 0 only where the distributions are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mmd import distances

# Distances held at once: 32 MB in float64.
_CHUNK = 2**22


def energy_errors(samples: Tensor, goal: Tensor, condition: Tensor | None = None) -> Tensor:
    """Return each pair's share of the energy distance, (N,) float64 on the CPU.

    Their mean is the unbiased estimate (Gretton et al. 2012, Eq. 4), which may be a little below 0;
    their standard deviation over sqrt(N) is its standard error to first order, so that a smaller
    distance can be told from chance.

    Args:
        samples: (N, *shape), N >= 2.
        goal: (N, *shape) from the distribution that they should have, independent of them but for
            the condition.
        condition: (N, ...) that a sample and its goal share. Samples under different ones are then
            farther apart, by the root mean square distance of goals, so that what is compared are
            the distributions of samples with their conditions.
    """
    x, y = (each.detach().double().cpu().flatten(1) for each in (samples, goal))
    count, apart = len(x), 0.0
    if condition is not None:
        condition = condition.detach().cpu().reshape(count, -1)
        apart = 2 * float(y.var(0).sum())

    def between(a: Tensor, b: Tensor, rows: slice) -> Tensor:
        found = distances(a[rows], b)
        if condition is None:
            return found
        # In float64: a number times a truth value would be rounded to float32.
        other = (condition[rows, None] != condition[None]).any(2).to(found)
        return (found.square() + apart * other).sqrt()

    shares = []
    size = max(_CHUNK // count, 1)
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        pairs = between(x, y, rows) + between(y, x, rows)
        pairs = pairs - between(x, x, rows) - between(y, y, rows)
        # No pair meets itself.
        pairs[torch.arange(len(pairs)), torch.arange(count)[rows]] = 0.0
        shares.append(pairs.sum(1) / (count - 1))
    each = torch.cat(shares)
    return 2 * each - each.mean()
