"""The network predicts the score, as in Song et al. (2021)."""

from __future__ import annotations

from torch import Tensor

from ....envs.processes import NoiseProcess
from .base import Parameterisation, check_signal


class Score(Parameterisation):
    """The network answers the gradient of the log-density of x_t, -eps / sigma."""

    name = "score"

    def __init__(self, process: NoiseProcess, sigma_data: float = 0.5) -> None:
        super().__init__(process, sigma_data)
        check_signal(self.name, process)

    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.epsilon`."""
        _, sigma = self._levels(sample, t)
        return -sigma * raw

    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return (x_t + sigma^2 raw) / alpha, Tweedie's formula."""
        alpha, sigma = self._levels(sample, t)
        return (sample + sigma**2 * raw) / alpha

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.training_target`; the plain squared error weighs 1 / sigma^2."""
        _, sigma = self._levels(clean, t)
        return -noise / sigma
