"""Stochastic steps of a flow with the marginals of its ODE, for policies that need a density.

With the velocity v = eps - x_0 of a straight path (alpha = 1 - u, sigma = u, u falling), the SDE

    dx = [v + (s^2 / (2 u)) (x + (1 - u) v)] du + s dw

has the marginals of dx = v du for any s(u). Flow-GRPO (Liu et al. 2025, Eq. 9) takes
s = a sqrt(u / (1 - u)), DanceGRPO (Xue et al. 2025, Eq. 8) a constant s. Both step by
Euler-Maruyama. MATH.md 1.18.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ....common.arguments import checked
from ....envs.schedules import Schedule
from ...samplers.tableau import Tableau
from ..rows import one_step_tableau, with_last_std

Rule = Literal["flow-grpo", "dance-grpo"]
# The published levels.
_LEVELS: dict[Rule, float] = {"flow-grpo": 0.7, "dance-grpo": 0.3}


@checked
def flow_sde(
    schedule: Schedule,
    rule: Rule = "flow-grpo",
    level: float | None = None,
    last_std: float | None = None,
) -> Tableau:
    """Build the stochastic sampler of Flow-GRPO or DanceGRPO, in data prediction.

    Args:
        schedule: the times, K + 1 of them, of a `RectifiedFlow`.
        rule: how s depends on u: "flow-grpo", a sqrt(u / (1 - u)), where at u = 1 the next u stands
            below the line; or "dance-grpo", constant.
        level: a, or the constant; >= 0; 0.7 and 0.3 by default. 0 is the flow's own Euler step.
        last_std: standard deviation of the last transition, if it is to differ. Published, the last
            step is as noisy as the others.

    Raises:
        ValueError: a process whose path is not straight, or a level or `last_std` out of range.
    """
    level = _LEVELS[rule] if level is None else level
    if not 0 <= level < math.inf:
        raise ValueError(f"level must be a finite number >= 0, got {level}.")
    alpha, sigma = schedule.levels()
    if not np.allclose(alpha + sigma, 1.0, rtol=0, atol=1e-9):
        raise ValueError(
            f"flow-sde needs a straight path, alpha + sigma = 1 (RectifiedFlow); got "
            f"{schedule.process!r}."
        )
    u, step = sigma[:-1], np.diff(sigma)
    if rule == "flow-grpo":
        left = alpha[:-1].copy()
        if left[0] == 0:
            left[0] = alpha[1]
        s = level * np.sqrt(u / left)
    else:
        s = np.full_like(u, level)
    drift = s**2 / (2 * u)
    # x' = on_state x + on_velocity v, and v = (x - D) / u.
    on_state = 1 + drift * step
    on_velocity = step * (1 + drift * (1 - u))
    table = one_step_tableau(
        "flow-sde" if rule == "flow-grpo" else "flow-sde (dance-grpo)",
        schedule.process,
        schedule.times.numpy(),
        scale=on_state + on_velocity / u,
        weight=-on_velocity / u,
        noise=s * np.sqrt(-step),
        output="sample",
    )
    return with_last_std(table, last_std)
