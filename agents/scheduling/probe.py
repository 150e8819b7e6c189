"""Does a network answer smoothly to its noise level? Schedule learning needs a derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..denoiser import Denoiser


def check_differentiable(denoiser: Denoiser, t: float, shape: Sequence[int]) -> None:
    """Ask the network once, and follow its answer back to its time.

    Args:
        denoiser: the network.
        t: a time to ask at.
        shape: of one sample.

    Raises:
        ValueError: the network refuses a fractional time, or its answer has no derivative by it.
    """
    device = next(denoiser.parameters()).device
    sample = torch.zeros(1, *shape, device=device)
    time = torch.full((1,), denoiser.network_time(t), device=device, requires_grad=True)
    reason = "its answer does not depend on it differentiably (does it round or look it up?)"
    slope = None
    try:
        with torch.enable_grad():
            answer = denoiser.body(sample, time)
            if answer.requires_grad:
                (slope,) = torch.autograd.grad(answer.sum(), time, allow_unused=True)
    except (RuntimeError, TypeError, IndexError) as error:
        reason = f"it refuses a time that is no whole number ({str(error).splitlines()[0]})"
    if slope is None:
        raise ValueError(
            "Schedule learning needs a network that is differentiable in its noise level: "
            f"{reason}. Interpolate its time embedding, or take gradient='none' with "
            "start='trajectory-dp' or 'diffusion-dp'."
        )
