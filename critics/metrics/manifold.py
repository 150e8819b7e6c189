"""Manifold: the curve that a toy's data lie on, and the share of samples that lie off it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.arguments import as_tensor, check_fields, check_value
from ..checks import check_finite, check_samples
from .distances import Samples

# Points that stand for the curve: of a curve of length 10 they are 1e-4 apart.
_POINTS = 100_000


@dataclass(frozen=True)
class Manifold:
    """A curve, and the noise around it in which the data lie.

    Args:
        curve: `(n,) in [0, 1] -> (n, D)`, the points of the curve at these fractions of its course.
        std: standard deviation of the data's noise around it, in the units of the samples.
        far: how many of these a sample may be away; farther, it is off the manifold.

    Raises:
        TypeError: a value of another type.
        ValueError: a deviation or a distance that is not positive and finite.
    """

    curve: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    std: float
    far: float = 12.0

    def __post_init__(self) -> None:
        check_fields(self, Manifold)
        for name, value in (("std", self.std), ("far", self.far)):
            _check_positive(name, value)

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree  # scikit-learn, which makes the toys, brings it

        return cKDTree(self.curve(np.linspace(0, 1, _POINTS)))

    def distance(self, samples: Samples) -> NDArray[np.float64]:
        """Return the distance (N,) of each sample (N, D) from the curve.

        Raises:
            ValueError: misshapen or non-finite samples.
        """
        points = as_tensor("samples", samples).cpu()
        check_samples("samples", points, (self._tree.m,))
        check_finite("samples", points)
        return self._tree.query(points.double().numpy())[0]

    def off(self, samples: Samples, far: float | None = None) -> float:
        """Return the share, 0 to 1, of samples (N, D) farther than `far` * std from the curve.

        Args:
            samples: to be judged.
            far: in standard deviations of the data's noise; the manifold's own if None.
        """
        far = self.far if far is None else check_value("far", far, float)
        _check_positive("far", far)
        return float((self.distance(samples) > far * self.std).mean())


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
