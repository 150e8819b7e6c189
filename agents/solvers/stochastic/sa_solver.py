"""SA-Solver (Xue et al. 2023): stochastic Adams steps, corrected by an output asked for anyway.

It is UniPC's table (`unipc`) on the reverse SDE of SDE-DPM-Solver++ with eta = tau^2. From the
corrected state c_i the predictor goes to z_{i+1}, and the corrector takes the same step again, with
the answer there and the same noise (MATH.md 1.21):

    z_{i+1} = a_i c_i + P_i(O_i, O_{i-1}, ...) + s_i noise_i
    c_{i+1} = a_i c_i + C_i(O_{i+1}, O_i, ...) + s_i noise_i = z_{i+1} + (C_i - P_i)(O_{i+1}, ...)

So the noise is that of an ordinary row, and no network call is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ....common.arguments import checked
from ....envs.schedules import Schedule
from ...samplers.tableau import Tableau
from ..exponential import coefficient, noise, scale
from ..rows import Node, Rows, check_budget, check_order, combine, nodes_of
from ..unipc import adams_weights

SaType = Literal["taylor", "bh1"]


@checked
def sa_solver(
    schedule: Schedule,
    order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    solver_type: SaType = "taylor",
    lower_order_final: bool = True,
) -> Tableau:
    """Build SA-Solver (Xue et al. 2023, Algorithm 1) in data prediction, one network call a step.

    Args:
        schedule: the times; a last step to time 0 is of first order and adds no noise.
        order: of the predictor, 1 to 4: how many outputs it reads.
        corrector_order: how many outputs the corrector reads, that at the predicted state included,
            0 to 4; 0 leaves the predictor. Published: 2 and 2 with guidance, 3 and 4 without.
        tau: how much noise, at least 0: 1 is the time reversal of the process, 0 its ODE.
        s_min: least noise level sigma / alpha of the steps that add noise, by their start.
        s_max: greatest noise level of them. The authors' code adds noise in the middle only, at
            times between .2 and .8 of the last one.
        solver_type: the weights of second order, where two outputs are read: "taylor" integrates
            the line through them exactly, as in the paper; "bh1" is what the authors' code has for
            few steps, (1 + tau^2) h / 2 in the place of the integral.
        lower_order_final: lower the order of the last steps down to 1, as published.

    With tau 0 and `corrector_order` one above `order` it is `unipc` (of "bh1"); without a
    corrector it is `dpm_solver_sde` of the same type, where eta is tau^2. The last state is not
    corrected, since that would take one more call.

    Raises:
        ValueError: no such order or type, a number out of range, or fewer steps than the order.
    """
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be a finite number >= 0, got {tau}.")
    if not 0 <= s_min <= s_max:
        raise ValueError(f"0 <= s_min <= s_max must hold, got {s_min} and {s_max}.")
    nodes = nodes_of(schedule)
    check_order(order, (1, 2, 3, 4), "SA-Solver's predictor")
    check_order(corrector_order, (0, 1, 2, 3, 4), "SA-Solver's corrector")
    check_budget(schedule.steps, order, f"sa-solver of order {order}")
    rows = Rows()
    correction: dict[int, float] = {}  # of z_i to c_i
    for i in range(schedule.steps):
        start, end = nodes[i], nodes[i + 1]
        eta = tau**2 if s_min <= start.rho <= s_max else 0.0
        left = schedule.steps - i if lower_order_final else math.inf
        used = 1 if end.sigma == 0 else int(min(i + 1, order, left))
        predicted = adams_weights(nodes, i, range(i - 1, i - used, -1), solver_type, "sample", eta)
        factor = scale(start, end, "sample", eta)
        weights = combine((factor, correction), (1.0, predicted))
        rows.add(start.time, factor, weights, noise=noise(start, end, eta))
        correction = {}
        # A step from where no signal is left is infinitely long: nothing corrects it.
        if corrector_order and i + 1 < schedule.steps and start.alpha > 0:
            used = int(min(i + 2, corrector_order, left + 1))
            corrected = _corrector(nodes, i, used, solver_type, eta)
            correction = combine((1.0, corrected), (-1.0, predicted))
    name = "sa-solver" + (f" (tau {tau:g})" if tau != 1 else "")
    return rows.tableau(name, schedule.process, nodes[-1].time, "sample")


def _corrector(
    nodes: Sequence[Node], i: int, used: int, solver_type: SaType, eta: float
) -> dict[int, float]:
    """Return the weights of step i on the output at its end and on `used` - 1 before it."""
    if used == 1:
        return {i + 1: coefficient(1, nodes[i], nodes[i + 1], "sample", eta)}
    known = [*range(i - 1, i + 1 - used, -1), i + 1]
    return adams_weights(nodes, i, known, solver_type, "sample", eta)
