"""Does a network answer smoothly to its noise level? Schedule learning needs a derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser


def check_differentiable(denoiser: Denoiser, times: Sequence[float], shape: Sequence[int]) -> None:
    """Ask the network at some times, and follow its answers back to them.

    Args:
        denoiser: the network.
        times: at least two times to ask at.
        shape: of one sample.

    Raises:
        ValueError: the network refuses a fractional time, or its answer has no derivative by it, or
            one of 0 although it changes from time to time.
    """
    reason = "its answer does not depend on it differentiably (does it round or look it up?)"
    try:
        answers, slopes = zip(*(_ask(denoiser, t, shape) for t in times), strict=True)
        still = all(torch.equal(answers[0], answer) for answer in answers)
        if all(slope is not None and (slope.any() or still) for slope in slopes):
            return
    except (RuntimeError, TypeError, IndexError) as error:
        reason = f"it refuses a time that is no whole number ({str(error).splitlines()[0]})"
    raise ValueError(
        "Schedule learning needs a network that is differentiable in its noise level: "
        f"{reason}. Interpolate its time embedding, or take gradient='none' with "
        "start='trajectory-dp' or 'diffusion-dp'."
    )


def _ask(denoiser: Denoiser, t: float, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return the network's answer at a time, and the derivative of its sum by the time."""
    weight = next(denoiser.parameters())
    sample = torch.linspace(-1, 1, 3 * torch.Size(shape).numel(), device=weight.device)
    time = torch.full((3,), denoiser.network_time(t), device=weight.device, requires_grad=True)
    with torch.enable_grad():
        answer = denoiser.body(sample.view(3, *shape), time)
        if not answer.requires_grad:
            return answer, None
        (slope,) = torch.autograd.grad(answer.square().sum(), time, allow_unused=True)
    return answer.detach(), slope
