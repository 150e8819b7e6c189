"""Multistep exponential integrators, one evaluation a step (MATH.md 1.6, 1.7 and 1.14).

Noise prediction makes DPM-Solver 2M and 3M (the third order exact: it is Adams-Bashforth in
log-SNR), data prediction DPM-Solver++ 2M and 3M, and with noise their SDE versions.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...envs.schedules import Schedule
from ..samplers.tableau import Output, Tableau
from .exponential import coefficient, noise, scale
from .rows import Node, Rows, check_budget, check_order, combine, difference, nodes_of
from .singlestep import SolverType, check_solver_type

# With fewer steps than this the last ones use lower orders: the published rule, and for the third
# order that of diffusers, with far less error on even grids (`fewstep benchmark last-steps`).
LOWERED_BELOW = {1: 10, 2: 10, 3: 15}


def multistep(
    name: str,
    schedule: Schedule,
    order: int,
    solver_type: SolverType,
    compat: bool,
    lower_order_final: bool | None,
    output: Output,
    eta: float = 0.0,
) -> Tableau:
    """Build the tableau; see `dpm_solver_multistep` and `dpm_solver_sde` for the arguments."""
    nodes = nodes_of(schedule)
    rows = multistep_rows(
        nodes, order, solver_type, compat, lower_order_final, output=output, eta=eta, name=name
    )
    return rows.tableau(name, schedule.process, nodes[-1].time, output)


def multistep_rows(
    nodes: Sequence[Node],
    order: int,
    solver_type: SolverType = "dpmsolver",
    compat: bool = False,
    lower_order_final: bool | None = None,
    *,
    output: Output,
    eta: float = 0.0,
    name: str = "multistep",
) -> Rows:
    """Return the rows between nodes, which may be those of many schedules; see `multistep`."""
    check_solver_type(solver_type)
    if not isinstance(compat, bool) or not isinstance(lower_order_final, bool | None):
        raise ValueError("compat and lower_order_final are True or False.")
    steps = len(nodes) - 1
    check_order(order, (1, 2, 3), name)
    check_budget(steps, order, name)
    # With noise always: a high order of the last, long step magnifies it (MATH.md 1.14).
    lowered = eta > 0 or steps < LOWERED_BELOW[order]
    if lower_order_final is not None:
        lowered = lower_order_final
    rows = Rows()
    for i in range(steps):
        used = min(i + 1, order, steps - i if lowered else order)
        start, end = nodes[i], nodes[i + 1]
        if end.sigma == 0:
            used = 1
        weights = _weights(nodes, i, used, solver_type, compat, output, eta)
        rows.add(start.time, scale(start, end, output, eta), weights, noise=noise(start, end, eta))
    return rows


def _weights(
    nodes: Sequence[Node],
    i: int,
    order: int,
    solver_type: SolverType,
    compat: bool,
    output: Output,
    eta: float,
) -> dict[int, float]:
    """Return the weights of step i on the outputs up to its own."""
    start, end = nodes[i], nodes[i + 1]
    c1 = coefficient(1, start, end, output, eta)
    now = {i: 1.0}
    if order == 1:
        return combine((c1, now))
    h = end.log_snr - start.log_snr
    r0 = (start.log_snr - nodes[i - 1].log_snr) / h
    d0 = combine((1 / r0, difference(i, i - 1)))
    if order == 2:
        c2 = c1 / 2 if solver_type == "dpmsolver" else coefficient(2, start, end, output, eta)
        return combine((c1, now), (c2, d0))
    r1 = (nodes[i - 1].log_snr - nodes[i - 2].log_snr) / h
    d1 = combine((1 / r1, difference(i - 1, i - 2)))
    # The second divided difference is half a second derivative: the published codes forget the 2.
    second = coefficient(3, start, end, output, eta) * (1 if compat else 2) / (r0 + r1)
    first = coefficient(2, start, end, output, eta)
    tilt = first * r0 / (r0 + r1) + second
    return combine((c1, now), (first + tilt, d0), (-tilt, d1))
