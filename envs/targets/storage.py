"""How samples are stored: images as bytes, all else as float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.arguments import as_tensor
from ...common.shapes import is_image


def to_stored(values: Any, what: str, own: bool = False) -> Tensor:
    """Check samples and bring them to what is kept: images as bytes, or else float32.

    With `own` the floats are a copy.
    """
    samples = as_tensor(what, values)
    if samples.ndim < 2 or not samples.numel():
        raise ValueError(
            f"{what} must be a non-empty (N, *shape) array; got {tuple(samples.shape)}"
        )
    if samples.dtype == torch.uint8 and is_image(samples.shape[1:]):
        return samples
    samples = samples.to(torch.float32, copy=own)
    if not bool(samples.isfinite().all()):
        raise ValueError(f"{what} hold NaN or infinity")
    return samples


def to_float(stored: Tensor) -> Tensor:
    """Return samples as they are handed out: bytes as numbers in [-1, 1], the same everywhere.

    A GPU divides by a number as it multiplies by its inverse, which rounds otherwise; by a tensor
    it divides.
    """
    if stored.dtype != torch.uint8:
        return stored
    half = torch.full((), 127.5, device=stored.device)
    return stored.to(torch.float32).div_(half).sub_(1)
