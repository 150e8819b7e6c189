"""Spaces of conditions: how Gymnasium writes down which conditions there are."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from ..common.conditions import Captions, Classes, Conditions, Embeddings


def condition_space(conditions: Conditions) -> gym.Space[Any]:
    """The space of one condition: `Discrete` classes, a `Box` of bytes or of an embedding."""
    low, high = conditions.bounds
    if not conditions.shape:
        return gym.spaces.Discrete(int(high) + 1)
    dtype = np.dtype(str(conditions.dtype).removeprefix("torch."))
    return gym.spaces.Box(low, high, conditions.shape, dtype.type)


def conditions_of(space: gym.Space[Any] | None) -> Conditions | None:
    """The conditions that a `condition_space` is that of; None of no space.

    Raises:
        ValueError: It is the space of no conditions of ours.
    """
    if space is None:
        return None
    if isinstance(space, gym.spaces.Discrete):
        return Classes(int(space.n))
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        whole = np.issubdtype(space.dtype, np.integer)
        return Captions(space.shape[0]) if whole else Embeddings(space.shape[0])
    raise ValueError(f"no condition of ours has the space {space}")
