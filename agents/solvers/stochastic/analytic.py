"""Samplers with the variance of the best Gaussian step: Analytic-DPM, SN-DDPM and NPR-DDPM.

A few-step reverse chain is best, in Kullback-Leibler divergence, when each transition has the
mean of DDPM or DDIM and the variance

    std^2 = L^2 + (alpha_s - sqrt(sigma_s^2 - L^2) alpha_t / sigma_t)^2 Cov0,

L^2 the variance that DDPM's or DDIM's own chain has, Cov0 that of the clean sample given x_t. How
Cov0 is known makes the sampler: from Gamma, one number a time (Bao et al. 2022, "Analytic-DPM"), or
from a second head of the network, a number a pixel (Bao et al. 2022, "Estimating the optimal
covariance"). `VarianceLearning` estimates and trains them. MATH.md 1.11 and 1.12.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ....common.arguments import checked
from ....envs.schedules import Schedule
from ...samplers.tableau import Tableau
from ..ddim import ddim
from ..rows import with_last_std
from .ancestral import ancestral

# A difference of one grey level of 255 between pixels in [-1, 1].
GREY_LEVEL = 2 / 255


@checked
def analytic_dpm(
    schedule: Schedule,
    gamma: np.ndarray | Tensor,
    eta: float = 1.0,
    clip: bool = True,
    late_clip: float | None = 2.0,
    last_std: float | None = None,
) -> Tableau:
    """Build Analytic-DPM: the best variance that is one number a step, from Gamma.

    Cov0 = clip((sigma_t / alpha_t)^2 (1 - Gamma_t), 0, 1), for data in [-1, 1]. Between whole times
    Gamma is interpolated linearly.

    Args:
        schedule: the times, K + 1 of them, of a `DiscreteVP` of T noisings.
        gamma: (T,) Gamma_n = E ||epsilon(x_n, n)||^2 / d for n = 1 .. T, >= 0; about 1 at most.
        eta: 0 to 1; 1 has DDPM's mean and L, below it DDIM's with its eta.
        clip: clamp the predicted clean sample to [-1, 1], as the publication does on images.
        late_clip: where the smallest time above 0 is landed on, the mean size of the noise is at
            most this many grey levels of 255, > 0; None or infinity does not bound it. Published: 2
            with DDPM's betas, 1 with cosine ones and for every eta below 1.
        last_std: standard deviation of the last transition, if it is to differ; at clean data it is
            0.

    Raises:
        ValueError: another noise process, a Gamma that does not fit it, or an option out of range.
    """
    process = schedule.process
    if process.betas is None:
        raise ValueError(f"Analytic-DPM has one Gamma a noising of a DiscreteVP; got {process!r}.")
    values = np.asarray(gamma, dtype=np.float64)
    if values.shape != (len(process.betas),):
        raise ValueError(
            f"gamma has shape {values.shape}; this process has {len(process.betas)} noisings, each "
            "with its own."
        )
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("gamma must hold finite numbers >= 0.")
    times = schedule.times.numpy()[:-1]
    alpha, sigma = (level[:-1] for level in schedule.levels())
    residue = 1 - np.interp(times, np.arange(len(values)) + 1.0, values)
    # Without signal Gamma says nothing of it: what remains is its bound.
    level = np.divide(sigma, alpha, out=np.full_like(sigma, np.inf), where=alpha > 0)
    bound = np.where(alpha > 0, residue, 1.0)
    covariance = np.clip(level**2 * bound, 0.0, 1.0)
    table = _optimal(schedule, "analytic-dpm", eta, clip, late_clip)
    assert table.covariance is not None and table.cap is not None
    std = np.minimum(np.sqrt(table.noise**2 + table.covariance * covariance), table.cap)
    table = table.replace(noise=std, covariance=None, cap=None)
    return with_last_std(table, last_std)


@checked
def per_pixel_dpm(
    schedule: Schedule,
    head: str = "sn",
    eta: float = 1.0,
    clip: bool = True,
    late_clip: float | None = 2.0,
    last_std: float | None = None,
) -> Tableau:
    """Build SN-DDPM or NPR-DDPM: the best variance of each pixel, Cov0 from the second head.

    Args:
        schedule: the times, K + 1 of them.
        head: the kind of `VarianceHead` that its denoiser must have, "sn" or "npr"; the table is
            the same but for its name.
        eta: as for `analytic_dpm`.
        clip: as there.
        late_clip: as there.
        last_std: as there.

    Raises:
        ValueError: an option out of range.
    """
    return with_last_std(_optimal(schedule, f"{head}-ddpm", eta, clip, late_clip), last_std)


def _optimal(
    schedule: Schedule, name: str, eta: float, clip: bool, late_clip: float | None
) -> Tableau:
    """Build the chain with L as `noise`, the factor on Cov0 as `covariance`, and the late cap."""
    if late_clip is not None and not late_clip > 0:
        raise ValueError(f"late_clip must be a number of grey levels > 0 or None, got {late_clip}.")
    # Clipped, the two classes have different means; for eta = 1 DDPM's is the published one.
    ddpm = eta == 1
    base = ancestral(schedule, "small", clip=clip) if ddpm else ddim(schedule, eta, clip=clip)
    alpha, sigma = schedule.levels()
    kept = np.sqrt(sigma[1:] ** 2 - base.noise**2)
    covariance = (alpha[1:] - kept * alpha[:-1] / sigma[:-1]) ** 2
    cap = np.full(base.steps, np.inf)
    landings = np.flatnonzero(schedule.times.numpy()[1:] > 0)
    if late_clip is not None and len(landings):
        cap[landings[-1]] = late_clip * GREY_LEVEL * math.sqrt(math.pi / 2)
    if sigma[-1] == 0:
        # The last transition gives the mean itself.
        covariance[-1] = 0.0
    choices = [f"eta {eta:g}"] * (eta != 1) + ["unclipped"] * (not clip)
    name = f"{name} ({', '.join(choices)})" if choices else name
    return base.replace(name=name, covariance=covariance, cap=cap)
