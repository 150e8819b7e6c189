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
        self._joined, self._shape = Joined(points, real.flatten(1), condition), real.shape[1:]
        self.scale = self._joined.scale
        super().__init__(self._pairs_of(real, condition), kernel)

    def __call__(self, sample: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """Return f (N,) for samples (N, *shape) under conditions (N, ...); see `MMDCritic`."""
        return super().__call__(self._pairs_of(sample, condition))

    def judge(self, sample: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """Return the reward (N,) of finished samples under their conditions; see `MMDCritic`."""
        return super().judge(self._pairs_of(sample, condition))

    def _pairs_of(self, sample: Tensor, condition: Tensor) -> Tensor:
        check_samples("sample", sample, self._shape)
        return self._joined(sample.flatten(1), condition)


class Joined:
    """Samples together with their conditions, as vectors in which both vary as much.

    Args:
        points: gives conditions (N, ...) as vectors (N, E), see `Conditions.points`.
        samples: real ones (M, D).
        condition: theirs (M, ...).

    Attributes:
        scale: the factor on the conditions' vectors.
    """

    def __init__(
        self, points: Callable[[Tensor], Tensor], samples: Tensor, condition: Tensor
    ) -> None:
        self._points = points
        vectors = points(condition)
        apart = [_mean_distance(x[:_SCALED].to(samples.dtype)) for x in (samples, vectors)]
        self.scale = apart[0] / apart[1] if min(apart) > 0 else 1.0

    def __call__(self, samples: Tensor, condition: Tensor) -> Tensor:
        """Return (N, D + E) for samples (N, D) under conditions (N, ...)."""
        return torch.cat([samples, self.scale * self._points(condition).to(samples)], dim=1)


def _mean_distance(points: Tensor) -> float:
    return float(distances(points, points).mean())
