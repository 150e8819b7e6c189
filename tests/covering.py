"""Fewer cases than all combinations: every code path at some of the places, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def in_turn(paths: Sequence[Any], places: Sequence[Any], each: int) -> list[tuple[Any, Any]]:
    """Return (path, place) for all paths at `each` places, which follow one another.

    Neighbours among the places should differ in all that a path may depend on.
    """
    return [
        (path, places[(each * i + k) % len(places)])
        for i, path in enumerate(paths)
        for k in range(each)
    ]


def alternating(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return all pairs of two and an odd number of values; neighbours differ in both."""
    assert len(first) == 2 and len(second) % 2
    return [(first[i % 2], second[i % len(second)]) for i in range(2 * len(second))]


def options_at_places(
    names: str, options: Sequence[Sequence[Any]], places: Sequence[Any], each: int
) -> Any:
    """Parametrise by all combinations of options, each at so many of the places.

    Args:
        names: of the parameters, those of the options first.
        options: the values of each option.
        places: tuples of the remaining parameters.
        each: number of places.
    """
    cases = in_turn(list(product(*options)), places, each)
    return pytest.mark.parametrize(
        [name.strip() for name in names.split(",")], [(*path, *place) for path, place in cases]
    )
