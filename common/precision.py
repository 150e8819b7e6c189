"""Precision: which arithmetic a network's forward pass uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .names import unknown_name

Precision = Literal["float32", "bf16"]


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision that does not exist."""
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))


def lower_precision(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Compute inside in bfloat16 where that is safe (autocast), for "bf16"; else change nothing."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def in_full_precision(layer: nn.Module, h: Tensor) -> Tensor:
    """Apply a network's last layer in float32 though the rest is in bfloat16.

    A result with eight significant bits is no good: neither a critic's, of which differences
    count, nor a denoiser's, whose steps may have little noise.
    """
    if not torch.is_autocast_enabled(h.device.type):
        return layer(h)
    with torch.autocast(h.device.type, enabled=False):
        return layer(h.float())
