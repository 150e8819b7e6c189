"""Kinds of samples, by the shape of one: the one place that says what is a vector and an image.

Everything else, a sequence `(L, C)` or a volume `(C, D, H, W)`, is an array of numbers that we know
nothing of: environments, agents and policies take it with networks of its user's own, and default
networks read it as one long vector. The shape always comes from an environment, a target or a body,
never from how many dimensions a batch has.
"""

from __future__ import annotations

from collections.abc import Sequence


def is_vector(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are vectors, `(D,)`."""
    return len(shape) == 1


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are images, `(C, H, W)`."""
    return len(shape) == 3


def check_shape(shape: Sequence[int]) -> None:
    """Raise ValueError for the shape of a sample that holds nothing: `()`, or a side below 1."""
    if not len(shape) or min(shape) < 1:
        raise ValueError(
            f"shape must hold at least one number, each at least 1, got {tuple(shape)}."
        )
