"""Timing by turns, on a GPU too: there a loop is over when the device is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Loop = Callable[[], Any]


def now() -> float:
    """Return the seconds of a clock, when a GPU in use has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def by_turns(loops: Sequence[Loop], repeats: int) -> list[tuple[float, ...]]:
    """Time loops by turns; return their seconds in each turn, the first tenth left out."""
    turns = []
    for _ in range(repeats):
        seconds = []
        for loop in loops:
            began = now()
            loop()
            seconds.append(now() - began)
        turns.append(tuple(seconds))
    return turns[repeats // 10 :]
