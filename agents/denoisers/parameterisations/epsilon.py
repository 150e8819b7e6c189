"""The network predicts the noise, as in Ho et al. (2020)."""

from __future__ import annotations

from torch import Tensor

from ....envs.processes import NoiseProcess
from .base import Parameterisation, check_signal


class Epsilon(Parameterisation):
    """The network answers eps."""

    name = "epsilon"
    pipeline_name = "epsilon"

    def __init__(self, process: NoiseProcess, sigma_data: float = 0.5) -> None:
        super().__init__(process, sigma_data)
        check_signal(self.name, process)

    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.epsilon`."""
        return raw

    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.denoised`."""
        alpha, sigma = self._levels(sample, t)
        return (sample - sigma * raw) / alpha

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.training_target`."""
        return noise
