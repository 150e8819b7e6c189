"""Even noise: Latin hypercube sampling, a batch of normal numbers that chance cannot make lopsided.

McKay, Beckman & Conover (1979). Each number is N(0, 1) as before, but in every coordinate the N
samples of a batch lie one in each N-th of the distribution, so the mean over the batch of a
function that is nearly a sum over coordinates has hardly any variance left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The farthest from 0 and 1 that erfinv is asked for in float32; it says 5.3 standard deviations.
_EDGE = 6e-8


def even_normal(noise: Tensor, generator: torch.Generator | None = None, groups: int = 1) -> Tensor:
    """Return normal noise that is spread evenly over each group, shaped like `noise`.

    Args:
        noise: independent normal numbers (groups * N, *shape); in each coordinate the order stays.
        generator: decides where in its N-th of the distribution a number lies.
        groups: so many batches, one after the other, each of which is spread by itself.
    """
    each = noise.unflatten(0, (groups, -1))
    rank = each.argsort(dim=1).argsort(dim=1)
    within = torch.rand(each.shape, generator=generator, dtype=noise.dtype, device=noise.device)
    share = ((rank + within) / each.shape[1]).clamp(_EDGE, 1 - _EDGE)
    return (2 * share - 1).erfinv().mul(math.sqrt(2)).view_as(noise)
