"""The network predicts the clean sample."""

from __future__ import annotations

from torch import Tensor

from .base import Parameterisation


class Sample(Parameterisation):
    """The network answers x_0."""

    name = "sample"
    pipeline_name = "sample"

    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.epsilon`."""
        alpha, sigma = self._levels(sample, t)
        return (sample - alpha * raw) / sigma

    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.denoised`."""
        return raw

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.training_target`."""
        return clean
