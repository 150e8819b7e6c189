"""EDM's preconditioning (Karras et al. 2022, Table 1; MATH.md 3.7).

The network sees and returns numbers of unit size, and is asked at log(sigma) / 4:

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....envs.processes import NoiseProcess
from ....envs.processes.base import Level, Time
from .base import Parameterisation, one_time


class EDM(Parameterisation):
    """The network answers F, on a process whose time is the noise level."""

    name = "edm"
    scales_input = True

    def __init__(self, process: NoiseProcess, sigma_data: float = 0.5) -> None:
        super().__init__(process, sigma_data)
        if not process.time_is_level:
            raise ValueError("prediction='edm' needs a variance-exploding process (VE).")

    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.epsilon`: (x - D) / sigma, without its cancellation."""
        sigma, scale = self._sigma_and_scale(sample, t)
        return scale * (sigma * scale * sample - self.sigma_data * raw)

    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.denoised`."""
        sigma, scale = self._sigma_and_scale(sample, t)
        skip = (self.sigma_data * scale) ** 2
        return skip * sample + sigma * self.sigma_data * scale * raw

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Return (clean - c_skip x_t) / c_out.

        The plain squared error of the network is then EDM's loss with its weights
        (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
        """
        sigma, scale = self._sigma_and_scale(clean, t)
        return scale * (sigma / self.sigma_data * clean - self.sigma_data * noise)

    def question(self, sample: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterisation.question`."""
        sigma, scale = self._sigma_and_scale(sample, t)
        if not isinstance(sigma, Tensor):
            return scale * sample, one_time(math.log(sigma) / 4, sample, sample.dtype)
        # One time for all becomes one of stride 0.
        return scale * sample, (sigma.log() / 4).flatten().expand(len(sample))

    def input_scale(self, t: Time) -> Time | float:
        """Return c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return (t**2 + self.sigma_data**2) ** -0.5

    def network_time(self, t: float) -> float:
        """See `Parameterisation.network_time`: log(sigma) / 4."""
        return math.log(self.process.levels(t)[1]) / 4

    def time_of_network(self, time: Tensor) -> Tensor:
        """See `Parameterisation.time_of_network`."""
        return (4 * time).exp()

    def draw_times(
        self,
        process: NoiseProcess,
        n: int,
        generator: torch.Generator,
        device: torch.device,
        mean: float,
        std: float,
    ) -> Tensor:
        """See `Parameterisation.draw_times`: noise levels are log-normal."""
        if not process.time_is_level:
            return super().draw_times(process, n, generator, device, mean, std)
        normal = torch.randn(n, generator=generator, device=device, dtype=torch.float64)
        # In float32 a clamped level could lie beyond t_max.
        return (mean + std * normal).exp().clamp(process.t_min, process.t_max)

    def _sigma_and_scale(self, sample: Tensor, t: float | Tensor) -> tuple[Level, Level]:
        """Return sigma and c_in; the rest follows from them."""
        _, sigma = self._levels(sample, t)
        return sigma, (sigma**2 + self.sigma_data**2) ** -0.5
