"""Tables of one solver on many schedules at once: what a derivative by the times is taken from.

A builder's arithmetic is that of plain numbers. With a `Many` in the place of each it makes the
rows of all the schedules together, for little more than the price of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Many(np.ndarray):
    """A number for each of M schedules, (M,); a condition holds if it does on all of them."""

    @classmethod
    def of(cls, values: np.ndarray) -> Any:
        """Take (M,) numbers; what is returned stands where builders expect one."""
        return np.asarray(values, dtype=np.float64).view(cls)

    def each(self, function: Callable[[float], float]) -> Any:
        """Apply a function of plain numbers."""
        return Many.of(np.array([function(one) for one in self.tolist()]))

    def __bool__(self) -> bool:
        """Tell whether it is true of all."""
        return bool(np.asarray(self).all())


class Stack(NamedTuple):
    """The numbers of M tables of K steps.

    Attributes:
        levels: (M, K) logarithms of the noise levels at which the calls are made.
        scale: (M, K).
        weights: (M, K, K).
        current: (M, K).
    """

    levels: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    current: np.ndarray
