"""Solvers: pure functions ``(schedule, **options) -> Tableau``, also by name with `make_solver`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ...envs.names import unknown_name
from ...envs.schedule import Schedule
from ..tableau import Tableau
from .ancestral import ancestral
from .ddim import ddim

SOLVERS: dict[str, Callable[..., Tableau]] = {
    "ancestral": ancestral,
    "ddim": ddim,
}


def make_solver(name: str, schedule: Schedule, **options: Any) -> Tableau:
    """Build the named solver's tableau on a schedule.

    Raises:
        ValueError: a solver or an option that does not exist; the message lists those that do.
    """
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    builder = SOLVERS[name]
    known = [key for key in inspect.signature(builder).parameters if key != "schedule"]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of solver '{name}'", option, known)
    return builder(schedule, **options)


__all__ = ["SOLVERS", "ancestral", "ddim", "make_solver"]
