"""`VE`, the variance-exploding process of EDM."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import checked
from .base import NoiseProcess

_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?)"


class VE(NoiseProcess):
    """The variance-exploding process of EDM (Karras et al. 2022): `alpha = 1, sigma(t) = t`.

    The time *is* the noise level.

    Args:
        sigma_min: Smallest noise level that solvers step to before data, `t_min`.
        sigma_max: Noise level that sampling starts from, `t_max`.

    Raises:
        ValueError: Not `0 < sigma_min < sigma_max < inf`.
    """

    names = ("ve",)
    grid = "karras"
    prediction = "edm"
    time_is_level = True

    @checked
    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}")
        self.t_min, self.t_max = float(sigma_min), float(sigma_max)

    @classmethod
    def named(cls, name: str) -> VE:
        """See `NoiseProcess.named`: `ve` is EDM's, `ve-0.002-80` has these ends."""
        if name == "ve":
            return cls()
        levels = re.fullmatch(f"ve-{_NUMBER}-{_NUMBER}", name)
        if levels is None:
            raise ValueError(
                f"ve needs two noise levels or none, as in 've-0.002-80'; got {name!r}"
            )
        return cls(float(levels[1]), float(levels[2]))

    def prior_std(self, t: float) -> float:
        """`sigma(t)`: EDM starts from noise at the level of the schedule's own first time."""
        return self.levels(t)[1]

    def alpha(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.alpha`."""
        return torch.ones_like(self._check_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.sigma`."""
        return self._check_time(t).clone()

    def log_snr(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.log_snr`."""
        return -self._check_time(t).log()

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """See `NoiseProcess.time_of_log_snr`."""
        return (-self._check_log_snr(log_snr)).exp().clamp(max=self.t_max)

    def rescaled(self, scale: float) -> VE:
        """See `NoiseProcess.rescaled`: its noise levels, divided."""
        if abs(scale) == 1:
            return self
        return VE(self.t_min / abs(scale), self.t_max / abs(scale))

    def to_config(self) -> dict[str, Any]:
        """See `NoiseProcess.to_config`."""
        return {"kind": "VE", "sigma_min": self.t_min, "sigma_max": self.t_max}

    def __repr__(self) -> str:
        return f"VE(sigma_min={self.t_min:g}, sigma_max={self.t_max:g})"
