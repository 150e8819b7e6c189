"""DPM-Solver singlestep: blocks of one to three evaluations (MATH.md 1.4, 1.6 and 1.15).

Noise prediction makes DPM-Solver (Lu et al. 2022a), data prediction DPM-Solver++ 2S and 3S
(Lu et al. 2022b): the same rows with other coefficients. With noise 2S is DPM++ SDE (k-diffusion).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, get_args

from ...common.arguments import checked
from ...common.names import unknown_name
from ...envs.processes import NoiseProcess
from ...envs.schedules import Schedule
from ...envs.schedules.ends import warn_of_empty_start
from ..samplers.tableau import Output, Tableau
from .exponential import coefficient, noise, scale
from .rows import Node, Rows, check_budget, check_order, combine, difference, nodes_of

SolverType = Literal["dpmsolver", "taylor"]


@checked
def singlestep_orders(nfe: int, order: int) -> list[int]:
    """Split a budget of network calls into blocks (the rule of "DPM-Solver-fast").

    Args:
        nfe: network evaluations, at least 1.
        order: of most blocks, 1 to 3.

    Returns:
        The orders of the blocks; they add up to `nfe`.

    Raises:
        TypeError: no whole numbers.
        ValueError: no such order, or no budget.
    """
    check_order(order, (1, 2, 3), "DPM-Solver")
    if nfe < 1:
        raise ValueError(f"The budget must be at least one network call; got {nfe}.")
    full, rest = divmod(nfe, order)
    if order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + ([rest] if rest else [])


def singlestep(
    name: str,
    schedule: Schedule,
    order: int,
    solver_type: SolverType,
    orders: Sequence[int] | None,
    output: Output,
    eta: float = 0.0,
) -> Tableau:
    """Build the tableau of a composition of blocks; see `dpm_solver` and `dpm_solver_sde`."""
    check_solver_type(solver_type)
    check_order(order, (1, 2, 3), name)
    nodes = nodes_of(schedule)
    if orders is None:
        to_zero = nodes[-1].sigma == 0
        check_budget(schedule.steps, order + 1 if to_zero and order > 1 else order, name)
        blocks = _blocks_of_budget(nodes, order)
    else:
        blocks = _blocks_of_steps(schedule.process, nodes, orders, name)
    if output == "epsilon" and len(blocks[0]) > 2:
        warn_of_empty_start(name, schedule.process, nodes[0].time)
    rows = Rows()
    for block in blocks:
        _add_block(rows, block, solver_type, output, eta)
    return rows.tableau(name, schedule.process, nodes[-1].time, output)


def check_solver_type(solver_type: str) -> None:
    """Raise ValueError for a type that does not exist."""
    if solver_type not in get_args(SolverType):
        raise unknown_name("solver_type", solver_type, get_args(SolverType))


def _blocks_of_budget(nodes: list[Node], order: int) -> list[list[Node]]:
    """Cut the nodes into blocks: the nodes between two block ends are the inner stages."""
    # In log-SNR a step from where no signal is left is infinitely long, as is one to clean data.
    first = [1] if nodes[0].alpha == 0 and len(nodes) > 2 else []
    calls = len(nodes) - 1 - len(first)
    orders = singlestep_orders(calls, order)
    if nodes[-1].sigma == 0 and orders[-1] != 1:
        orders = [*singlestep_orders(calls - 1, order), 1]
    orders = [*first, *orders]
    ends = [0, *accumulate(orders)]
    return [nodes[start : end + 1] for start, end in pairwise(ends)]


def _blocks_of_steps(
    process: NoiseProcess, nodes: list[Node], orders: Sequence[int], name: str
) -> list[list[Node]]:
    """Make each step a block, its inner stages spread evenly in log-SNR."""
    if len(orders) != len(nodes) - 1:
        raise ValueError(
            f"{name}: give one order for each of the schedule's {len(nodes) - 1} steps; "
            f"got {len(orders)}."
        )
    blocks = []
    for (start, end), order in zip(pairwise(nodes), orders, strict=True):
        check_order(order, (1, 2, 3), f"A block of {name}")
        if end.sigma == 0 and order > 1:
            raise ValueError(
                f"{name}: a block of order {order} cannot end at time 0, where the log-SNR is "
                f"infinite; end the schedule at process.t_min ({process.t_min:g}), or the orders "
                "with a 1."
            )
        if start.alpha == 0 and order > 1:
            raise ValueError(
                f"{name}: a block of order {order} cannot start at time {start.time:g}, where no "
                "signal is left and the log-SNR is infinite; begin the orders with a 1."
            )
        h = end.log_snr - start.log_snr
        stages = [
            Node.at_log_snr(process, start.log_snr + h * stage / order) for stage in range(1, order)
        ]
        blocks.append([start, *stages, end])
    return blocks


def _add_block(
    rows: Rows, block: Sequence[Node], solver_type: SolverType, output: Output, eta: float
) -> None:
    """Append a block from its first node to its last, through the stages between."""
    start, *stages, end = block
    first = len(rows)
    reached: dict[int, float] = {}  # weights that led from the start to the last state

    def add(here: Node, goal: Node, *terms: tuple[float, dict[int, float]]) -> None:
        nonlocal reached
        weights = combine((coefficient(1, start, goal, output, eta), {first: 1.0}), *terms)
        if eta == 0:
            rows.add(here.time, scale(start, goal, output), weights, anchor=first)
            return
        # From `here`, so that the noise on the way there stays in the state.
        factor = scale(here, goal, output, eta)
        change = combine((1.0, weights), (-factor, reached))
        rows.add(here.time, factor, change, noise=noise(here, goal, eta))
        reached = weights

    if not stages:
        add(start, end)
        return
    h = end.log_snr - start.log_snr
    r = [(stage.log_snr - start.log_snr) / h for stage in stages]
    slope = difference(first + 1, first)  # r_1 times the first derivative
    add(start, stages[0])
    if len(stages) == 1:
        if solver_type == "dpmsolver":
            factor = coefficient(1, start, end, output, eta) / (2 * r[0])
        else:
            factor = coefficient(2, start, end, output, eta) / r[0]
        add(stages[0], end, (factor, slope))
        return
    c2 = coefficient(2, start, stages[1], output, eta)
    add(stages[0], stages[1], (c2 * r[1] / r[0], slope))
    c2, slope2 = coefficient(2, start, end, output, eta), difference(first + 2, first)
    if solver_type == "dpmsolver":
        add(stages[1], end, (c2 / r[1], slope2))
        return
    c3, gap = coefficient(3, start, end, output, eta), r[1] - r[0]
    # G_1 = (r_2 d_1 - r_1 d_2) / gap and G_2 = 2 (d_2 - d_1) / gap, with d_k = slope_k / r_k.
    on_first = (c2 * r[1] - 2 * c3) / (gap * r[0])
    on_second = (2 * c3 - c2 * r[0]) / (gap * r[1])
    add(stages[1], end, (on_first, slope), (on_second, slope2))
