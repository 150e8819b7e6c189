"""The table that is drawn around first: the base solver's, or one that was fitted before."""

from __future__ import annotations

import numpy as np
import torch

from ....envs import Schedule
from ...samplers.tableau import Tableau
from ..joint.family import SHIFTS, Parameters, TableFamily
from ..scheduling.adjoint import log_levels

# Parameters are numbers divided by units and multiplied again.
_ROUNDING = 1e-9


def starting_parameters(
    family: TableFamily, schedule: Schedule, table: Tableau | None
) -> Parameters:
    """Return the parameters of a table.

    Args:
        family: those that can be drawn.
        schedule: the environment's.
        table: on that schedule; None is the family's own.

    Raises:
        ValueError: the table has other times, or another form than the family.
    """
    if table is None:
        return family.zeros()
    base = family.reference
    fits = table.times.shape == base.times.shape
    if not fits or not np.allclose(table.times, base.times, rtol=1e-6, atol=0):
        raise ValueError(
            f"The table '{table.name}' has other times than '{base.name}' on the environment's "
            "schedule: build the environment on that of the table."
        )
    made = family.parameters_of(schedule, table)
    if SHIFTS in made and table.asked_times is not None:
        made[SHIFTS] = torch.from_numpy(log_levels(table) - log_levels(base))
    drawn = family.table(made)
    for name in ("scale", "weights", "current", "evaluation_times", "noise"):
        there, here = getattr(table, name), getattr(drawn, name)
        size = np.abs(there).max() or 1.0
        if not np.allclose(there, here, rtol=0, atol=_ROUNDING * size):
            raise ValueError(
                f"The table '{table.name}' is none of those that are drawn around "
                f"'{base.name}': its {name} differ; take its own base solver, and learn what was "
                "learned of it."
            )
    return made
