"""UniPC (Zhao et al. 2023): a predictor, corrected by the output that was asked for anyway.

From the corrected state c_i the predictor goes to z_{i+1}, where the network is asked, and the
corrector takes the same step again with the answer (MATH.md 1.13):

    z_{i+1} = a_i c_i + P_i(O_i, O_{i-1}, ...),    c_{i+1} = a_i c_i + C_i(O_{i+1}, O_i, ...)

The states of the table are the z. Both steps take over the same a_i c_i, so that

    c_{i+1} = z_{i+1} + (C_i - P_i)(O_{i+1}, O_i, ...)

is what the next row starts from: an ordinary row, and no network call more than the predictor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from ...common.arguments import checked
from ...envs.schedules import Schedule
from ..samplers.tableau import Output, Tableau
from .exponential import coefficient, exponential, scale
from .many import Many
from .rows import Node, Rows, check_budget, check_order, combine, difference, nodes_of

Bh = Literal["bh1", "bh2"]
# "taylor" has the exact weight where B(h) stands for it.
AdamsType = Literal["bh1", "bh2", "taylor"]


@checked
def unipc(
    schedule: Schedule,
    order: int = 2,
    solver_type: Bh = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    output: Output = "sample",
) -> Tableau:
    """Build UniPC multistep (Zhao et al. 2023, Algorithms 1 and 2), one network call a step.

    Args:
        schedule: the times; a last step to time 0 is of first order.
        order: p = 1, 2 or 3 of the predictor; the corrector raises it to p + 1. The first steps
            use lower orders, and each state is corrected with the order that it was predicted with.
        solver_type: B(h) of the paper. It matters in two places alone, where the weight 1/2 stands
            for the exact one: predictors of order 2 and correctors of order 1. "bh1" halves h,
            "bh2" halves e^h - 1, which the paper advises but for few unguided steps.
        corrector: False leaves the predictor, UniP: with "bh2" it is DPM-Solver++ multistep.
        lower_order_final: lower the order of the last steps down to 1, as published.
        output: what the network's answers are expanded in: the predicted sample, as published for
            images, or the noise.

    The last state is not corrected, since that would take one more call.

    Raises:
        ValueError: no such order, type or output, or fewer steps than the order.
    """
    name = f"unipc-{order}" if corrector else f"unip-{order}"
    nodes = nodes_of(schedule)
    rows = unipc_rows(nodes, order, solver_type, corrector, lower_order_final, output)
    return rows.tableau(name, schedule.process, nodes[-1].time, output)


def unipc_rows(
    nodes: Sequence[Node],
    order: int = 2,
    solver_type: Bh = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    output: Output = "sample",
) -> Rows:
    """Return the rows between nodes, which may be those of many schedules; see `unipc`."""
    steps = len(nodes) - 1
    check_order(order, (1, 2, 3), "UniPC")
    check_budget(steps, order, f"unipc-{order}" if corrector else f"unip-{order}")
    rows = Rows()
    correction: dict[int, float] = {}  # of z_i to c_i
    for i in range(steps):
        used = min(i + 1, order, steps - i if lower_order_final else order)
        if nodes[i + 1].sigma == 0:
            used = 1
        predicted = adams_weights(nodes, i, range(i - 1, i - used, -1), solver_type, output)
        factor = scale(nodes[i], nodes[i + 1], output)
        rows.add(nodes[i].time, factor, combine((factor, correction), (1.0, predicted)))
        correction = {}
        # A step from where no signal is left is infinitely long: nothing corrects it.
        if corrector and i + 1 < steps and nodes[i].alpha > 0:
            known = [*range(i - 1, i - used, -1), i + 1]
            corrected = adams_weights(nodes, i, known, solver_type, output)
            correction = combine((1.0, corrected), (-1.0, predicted))
    return rows


def adams_weights(
    nodes: Sequence[Node],
    i: int,
    others: Iterable[int],
    solver_type: AdamsType,
    output: Output,
    eta: float = 0.0,
) -> dict[int, float]:
    """Return the weights of step i on its own output and those at the nodes `others`.

    They integrate the polynomial through all these outputs exactly, except that a single other one
    weighs as `solver_type` says. With `eta` it is the step of the reverse SDE of that much noise.
    """
    start, end = nodes[i], nodes[i + 1]
    terms = [(coefficient(1, start, end, output, eta), {i: 1.0})]
    # An output from infinitely far away says nothing of this step.
    others = [k for k in others if nodes[k].alpha > 0]
    if not others:
        return combine(*terms)
    h = end.log_snr - start.log_snr
    places = np.array([(nodes[k].log_snr - start.log_snr) / h for k in others])
    if len(others) == 1 and solver_type != "taylor":
        signed = (1 + eta) * (h if output == "epsilon" else -h)
        # c_1 = -g (e^h - 1), and -g h in its place.
        half = terms[0][0] / 2 * (signed / exponential(1, signed) if solver_type == "bh1" else 1.0)
        weights = half / places
    else:
        moments = [
            math.factorial(k) * coefficient(k + 1, start, end, output, eta)
            for k in range(1, len(others) + 1)
        ]
        # Of many schedules each has its own system: its axis goes first.
        powers = np.stack([places**k for k in range(len(others))])
        systems, sides = (
            np.moveaxis(powers, (0, 1), (-2, -1)),
            np.moveaxis(np.array(moments), 0, -1),
        )
        weights = np.moveaxis(np.linalg.solve(systems, sides[..., None])[..., 0], -1, 0) / places
    for weight, k in zip(weights, others, strict=True):
        terms.append((Many.of(weight) if weight.ndim else float(weight), difference(k, i)))
    return combine(*terms)
