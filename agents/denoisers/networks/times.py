"""Network times: shared by a batch, stretched from their own range, embedded.

`time` is the network's own time (see `NoiseProcess.network_time`), one value a sample. When the
whole batch shares one time the denoiser passes a tensor of stride 0 (an expanded scalar): all
bodies then embed it once instead of N times. Whole indices of noisings come as int64, all other
times as floats (see `Denoiser`). Bodies resolve times 0 .. 1000 or so; `time_range` stretches
others, such as EDM's log(sigma) / 4 from -1.6 to 1.1, to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def shared(values: Tensor) -> Tensor:
    """Reduce a time or a condition that the whole batch shares (stride 0) to one row."""
    return values[:1] if values.ndim and values.stride(0) == 0 else values


def check_range(time_range: Sequence[float] | None) -> list[float] | None:
    """Validate a range of times; JSON gives it as a list."""
    if time_range is None:
        return None
    if len(time_range) != 2:
        raise ValueError(f"time_range must be (low, high), got {tuple(time_range)}.")
    low, high = time_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"time_range must be finite and increasing, got {tuple(time_range)}.")
    return [float(low), float(high)]


def stretched(time: Tensor, time_range: Sequence[float], top: float) -> Tensor:
    """Map floating times linearly from a range onto 0 .. top."""
    low, high = time_range
    return (time - low) * (top / (high - low))


class SinusoidalTime(nn.Module):
    """Sines and cosines of the time at geometric frequencies, then two linear layers.

    Args:
        width: number of sines and cosines, even.
        out: width of the layers.
        time_range: (low, high) of times that are mapped linearly onto 0 .. 1000 first.
    """

    frequencies: Tensor

    def __init__(self, width: int, out: int, time_range: Sequence[float] | None = None) -> None:
        super().__init__()
        self.time_range = check_range(time_range)
        half = width // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, time: Tensor) -> Tensor:
        """Map times (N,) to embeddings (N, out)."""
        if self.time_range is not None:
            time = stretched(time, self.time_range, 1000.0)
        angles = time.unsqueeze(-1) * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1))
