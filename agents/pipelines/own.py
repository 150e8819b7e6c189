"""What the pipeline's own scheduler makes of the same noise at as many calls: the competitor."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..denoisers.denoiser import Denoiser
from .body import PipelineBody
from .terms import own_options


def own_scheduler(body: PipelineBody, steps: int, device: torch.device | str = "cpu") -> Any:
    """Return a scheduler like the pipeline's, set to so many steps as the pipeline sets it."""
    family = body.family
    own = family.pipeline.scheduler
    scheduler = type(own).from_config(own.config)
    options = {**family.scheduler_options(steps), **own_options(scheduler, family.tokens)}
    if "sigmas" in options:
        scheduler.set_timesteps(device=device, **options)
    else:
        scheduler.set_timesteps(steps, device=device, **options)
    return scheduler


@torch.no_grad()
def own_samples(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """Run the pipeline's own scheduler from noise (N, *shape), as the pipeline does.

    Args:
        denoiser: one with a `PipelineBody`, under its prompts and guidance.
        noise: standard normal.
        steps: what the scheduler is asked for.
        generator: of a stochastic scheduler.

    Returns:
        Finished samples (N, *shape), and the network calls that each took; guided, of two
        evaluations each.
    """
    body: Any = denoiser.body
    scheduler = own_scheduler(body, steps, noise.device)
    state = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # a flow's has none
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    for time in scheduler.timesteps:
        asked = state
        if hasattr(scheduler, "scale_model_input"):
            asked = scheduler.scale_model_input(state, time)
        times = time.to(noise.device).expand(len(asked))
        if denoiser.conditioning is None:
            answer = body(asked, times)
        else:
            answer = denoiser.conditioning.answer(body, asked, times, lambda: 1.0)
        state = scheduler.step(answer, time, state, return_dict=False, **options)[0]
    return state, len(scheduler.timesteps)
