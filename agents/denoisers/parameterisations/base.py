"""What a network predicts, and the way from its answer to the noise and the clean sample.

Each parameterisation answers the same questions (MATH.md 0.2), so nobody else asks which one a
denoiser has: a new one is a file beside this one, and a line in `parameterisations`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....envs.processes import NoiseProcess
from ....envs.processes.base import Level, Time


class Parameterisation(ABC):
    """What a network predicts on a noise process.

    Args:
        process: the forward process x_t = alpha(t) x_0 + sigma(t) eps.
        sigma_data: standard deviation of the data, > 0.

    Attributes:
        name: what `Denoiser(prediction=...)` calls it.
        pipeline_name: `prediction_type` of diffusers' schedulers; None if those do not know it.
        scales_input: whether what the network reads has unit size at every noise level.
        indexed: whether the network knows whole times by an index, as that of a chain does.

    Raises:
        ValueError: `sigma_data` is not positive and finite, or the process does not suit.
    """

    name: str
    pipeline_name: ClassVar[str | None] = None
    scales_input: ClassVar[bool] = False
    indexed: bool

    def __init__(self, process: NoiseProcess, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {sigma_data}.")
        self.process, self.sigma_data = process, float(sigma_data)
        self.indexed = process.discrete

    @abstractmethod
    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return the noise (N, *shape) in samples at time t, of the network's raw answer."""

    @abstractmethod
    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return the clean samples (N, *shape) behind samples at time t, of the raw answer."""

    @abstractmethod
    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Return what the network should answer about x_t = alpha clean + sigma noise."""

    def question(self, sample: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network reads: samples (N, *shape) and its own times (N,).

        Times are int64 where they are whole indices of noisings, else of the samples' type. One
        time for all has stride 0, which tells the network that it need embed it only once.
        """
        return sample, self._times(sample, t)

    def input_scale(self, t: Time) -> Time | float:
        """Return the factor on a sample in `question`, for times shaped as they come."""
        return 1.0

    def network_time(self, t: float) -> float:
        """Return the network's own time for time t > 0."""
        return self.process.network_time(t)

    def time_of_network(self, time: Tensor) -> Tensor:
        """Return the times of the process for the network's own: undoes `network_time`."""
        return self.process.time_of_network(time)

    @property
    def network_times(self) -> tuple[float, float]:
        """The network's own times at `t_min` and `t_max`."""
        return self.network_time(self.process.t_min), self.network_time(self.process.t_max)

    @property
    def time_range(self) -> tuple[float, float] | None:
        """Range of the network's own times for a body's `time_range`; None if they are indices."""
        return None if self.indexed else self.network_times

    def draw_times(
        self,
        process: NoiseProcess,
        n: int,
        generator: torch.Generator,
        device: torch.device,
        mean: float,
        std: float,
    ) -> Tensor:
        """Draw times (n,) of a process to train the network at.

        Args:
            process: its own, or that of a rescaled denoiser.
            n: how many.
            generator: source of randomness.
            device: where they go.
            mean: of ln sigma, for EDM's draw of noise levels; the others ignore it.
            std: likewise.
        """
        return process.draw_times(n, generator, device)

    def to_config(self) -> dict[str, Any]:
        """Return the entries of a denoiser's file that describe it."""
        return {
            "prediction": self.name,
            "sigma_data": self.sigma_data,
            "process": self.process.to_config(),
        }

    def _levels(self, sample: Tensor, t: float | Tensor) -> tuple[Level, Level]:
        return self.process.levels_for(sample, t)

    def _times(self, sample: Tensor, t: float | Tensor) -> Tensor:
        if isinstance(t, Tensor) and (t.ndim == 1 or t.requires_grad):
            times = self.process.network_time(t)
            # A time that is learned has to stay a floating tensor.
            if self.indexed and not t.requires_grad and _whole(times):
                return times.long().to(sample.device)
            times = times.to(sample)
            return times if times.ndim else times.expand(len(sample))
        value = self.process.network_time(float(t))
        index = self.indexed and value == int(value)
        return one_time(value, sample, torch.int64 if index else sample.dtype)


def check_signal(name: str, process: NoiseProcess) -> None:
    """Raise ValueError on a process whose signal vanishes: there the noise is no answer."""
    if process.levels(process.t_max)[0] == 0:
        raise ValueError(
            f"prediction={name!r} says nothing of the clean sample at the last time of "
            f"{process!r}, where no signal is left: its networks predict 'v' (if "
            "variance-preserving), 'sample' or 'flow'."
        )


def one_time(value: float, sample: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one time for all samples, (N,) with stride 0."""
    return torch.full((1,), value, dtype=dtype, device=sample.device).expand(len(sample))


def _whole(times: Tensor) -> bool:
    return not times.is_floating_point() or bool((times == times.round()).all())
