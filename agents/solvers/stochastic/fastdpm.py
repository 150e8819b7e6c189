"""FastDPM's reverse chain on any times (Kong & Ping 2021; MATH.md 1.10)."""

from __future__ import annotations

from ....common.arguments import checked
from ....envs.schedules import Schedule
from ....envs.schedules.fast_dpm import fast_levels
from ...samplers.tableau import Tableau
from ..ddim import first_order
from ..rows import with_last_std


@checked
def fast_dpm(schedule: Schedule, kappa: float = 1.0, last_std: float | None = None) -> Tableau:
    """Build FastDPM's sampler, the chain that SFT-PG starts from on images.

        x_s = (alpha_s / alpha_t) x_t + [sqrt(sigma_s^2 - std^2) - sigma_t alpha_s / alpha_t] eps
              + std noise,      std = kappa * (posterior standard deviation)

    It is `ddim` but for the levels at fractional times of a chain whose betas rise on a line: they
    come from the log-gamma function, so that on `Schedule.fast_dpm` alpha^2 is exactly the Gbar_k.

    Args:
        schedule: the times, K + 1 of them; `Schedule.fast_dpm` gives the published ones.
        kappa: 0 to 1; 0 is deterministic ("DDIM-rev"), 1 has DDPM's small variance ("DDPM-rev").
        last_std: standard deviation of the last transition, if it is to differ: FastDPM has none at
            clean data, Fan & Lee (2023) fine-tune with 0.001.

    Raises:
        ValueError: kappa outside [0, 1], or a negative or non-finite `last_std`.
    """
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa must lie in [0, 1], got {kappa}.")
    levels = fast_levels(schedule.process, schedule.times)
    name = "fast-dpm" if kappa == 1 else f"fast-dpm (kappa {kappa:g})"
    return with_last_std(first_order(name, schedule, levels, kappa), last_std)
