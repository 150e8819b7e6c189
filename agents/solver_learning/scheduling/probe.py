"""Does a network answer smoothly to its noise level? Schedule learning needs a derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser


def check_differentiable(denoiser: Denoiser, times: Sequence[float], shape: Sequence[int]) -> None:
    """Ask the network at some times, and follow its answers back to them.

    Args:
        denoiser: the network.
        times: at least two times to ask at.
        shape: of one sample.

    Raises:
        ValueError: the network refuses a fractional time, or its answer has no derivative by it, or
            only ones of 0 although it changes from time to time.
    """
    reason = "its answer does not depend on it differentiably (does it round or look it up?)"
    try:
        answers, slopes = zip(*(_ask(denoiser, t, shape) for t in times), strict=True)
        still = all(torch.equal(answers[0], answer) for answer in answers)
        known = [slope for slope in slopes if slope is not None]
        if len(known) == len(slopes) and (still or any(slope.any() for slope in known)):
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
    like = next(denoiser.parameters())
    sample = torch.linspace(-1, 1, 3 * torch.Size(shape).numel()).to(like)
    time = torch.full((3,), denoiser.network_time(t)).to(like).requires_grad_()
    under = () if denoiser.conditioning is None else (denoiser.conditioning.rows(3, like.device),)
    with torch.enable_grad():
        answer = denoiser.body(sample.view(3, *shape), time, *under)
        if not answer.requires_grad:
            return answer, None
        (slope,) = torch.autograd.grad(answer.square().sum(), time, allow_unused=True)
    return answer.detach(), slope
