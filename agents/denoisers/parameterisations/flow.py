"""The network predicts the velocity eps - x_0 of flow matching (Lipman et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from .base import Parameterisation


class Flow(Parameterisation):
    """The network answers eps - x_0, on any process; on `RectifiedFlow` it is dx_t / du."""

    name = "flow"

    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return (x_t + alpha raw) / (alpha + sigma)."""
        alpha, sigma = self._levels(sample, t)
        return (sample + alpha * raw) / (alpha + sigma)

    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return (x_t - sigma raw) / (alpha + sigma)."""
        alpha, sigma = self._levels(sample, t)
        return (sample - sigma * raw) / (alpha + sigma)

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.training_target`."""
        return noise - clean
