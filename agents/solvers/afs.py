"""AFS, the analytical first step: the first network call for nothing (MATH.md 1.19).

At the start a state is nearly noise, and its own direction nearly the predicted noise: epsilon =
z / sqrt(alpha^2 + sigma^2), on `VE` x / sqrt(1 + t^2) (Dockhorn et al. 2022, GENIE). So a solver of
K steps does with K - 1 calls.
"""

from __future__ import annotations

import numpy as np

from ...common.arguments import checked
from ..samplers.tableau import Tableau


@checked
def afs(tableau: Tableau) -> Tableau:
    """Return the sampler whose first output is guessed from the state, and not asked for.

    Its times, its start and its other steps stay as they are.

    Args:
        tableau: a deterministic sampler of two steps or more, whose first step reads its output.

    Raises:
        ValueError: another table, or no signal is left at its first time.
    """
    if not tableau.linear:
        raise ValueError(
            f"afs is for deterministic solvers; '{tableau.name}' adds noise or clamps its "
            "predictions."
        )
    row = tableau.row(0)
    if tableau.steps < 2 or 0 not in dict(row.weights) or not row.asked:
        raise ValueError(
            f"afs does without the first of several network calls; '{tableau.name}' has no call "
            "to spare: take more steps."
        )
    asked = np.ones(tableau.steps, dtype=bool) if tableau.asked is None else tableau.asked.copy()
    asked[0] = False
    return tableau.replace(name=f"{tableau.name} (afs)", asked=asked)
