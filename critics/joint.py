"""JointMMDCritic: `MMDCritic` of pairs, a sample and the condition that it was made under.

A distance between samples alone is least where all samples together look like the data, whatever
was asked for. Here the points that are compared are pairs (x, s c): the sample, and its condition
as a vector c. The energy distance between distributions of pairs is 0 only where they are the same
(Szekely and Rizzo 2013), and so only where each condition gets its own samples. The scale s makes
two conditions of the data as far apart, in the mean, as two samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.arguments import checked
from .checks import check_finite, check_samples
from .mmd import MMDCritic, distances

# Pairs of real samples that set the scale.
_SCALED = 500


class JointMMDCritic(MMDCritic):
    """Witness function, and reward of an episode, of samples with their conditions.

    Args:
        real: real samples (M, *shape).
        condition: their conditions (M, ...).
        points: gives conditions (N, ...) as vectors (N, D), see `Conditions.points`.
        kernel: as of `MMDCritic`, whose other settings keep their defaults.

    Attributes:
        scale: the factor s on the vectors.

    Raises:
        ValueError: bad samples, or another number of conditions.
    """

    @checked
    def __init__(
        self,
        real: Tensor,
        condition: Tensor,
        points: Callable[[Tensor], Tensor],
        kernel: str = "energy",
    ) -> None:
        check_samples("real", real)
        check_finite("real", real)
        if len(condition) != len(real):
            raise ValueError(f"{len(condition)} conditions were given for {len(real)} samples.")
        self._points, self._shape = points, real.shape[1:]
        vectors = points(condition)
        apart = [_mean_distance(x[:_SCALED].to(real.dtype)) for x in (real.flatten(1), vectors)]
        self.scale = apart[0] / apart[1] if min(apart) > 0 else 1.0
        super().__init__(self._pairs_of(real, condition), kernel)

    def __call__(self, sample: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """Return f (N,) for samples (N, *shape) under conditions (N, ...); see `MMDCritic`."""
        return super().__call__(self._pairs_of(sample, condition))

    def judge(self, sample: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """Return the reward (N,) of finished samples under their conditions; see `MMDCritic`."""
        return super().judge(self._pairs_of(sample, condition))

    def _pairs_of(self, sample: Tensor, condition: Tensor) -> Tensor:
        check_samples("sample", sample, self._shape)
        flat = sample.flatten(1)
        return torch.cat([flat, self.scale * self._points(condition).to(flat)], dim=1)


def _mean_distance(points: Tensor) -> float:
    return float(distances(points, points).mean())
