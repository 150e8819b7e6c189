"""Tensors that go together, in portions of rows that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def portions(parts: Sequence[Tensor | None], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield tensors (N, ...) in portions of at most `size` rows each; None stays None."""
    rows = next(len(part) for part in parts if part is not None)
    for first in range(0, rows, size):
        yield tuple(None if part is None else part[first : first + size] for part in parts)
