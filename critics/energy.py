"""The energy distance from samples to real ones, with what chance does to it.

    D = 2 E|x - y| - E|x - x'| - E|y - y'|

is MMD^2 with the kernel -|x - y| (Gretton et al. 2012), 0 only where the distributions are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .joint import Joined
from .mmd import distances

# Distances held at once: 32 MB in float64.
_CHUNK = 2**22


class EnergyDistance:
    """The energy distance to real samples, which are kept.

    Args:
        real: samples (M, *shape) of the distribution that samples should have, M >= 2; distances
            are computed in their precision.
        condition: theirs (M, ...); then pairs of sample and condition are compared, see `Joined`.
        points: gives conditions as vectors, see `Conditions.points`; needed with conditions.
    """

    @torch.no_grad()
    def __init__(
        self,
        real: Tensor,
        condition: Tensor | None = None,
        points: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._joined: Joined | None = None
        if condition is not None and points is not None:
            self._joined = Joined(points, real.flatten(1), condition)
        self._real = self._points(real, condition)
        self._own = _to_others(self._real)

    @torch.no_grad()
    def shares(self, samples: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return numbers (N + M,) whose mean is D, and that tell it from chance; see `first_order`.

        The mean is the unbiased estimate (Gretton et al. 2012, Eq. 3), which may be a little below
        0. Memory is bounded whatever N and M.

        Args:
            samples: (N, *shape), N >= 2, independent of the real ones but for conditions.
            condition: theirs (N, ...), where the real ones have some.
        """
        x = self._points(samples.to(self._real.dtype), condition)
        to_real, to_samples = _mean_distances(x, self._real)
        return first_order(to_real - _to_others(x), to_samples - self._own)

    def _points(self, samples: Tensor, condition: Tensor | None) -> Tensor:
        flat = samples.detach().flatten(1)
        return flat if self._joined is None or condition is None else self._joined(flat, condition)


def first_order(of_samples: Tensor, of_real: Tensor) -> Tensor:
    """Return numbers that stand for a mean over pairs of independent samples; float64 on the CPU.

    The mean is a sum of a part of each sample and one of each real one, both in pairs with one
    another and among themselves, so that either counts twice to first order (Hoeffding 1948). The
    numbers' standard deviation over the root of their count is the mean's standard error, also
    where the numbers are differences between two samplers on the same noise and real samples.

    Args:
        of_samples: (N,).
        of_real: (M,).

    Returns:
        (N + M,), whose mean is that of the samples' parts and that of the real ones' together.
    """
    parts = [part.double().cpu() for part in (of_samples, of_real)]
    count = sum(map(len, parts))
    # u_i + v_m over independent i and m, as one set: each part is scaled up by its share of it.
    scaled = [2 * count / len(part) * (part - part.mean()) for part in parts]
    return parts[0].mean() + parts[1].mean() + torch.cat(scaled)


def _mean_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return each x's mean distance to y (N,), and each y's to x (M,); float64."""
    of_x, of_y = [], torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for part in x.split(max(_CHUNK // len(y), 1)):
        found = distances(part, y).double()
        of_x.append(found.mean(1))
        of_y += found.sum(0)
    return torch.cat(of_x), of_y / len(x)


def _to_others(x: Tensor) -> Tensor:
    """Return each point's mean distance to the others (N,); to itself it is 0."""
    return _mean_distances(x, x)[0] * (len(x) / (len(x) - 1))
