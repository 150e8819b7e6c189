"""`RectifiedFlow`, the straight path between data and noise of flow matching (MATH.md 0.7)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import checked
from .base import NoiseProcess, Time

_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?)"


class RectifiedFlow(NoiseProcess):
    """`x_t = (1 - u) x_0 + u eps` with the noise level `u` in [0, 1] (Liu et al. 2023).

    The time is a clock of the level: `u(t) = s t / (1 + (s - 1) t)`, with the shift `s` of Stable
    Diffusion 3 (Esser et al. 2024, Eq. 23), so a uniform grid of times is the shifted grid of
    levels, and training draws levels in the same proportions. `s = 1` is `u = t`. Flux's dynamic
    shift `mu` is `s = e^mu`. At `t = 1` no signal is left: `alpha = 0`.

    Args:
        shift: `s`, > 0; above 1 more of the times are noisy ones.
        time_scale: A network is asked at `time_scale * u`, > 0: 1000 for the networks of diffusers.
        t_min: Smallest time of practical use, in (0, 1).

    Raises:
        ValueError: An argument is out of range.
    """

    names = ("flow",)
    prediction = "flow"
    t_max = 1.0

    @checked
    def __init__(self, shift: float = 1.0, time_scale: float = 1.0, t_min: float = 1e-3) -> None:
        if not (0 < shift < math.inf and 0 < time_scale < math.inf):
            raise ValueError(
                f"shift and time_scale must be positive numbers; got {shift} and {time_scale}"
            )
        if not 0 < t_min < 1:
            raise ValueError(f"t_min must lie strictly between 0 and 1; got {t_min}")
        self.shift, self.time_scale, self.t_min = float(shift), float(time_scale), float(t_min)

    @classmethod
    def named(cls, name: str) -> RectifiedFlow:
        """See `NoiseProcess.named`: `flow`, or `flow-3` with the shift 3."""
        if name == "flow":
            return cls()
        shift = re.fullmatch(f"flow-{_NUMBER}", name)
        if shift is None:
            raise ValueError(f"flow needs its shift or nothing, as in 'flow-3'; got {name!r}")
        return cls(float(shift[1]))

    def alpha(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.alpha`."""
        time = self._check_time(t)
        return (1 - time) / (1 + (self.shift - 1) * time)

    def sigma(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.sigma`."""
        return self._level(self._check_time(t))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.log_snr`; minus infinity at 1."""
        time = self._check_time(t)
        return torch.log1p(-time) - (self.shift * time).log()

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """See `NoiseProcess.time_of_log_snr`."""
        return torch.sigmoid(-self._check_log_snr(log_snr) - math.log(self.shift))

    def draw_times(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw times `(n,)` to train at, uniform in [t_min, 1]."""
        uniform = torch.rand((n,), generator=generator, device=device)
        return self.t_min + (1 - self.t_min) * uniform

    def network_time(self, t: Time) -> Time:
        """`time_scale * u(t)`."""
        return self.time_scale * self._level(t)

    def time_of_network(self, time: Time) -> Time:
        """See `NoiseProcess.time_of_network`."""
        level = time / self.time_scale
        return level / (self.shift - (self.shift - 1) * level)

    def rescaled(self, scale: float) -> RectifiedFlow:
        """See `NoiseProcess.rescaled`: another shift."""
        if abs(scale) == 1:
            return self
        return RectifiedFlow(self.shift / abs(scale), self.time_scale, self.t_min)

    def to_config(self) -> dict[str, Any]:
        """See `NoiseProcess.to_config`."""
        return {
            "kind": "RectifiedFlow",
            "shift": self.shift,
            "time_scale": self.time_scale,
            "t_min": self.t_min,
        }

    def __repr__(self) -> str:
        return f"RectifiedFlow(shift={self.shift:g}, time_scale={self.time_scale:g})"

    def _level(self, t: Time) -> Time:
        return self.shift * t / (1 + (self.shift - 1) * t)
