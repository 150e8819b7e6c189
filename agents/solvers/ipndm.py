"""iPNDM: Adams-Bashforth combinations on the DDIM map (MATH.md 1.3)."""

from __future__ import annotations

from ...common.arguments import checked
from ...envs.schedules import Schedule
from ..samplers.tableau import Tableau
from .exponential import coefficient, scale
from .rows import Rows, check_budget, check_order, nodes_of

# Weights on the newest output first, for equal steps; used as they stand on any grid.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@checked
def ipndm(schedule: Schedule, order: int = 4) -> Tableau:
    """Build iPNDM: linear multistep in noise prediction, without PNDM's costly warm-up.

    Args:
        schedule: the times; it may end at 0.
        order: 1 (DDIM) to 4; the first steps use lower orders.

    Raises:
        ValueError: no such order, or fewer steps than the order.
    """
    check_order(order, range(1, 5), "iPNDM")
    check_budget(schedule.steps, order, f"iPNDM of order {order}")
    nodes = nodes_of(schedule)
    rows = Rows()
    for i in range(schedule.steps):
        start, end = nodes[i], nodes[i + 1]
        c1 = coefficient(1, start, end, "epsilon")
        weights = ADAMS_BASHFORTH[min(i + 1, order) - 1]
        rows.add(
            start.time,
            scale(start, end, "epsilon"),
            {i - back: c1 * weight for back, weight in enumerate(weights)},
        )
    return rows.tableau(f"ipndm-{order}", schedule.process, nodes[-1].time, "epsilon")
