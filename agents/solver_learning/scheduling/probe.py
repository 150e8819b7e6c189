"""Does a network answer smoothly to its noise level? Those who learn times need a derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser

# What networks raise at what they do not take.
_REFUSALS = (RuntimeError, TypeError, IndexError)


def check_differentiable(
    denoiser: Denoiser, times: Sequence[float], shape: Sequence[int], *, learner: str, instead: str
) -> None:
    """Ask the network at some times, and follow its answers back to them.

    Args:
        denoiser: the network.
        times: at least two times to ask at.
        shape: of one sample.
        learner: who needs it, the beginning of the sentence that refuses a network.
        instead: what the learner may be told to do without it, the end of that sentence.

    Raises:
        ValueError: the network does not take the samples; or it refuses a fractional time, or its
            answer has no derivative by it, or only ones of 0 although it changes from time to time.
    """
    _check_takes(denoiser, times[0], shape)
    reason = "its answer does not depend on it differentiably (does it round or look it up?)"
    try:
        answers, slopes = zip(*(_ask(denoiser, t, shape) for t in times), strict=True)
        still = all(torch.equal(answers[0], answer) for answer in answers)
        known = [slope for slope in slopes if slope is not None]
        if len(known) == len(slopes) and (still or any(slope.any() for slope in known)):
            return
    except _REFUSALS as error:
        reason = f"it refuses a time that is no whole number ({_first_line(error)})"
    raise ValueError(
        f"{learner} needs a network that is differentiable in its noise level: {reason}. "
        f"Interpolate its time embedding, or {instead}."
    )


def _check_takes(denoiser: Denoiser, t: float, shape: Sequence[int]) -> None:
    """Raise ValueError for a network that refuses the samples also at whole times, of any kind."""
    refusals = []
    for dtype in (None, torch.long):
        sample, time, under = _question(denoiser, t, shape)
        try:
            with torch.no_grad():
                denoiser.body(sample, time.round().to(dtype or time.dtype), *under)
            return
        except _REFUSALS as error:
            refusals.append(_first_line(error))
    raise ValueError(
        f"The network does not take samples of shape {tuple(shape)}, whatever the time: "
        f"{refusals[-1]}."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _question(
    denoiser: Denoiser, t: float, shape: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return three samples, as many times and, of a conditional network, conditions."""
    like = next(denoiser.parameters())
    sample = torch.linspace(-1, 1, 3 * torch.Size(shape).numel()).to(like).view(3, *shape)
    time = torch.full((3,), denoiser.network_time(t)).to(like)
    under = () if denoiser.conditioning is None else (denoiser.conditioning.rows(3, like.device),)
    return sample, time, under


def _ask(denoiser: Denoiser, t: float, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return the network's answer at a time, and the derivative of its sum by the time."""
    sample, time, under = _question(denoiser, t, shape)
    time.requires_grad_()
    with torch.enable_grad():
        answer = denoiser.body(sample, time, *under)
        if not answer.requires_grad:
            return answer, None
        (slope,) = torch.autograd.grad(answer.square().sum(), time, allow_unused=True)
    return answer.detach(), slope
