"""The few-step sampler of a consistency model, as a table (MATH.md 6.3)."""

from __future__ import annotations

import numpy as np

from ....common.arguments import checked
from ....envs.schedules import Schedule
from ...samplers.tableau import Tableau
from ..rows import one_step_tableau


@checked
def consistency(schedule: Schedule) -> Tableau:
    """Build multistep consistency sampling (Song et al. 2023, Algorithm 1).

        x_s = alpha_s D(x_t, t) + sigma_s noise,        the last step without noise

    Each step jumps to the clean sample, and adds fresh noise up to the next level. It is for
    networks whose predicted clean sample is where the ODE ends, as `ConsistencyDistillation` leaves
    them; that of an ordinary network is a mean, and the samples are blurred.

    Args:
        schedule: the times, K + 1 of them.
    """
    alpha, sigma = schedule.levels()
    noise = sigma[1:].copy()
    noise[-1] = 0.0
    return one_step_tableau(
        "consistency",
        schedule.process,
        schedule.times.numpy(),
        scale=np.zeros_like(noise),
        weight=alpha[1:],
        noise=noise,
        output="sample",
    )
