"""The noise process behind a pipeline's scheduler, and the times that the scheduler itself visits.

Of a scheduler two things count: on which process the network was trained and what it predicts, for
every solver; and how it spaces its own steps, to start from and to compare with.
"""

from __future__ import annotations

from typing import Any

import torch

from ...envs import Schedule
from ...envs.processes import NoiseProcess
from ..pretrained import chains


def terms_of(scheduler: Any, tokens: int | None = None) -> chains.Terms:
    """Read the noise process and the prediction out of a scheduler's settings.

    Args:
        scheduler: of diffusers, or a `TableauScheduler`.
        tokens: of the picture, which a dynamic shift depends on.

    Returns:
        Process, prediction, and what else the scheduler says of the network.

    Raises:
        ValueError: a scheduler of no Gaussian process, or settings that fewstep does not honour.
    """
    config = dict(scheduler.config)
    shifts = config.get("use_dynamic_shifting") and "tableau" not in config
    return chains.terms_of(scheduler, dynamic_shift(config, tokens) if shifts else None)


def dynamic_shift(config: dict[str, Any], tokens: int | None) -> float:
    """Return mu: linear in the picture's tokens between two pairs of the settings (Flux).

    Raises:
        ValueError: this pipeline's pictures have no tokens.
    """
    if tokens is None:
        raise ValueError("the scheduler shifts by the picture's tokens, which this network lacks.")
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (many - few)
    return tokens * slope + config["base_shift"] - slope * few


def own_options(scheduler: Any, tokens: int | None) -> dict[str, Any]:
    """Return what `set_timesteps` wants of a scheduler that shifts by the picture's size."""
    config = dict(scheduler.config)
    if not config.get("use_dynamic_shifting"):
        return {}
    return {"mu": dynamic_shift(config, tokens)}


def own_schedule(scheduler: Any, process: NoiseProcess) -> Schedule:
    """Return the times that a scheduler visits, after its `set_timesteps`.

    Those are the times of its noise levels, where it keeps them, and of the network's times
    elsewhere. Times that repeat, as a PNDM's second one does, are visited once.

    Raises:
        ValueError: no decreasing times.
    """
    if getattr(scheduler, "sigmas", None) is not None:
        levels = scheduler.sigmas.double().cpu()
        of_flow = not (process.discrete or process.time_is_level)
        # A flow's level u is sigma beside alpha = 1 - u.
        ratio = levels / (1 - levels) if of_flow else levels
        least = float(process.log_snr(process.t_max))
        positive = ratio[ratio > 0]
        times = process.time_of_log_snr((-positive.log()).clamp(min=least))
        if bool((ratio == 0).any()):
            times = torch.cat([times, times.new_zeros(1)])
    else:
        times = process.time_of_network(scheduler.timesteps.double().cpu())
        clean = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1.0
        times = torch.cat([times, times.new_tensor([0.0 if clean else process.t_min])])
    # In float32 the last time may come out a rounding beyond t_max, and two be nearly the same.
    times = times.clamp(max=process.t_max)
    times = torch.where((times - process.t_max).abs() < 1e-6 * process.t_max, process.t_max, times)
    whole = times.round()
    if process.discrete:
        times = torch.where((times - whole).abs() < 1e-3, whole, times)
    kept = torch.cat([times.new_ones(1), -times.diff()]) > 0
    return Schedule(process, times[kept])
