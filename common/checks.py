"""Checks of numeric settings: each names the setting, what it was and what is accepted."""

from __future__ import annotations

import math


def at_least(least: int, **values: float | None) -> None:
    """Raise ValueError for a value that is NaN, infinite or below `least`; None passes."""
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def positive(**values: float | None) -> None:
    """Raise ValueError for a value that is not a finite number > 0; None passes."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}.")


def fraction(*, with_one: bool, **values: float | None) -> None:
    """Raise ValueError for a value outside [0, 1], or [0, 1) without one; None passes."""
    for name, value in values.items():
        if value is not None and not (0 <= value < 1 or (with_one and value == 1)):
            upper = "1]" if with_one else "1)"
            raise ValueError(f"{name} must lie in [0, {upper}, got {value}.")
