"""What every critic and metric refuses: empty, misshapen or non-finite sets of samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_samples(name: str, samples: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raise unless `samples` is a non-empty floating-point batch (N, *shape).

    Args:
        name: what the samples are called in the message.
        samples: the batch to check.
        shape: shape that one sample must have; any if None.

    Raises:
        ValueError: not floating point, no samples, or samples of another shape.
    """
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
