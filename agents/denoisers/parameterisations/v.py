"""The network predicts the velocity v = alpha eps - sigma x_0 of Salimans & Ho (2022)."""

from __future__ import annotations

from torch import Tensor

from ....envs.processes import NoiseProcess
from .base import Parameterisation


class Velocity(Parameterisation):
    """The network answers v, on a process with alpha^2 + sigma^2 = 1."""

    name = "v"
    pipeline_name = "v_prediction"

    def __init__(self, process: NoiseProcess, sigma_data: float = 0.5) -> None:
        super().__init__(process, sigma_data)
        if not process.variance_preserving:
            raise ValueError("prediction='v' needs a variance-preserving process (DiscreteVP).")

    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.epsilon`."""
        alpha, sigma = self._levels(sample, t)
        return alpha * raw + sigma * sample

    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.denoised`."""
        alpha, sigma = self._levels(sample, t)
        return alpha * sample - sigma * raw

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.training_target`."""
        alpha, sigma = self._levels(clean, t)
        return alpha * noise - sigma * clean
