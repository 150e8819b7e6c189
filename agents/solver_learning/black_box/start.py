"""The table that is drawn around first: the base solver's, or a finished one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ....envs import Schedule
from ...samplers.tableau import Tableau
from ..joint.family import SHIFTS, Parameters, TableFamily
from ..scheduling.adjoint import log_levels

# Parameters are numbers divided by units and multiplied again.
_ROUNDING = 1e-9
# What decides which sampler a table is, beside its times.
_FORM = ("output", "anchors", "asked")
_NUMBERS = ("scale", "weights", "current", "evaluation_times", "noise")


def starting_parameters(
    family: TableFamily, schedule: Schedule, table: Tableau | None
) -> Parameters:
    """Return the parameters of a table.

    Args:
        family: those that can be drawn.
        schedule: the environment's.
        table: on that schedule; None is the family's own.

    Raises:
        ValueError: the table is not one of the family.
    """
    base = family.reference
    # A table that the solver made itself is found to the bit.
    if table is None or table.to_json() == base.to_json():
        return family.zeros()
    made = family.parameters_of(schedule, table)
    if SHIFTS in made and table.asked_times is not None:
        made[SHIFTS] = torch.from_numpy(log_levels(table) - log_levels(base))
    drawn = family.table(made)
    for name in (*_FORM, *_NUMBERS):
        if not _alike(getattr(table, name), getattr(drawn, name)):
            raise ValueError(
                f"The table '{table.name}' is none of those that are drawn around '{base.name}': "
                f"they differ in {name}; take the solver that it was learned from, solver=..., and "
                "learn (learn.*) what was learned of it."
            )
    return made


def _alike(there: Any, here: Any) -> bool:
    """Tell whether two tables have the same in a field, numbers to rounding."""
    if isinstance(there, str) or there.dtype.kind in "bi":
        return np.array_equal(there, here)
    return np.allclose(there, here, rtol=0, atol=_ROUNDING * (np.abs(there).max() or 1.0))
