"""Cells for tests of the study engine; in a module of their own, so that workers can import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def record(log: Path, contender: str, seed: int) -> dict[str, Any]:
    """Return a record of made-up scores, and note that the cell was run."""
    with (log / "ran").open("a") as file:
        file.write(f"{contender}-{seed}\n")
    score = 0.1 * len(contender) + 0.01 * seed
    return {
        "env": "SwissRoll",
        "process": "VP",
        "solver": "",
        "contender": contender,
        "calls": 5,
        "seed": seed,
        "error": score,
        "error before": 2 * score,
        "error floor": 0.01,
        "seconds": 0.0,
    }


def slow(log: Path, contender: str, seed: int) -> dict[str, Any]:
    """Take long enough for another worker to come."""
    time.sleep(0.5)
    return record(log, contender, seed)


def failing(message: str) -> dict[str, Any]:
    """Fail."""
    raise ValueError(message)


def absent(message: str) -> dict[str, Any]:
    """Miss the data files."""
    raise FileNotFoundError(message)


def killed() -> dict[str, Any]:
    """Be killed, as by a machine that has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def interrupted() -> dict[str, Any]:
    """Be interrupted by Ctrl-C."""
    raise KeyboardInterrupt
