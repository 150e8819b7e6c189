"""Heun's second-order method, EDM's and that of flow matching, and EDM's Euler steps.

EDM integrates d xbar / d rho = epsilon with xbar = x / alpha and rho = sigma / alpha (Karras et al.
2022; MATH.md 1.9); flow matching integrates x itself (MATH.md 1.17).
"""

from __future__ import annotations

import math
from itertools import pairwise

from ...common.arguments import checked
from ...envs.schedules import Schedule
from ...envs.schedules.ends import warn_of_empty_start
from ..samplers.tableau import Output, Tableau
from .ddim import ddim
from .rows import Node, Rows, nodes_of


@checked
def euler(schedule: Schedule) -> Tableau:
    """Build EDM's Euler steps, which are DDIM in data prediction.

    Args:
        schedule: the times; EDM's end at 0.
    """
    return ddim(schedule, output="sample").replace(name="euler")


@checked
def heun(
    schedule: Schedule,
    output: Output = "sample",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tableau:
    """Build EDM's sampler (its Algorithm 2): two calls a step, one on a last step to time 0.

    A schedule of K steps costs 2 K - 1 calls if it ends at 0, else 2 K; one less if no signal is
    left at its first time, where the first step is of first order.

    Args:
        schedule: the times.
        output: what the table is written in, the same sampler either way; D-ODE takes differences
            of these outputs.
        s_churn: noise added and removed again over the whole schedule; 0 is deterministic. The
            start itself is never churned: it is pure noise already.
        s_min: least noise level sigma / alpha that is churned.
        s_max: greatest noise level that is churned.
        s_noise: standard deviation of the added noise, relative to that removed.

    Raises:
        ValueError: unknown output, churn settings that are negative or not numbers, or churn that
            raises a level above the first one.
    """
    if not (s_churn >= 0 and s_min >= 0 and s_max >= 0 and 0 <= s_noise < math.inf):
        raise ValueError("s_churn, s_min, s_max and s_noise must be numbers >= 0.")
    warn_of_empty_start("heun", schedule.process, float(schedule.times[0]))
    churn = min(s_churn / schedule.steps, math.sqrt(2) - 1)
    nodes = nodes_of(schedule)
    if nodes[0].alpha == 0:
        # Without signal the predicted noise says nothing of the clean sample.
        output = "sample"
    # A step starts from its level, churned up; the noise is added where the step before ends.
    starts = [nodes[0]]
    noise = []
    for i, level in enumerate(nodes[1:], start=1):
        start = level
        if churn > 0 and i < schedule.steps and s_min <= level.rho <= s_max:
            if (1 + churn) * level.rho > nodes[0].rho:
                raise ValueError(
                    f"s_churn={s_churn:g} would raise the noise level {level.rho:.4g} above "
                    f"the first one, {nodes[0].rho:.4g}: give s_max, such as EDM's 50, or less "
                    "churn."
                )
            start = Node.at_log_snr(schedule.process, -math.log((1 + churn) * level.rho))
        starts.append(start)
        # In xbar; `rows` holds x = alpha xbar.
        noise.append(start.alpha * s_noise * math.sqrt(start.rho**2 - level.rho**2))
    rows = Rows()
    for i, level in enumerate(nodes[1:]):
        _add_step(rows, starts[i], level, starts[i + 1].alpha, noise[i], output)
    name = "heun" if s_churn == 0 else f"heun (churn {s_churn:g})"
    return rows.tableau(name, schedule.process, nodes[-1].time, output)


def _add_step(
    rows: Rows, start: Node, level: Node, alpha: float, noise: float, output: Output
) -> None:
    """Append the step from `start` to `level`; its result is scaled by `alpha`, then noised."""
    first = len(rows)
    if start.alpha == 0:
        # rho is infinite: the limit is a step of first order.
        factor = alpha / level.alpha if level.alpha else 0.0
        rows.add(start.time, level.sigma / start.sigma * factor, {first: alpha}, noise=noise)
        return
    ratio, gap = alpha / start.alpha, level.rho - start.rho
    if level.sigma == 0:
        if output == "epsilon":
            rows.add(start.time, ratio, {first: alpha * gap}, noise=noise)
        else:
            rows.add(start.time, 0.0, {first: alpha}, noise=noise)
        return
    if output == "epsilon":
        rows.add(start.time, level.alpha / start.alpha, {first: level.alpha * gap})
        half = alpha * gap / 2
        weights = {first: half, first + 1: half}
        rows.add(level.time, ratio, weights, anchor=first, noise=noise)
        return
    rows.add(start.time, level.sigma / start.sigma, {first: -level.alpha * gap / start.rho})
    # epsilon = (xbar - D) / rho at the start, and again at the predicted state, which z_j is.
    before, after = gap / (2 * start.rho), gap / (2 * level.rho)
    rows.add(
        level.time,
        ratio * (1 + before),
        {first: -alpha * before, first + 1: -alpha * after},
        anchor=first,
        current=alpha / level.alpha * after,
        noise=noise,
    )


@checked
def flow_heun(schedule: Schedule) -> Tableau:
    """Build Heun's method on x itself: two calls a step, one on a last step to time 0.

        x' = x + (alpha_s - alpha_t) D + (sigma_s - sigma_t) epsilon          the Euler step, DDIM
        x_s = x + the mean of that slope and of the slope with D and epsilon of x'

    On a `RectifiedFlow` it is the trapezoidal rule for dx / du = v, on a `VE` EDM's method. Where
    no signal is left it needs no limit: D and epsilon = x / sigma are finite there.

    Args:
        schedule: the times.
    """
    rows, nodes = Rows(), nodes_of(schedule)
    for start, end in pairwise(nodes):
        first = len(rows)
        signal, noise = end.alpha - start.alpha, end.sigma - start.sigma
        # epsilon = (x - alpha D) / sigma, in both places.
        before = noise / start.sigma
        on_first = signal - start.alpha * before
        rows.add(start.time, 1 + before, {first: on_first})
        if end.sigma == 0:
            continue
        after = noise / end.sigma
        rows.add(
            end.time,
            1 + before / 2,
            {first: on_first / 2, first + 1: (signal - end.alpha * after) / 2},
            anchor=first,
            current=after / 2,
        )
    return rows.tableau("flow-heun", schedule.process, nodes[-1].time, "sample")
