"""What every critic and metric refuses: bad sets of samples, and rewards that return nonsense."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..common.reading import quoted


def check_samples(name: str, samples: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raise unless `samples` is a non-empty floating-point batch (N, *shape).

    Args:
        name: what the samples are called in the message.
        samples: the batch to check.
        shape: shape that one sample must have; any if None.

    Raises:
        TypeError: no tensor.
        ValueError: not floating point, no samples, or samples of another shape.
    """
    if not isinstance(samples, Tensor):
        raise TypeError(f"{name} must be a tensor (N, *shape), got {quoted(samples)}.")
    if not samples.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {samples.dtype}.")
    if samples.ndim < 2 or samples.numel() == 0:
        raise ValueError(f"{name} must hold samples (N, *shape), N > 0, got {_shape(samples)}.")
    if shape is not None and samples.shape[1:] != tuple(shape):
        expected = ", ".join(["N", *map(str, shape)])
        raise ValueError(f"{name} must have shape ({expected}), got {_shape(samples)}.")


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError if `values` hold NaN or infinity; on a GPU this waits for the device."""
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values.")


def _shape(values: Tensor) -> str:
    return str(tuple(values.shape))


def takes_condition(reward: Callable[..., object]) -> bool:
    """Tell whether a reward has an argument named `condition`, for those of its samples."""
    asked = reward.forward if isinstance(reward, torch.nn.Module) else reward
    try:
        return "condition" in inspect.signature(asked).parameters
    except (TypeError, ValueError):  # builtins have no signature
        return False


def needs_condition(reward: object) -> bool:
    """Tell whether a reward has an argument `condition` without a default."""
    asked = reward.forward if isinstance(reward, torch.nn.Module) else reward
    try:
        parameter = inspect.signature(asked).parameters.get("condition")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


def rewards_of(
    reward: Callable[..., object], samples: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Ask a reward about samples (N, *shape); return what it answers as a floating tensor (N,).

    It gets copies, which it may change.

    One that `takes_condition` gets the conditions (N, ...) too, where there are any.

    A tensor or NumPy array of numbers, whole ones and flags included, is taken; a reward with a
    `judge`, as `MMDCritic` has, is for its caller to ask.

    Raises:
        TypeError: the answer is neither a tensor nor an array of numbers.
        ValueError: it has another shape or device.
    """
    if condition is not None and takes_condition(reward):
        answer = reward(samples.clone(), condition=condition.clone())
    else:
        answer = reward(samples.clone())
    if isinstance(answer, np.ndarray) and answer.dtype.kind in "biuf":
        answer = torch.from_numpy(np.array(answer, dtype=np.float32)).to(samples.device)
    if not isinstance(answer, Tensor) or answer.is_complex():
        kind = type(answer).__name__
        detail = f" of {answer.dtype}" if isinstance(answer, Tensor | np.ndarray) else ""
        raise TypeError(
            f"{_wanted(reward)}, a tensor or array of shape (N,); it returned {kind}{detail}"
        )
    if answer.shape != samples.shape[:1]:
        hint = "; drop the last dimension" if answer.shape == (len(samples), 1) else ""
        raise ValueError(
            f"{_wanted(reward)}, shape ({len(samples)},); it returned shape {_shape(answer)}{hint}"
        )
    if answer.device != samples.device:
        raise ValueError(
            f"{_wanted(reward)} on {samples.device}, where the samples are; it returned them "
            f"on {answer.device}"
        )
    if not answer.is_floating_point():
        answer = answer.to(torch.float32)
    return answer


def check_rewards(reward: object, answer: Tensor, samples: Tensor) -> None:
    """Raise ValueError if a reward holds NaN or infinity for samples that are finite.

    On a GPU this waits for the device.
    """
    # A finite sum proves all terms finite in one pass; only an overflow needs the closer look.
    if not math.isfinite(answer.detach().sum().item()):
        bad = (~answer.isfinite()).nonzero()
        # What a reward says of a sampler that has diverged is not the reward's fault.
        if len(bad) and samples.isfinite().all():
            raise ValueError(
                f"the reward {_name(reward)!r} returned NaN or infinity for {len(bad)} of "
                f"{len(samples)} finite samples, the first at index {int(bad[0])}: a reward must "
                "be finite"
            )


def _wanted(reward: object) -> str:
    return f"the reward {_name(reward)!r} must return one number a sample"


def _name(reward: object) -> str:
    return getattr(reward, "__qualname__", type(reward).__name__).rpartition("<locals>.")[2]
