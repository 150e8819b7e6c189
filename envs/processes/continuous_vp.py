"""`ContinuousVP`, the variance-preserving SDE of score networks (MATH.md 0.9)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import checked
from .variance_preserving import VariancePreserving

_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?)"


class ContinuousVP(VariancePreserving):
    """The VP SDE with a linear beta(t) on times 0 to 1 (Song et al. 2021, Eq. 32).

    `log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2` and `alpha^2 + sigma^2 = 1`.

    Args:
        beta_min: beta at time 0, >= 0.
        beta_max: beta at time 1, above `beta_min`.
        time_scale: A network is asked at `time_scale * t`, > 0: 999 for the publication's.
        t_min: Smallest time of practical use, in (0, 1).

    Raises:
        ValueError: An argument is out of range.
    """

    names = ("vp",)
    t_max = 1.0

    @checked
    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        time_scale: float = 999.0,
        t_min: float = 1e-3,
    ) -> None:
        if not 0 <= beta_min < beta_max < math.inf:
            raise ValueError(f"need 0 <= beta_min < beta_max; got {beta_min} and {beta_max}")
        if not (0 < time_scale < math.inf and 0 < t_min < 1):
            raise ValueError(
                f"time_scale must be positive and t_min inside (0, 1); got {time_scale} and {t_min}"
            )
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self.time_scale, self.t_min = float(time_scale), float(t_min)

    @classmethod
    def named(cls, name: str) -> ContinuousVP:
        """See `NoiseProcess.named`: `vp`, or `vp-0.1-20` with these betas."""
        if name == "vp":
            return cls()
        betas = re.fullmatch(f"vp-{_NUMBER}-{_NUMBER}", name)
        if betas is None:
            raise ValueError(f"vp needs two betas or none, as in 'vp-0.1-20'; got {name!r}")
        return cls(float(betas[1]), float(betas[2]))

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """See `NoiseProcess.time_of_log_snr`."""
        value = self._check_log_snr(log_snr)
        # -2 log alpha; logaddexp keeps the digits of a nearly clean sample, and so does the root.
        decay = torch.logaddexp(torch.zeros_like(value), -2 * value)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * decay).sqrt()
        # Without beta_min both are 0 at time 0.
        time = 2 * decay / (self.beta_min + root).clamp_min(torch.finfo(torch.float64).tiny)
        return time.clamp(max=self.t_max)

    def draw_times(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw times `(n,)` to train at, uniform in [t_min, 1], as the publication does."""
        uniform = torch.rand((n,), generator=generator, device=device)
        return self.t_min + (1 - self.t_min) * uniform

    def to_config(self) -> dict[str, Any]:
        """See `NoiseProcess.to_config`."""
        return {
            "kind": "ContinuousVP",
            "beta_min": self.beta_min,
            "beta_max": self.beta_max,
            "time_scale": self.time_scale,
            "t_min": self.t_min,
        }

    def __repr__(self) -> str:
        return f"ContinuousVP(beta_min={self.beta_min:g}, beta_max={self.beta_max:g})"

    def _log_alpha(self, t: float | Tensor) -> Tensor:
        time = self._check_time(t)
        return -time * (time * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)
