"""Forward noising: the physics of the environment.

A `NoiseProcess` says how a clean sample decays, `x_t = alpha(t) x_0 + sigma(t) eps` with
`eps ~ N(0, I)`, and translates between times and log signal-to-noise ratios,
`log_snr(t) = log(alpha(t) / sigma(t))`, the clock that every solver uses. Time 0 is clean data.
Coefficients are float64; they are cast once, where they meet a sample.

Whoever has a process asks it for its properties, never for its class: a new process is a file
beside this one, and a line in `envs.processes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import isabstract
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ...common.names import unknown_name

Time = TypeVar("Time", float, Tensor)

# A coefficient: one number for all samples, or a tensor that broadcasts against them.
Level = float | Tensor

# Levels that a process remembers; a sampler asks for at most some thousands.
MOST_LEVELS = 65_536


class NoiseProcess(ABC):
    """A Gaussian forward process on times `0 <= t <= t_max`.

    Attributes:
        t_max: The noisiest time, where sampling starts.
        t_min: The smallest time at which the log-SNR is of practical use (it is infinite at 0).
        names: The first words of the names that `make_process` gives to `named`.
        grid: Key of `SCHEDULES`: the grid of its times where none is named.
        prediction: Key of `PARAMETERISATIONS`: what every network on it predicts; None if that
            is free.
        discrete: Whether whole times count noisings, so that a network knows them by an index.
        variance_preserving: Whether `alpha^2 + sigma^2 = 1` at every time.
        time_scale: A network is asked at so many times the time.
        time_is_level: Whether the time is the noise level `sigma / alpha`, as in EDM.
    """

    t_max: float
    t_min: float
    time_scale: float = 1.0
    names: ClassVar[tuple[str, ...]] = ()
    grid: ClassVar[str] = "uniform"
    prediction: ClassVar[str | None] = None
    discrete: ClassVar[bool] = False
    variance_preserving: ClassVar[bool] = False
    time_is_level: ClassVar[bool] = False
    _kinds: ClassVar[dict[str, type[NoiseProcess]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        NoiseProcess._kinds[cls.__name__] = cls

    @abstractmethod
    def alpha(self, t: float | Tensor) -> Tensor:
        """Signal coefficient, float64, shaped as `t`; `ValueError` outside `[0, t_max]`."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Noise coefficient, float64, shaped as `t`; `ValueError` outside `[0, t_max]`."""

    @abstractmethod
    def log_snr(self, t: float | Tensor) -> Tensor:
        """`log(alpha / sigma)`, strictly decreasing in `t`; float64.

        It is infinite at 0, and minus infinite where alpha is 0.
        """

    @abstractmethod
    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of `log_snr`; `ValueError` below `log_snr(t_max)`, which no time has."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """A JSON-able description that `NoiseProcess.from_config` reads back exactly."""

    @classmethod
    def named(cls, name: str) -> NoiseProcess:
        """Build the process that a name of `make_process` stands for.

        Raises:
            ValueError: The numbers in the name are missing or no numbers, or are refused.
        """
        raise ValueError(f"{cls.__name__} has no names")

    @property
    def betas(self) -> Tensor | None:
        """The noise added by each noising, `(T,)` float64; None unless the process is a chain."""
        return None

    def network_time(self, t: Time) -> Time:
        """The time that a network trained on this process is asked at, `time_scale * t`."""
        return t if self.time_scale == 1 else self.time_scale * t

    def time_of_network(self, time: Time) -> Time:
        """Inverse of `network_time`."""
        return time if self.time_scale == 1 else time / self.time_scale

    def rescaled(self, scale: float) -> NoiseProcess:
        """The process whose `sigma / alpha` is this one's divided by `|scale|`, at matching times.

        With it a network of data `y = scale x + shift` serves data `x`: its times are matched, so
        every one of them lies within the range that the network was trained on.

        Args:
            scale: Not 0.

        Raises:
            ValueError: This kind of process has no such partner.
        """
        if abs(scale) == 1:
            return self
        raise ValueError(f"for a {type(self).__name__} name the process of the rescaled denoiser")

    def kinks(self, low: float, high: float) -> Tensor:
        """The times strictly inside `(low, high)` at which `log_snr(t)` is not smooth.

        A quadrature over times is accurate only between them. By default there are none.

        Returns:
            Ascending float64 times on the CPU, perhaps none.
        """
        return torch.empty(0, dtype=torch.float64)

    def prior_std(self, t: float) -> float:
        """Standard deviation of the noise that sampling starts from at time `t`, its first.

        1 at every time, the papers' convention for variance-preserving processes.
        """
        return 1.0

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        t: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw the first state from `N(0, prior_std(t)^2 I)`.

        `Schedule.prior_sample` and `Tableau.prior_sample` know the first time themselves.

        Args:
            shape: `(N, *shape)`.
            generator: Source of randomness; the global one if None.
            t: The time that sampling starts at, in `(0, t_max]`.
            device: Where the sample lives; the generator's device if None.
            dtype: Floating type of the sample.
        """
        if device is None and generator is not None:
            device = generator.device
        noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
        std = self.prior_std(t)
        return noise if std == 1.0 else noise.mul_(std)

    def draw_times(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw times `(n,)` to train a denoiser at: uniform in the log-SNR by default."""
        low, high = (float(self.log_snr(t)) for t in (self.t_max, self.t_min))
        uniform = torch.rand((n,), generator=generator, device=device, dtype=torch.float64)
        return self.time_of_log_snr(low + (high - low) * uniform).float()

    def levels(self, t: float) -> tuple[float, float]:
        """`alpha` and `sigma` at one time, as numbers.

        They are remembered: a sampling loop asks for the same few again and again, and looking them
        up anew costs as much as a small network.
        """
        known: dict[float, tuple[float, float]] = self.__dict__.setdefault("_known_levels", {})
        if t not in known:
            if len(known) >= MOST_LEVELS:
                known.clear()
            known[t] = float(self.alpha(t)), float(self.sigma(t))
        return known[t]

    def levels_for(self, sample: Tensor, t: float | Tensor) -> tuple[Level, Level]:
        """`alpha` and `sigma` as factors on samples.

        Args:
            sample: `(N, *shape)`.
            t: One time for all, a number or `()`; or one for each sample, `(N,)`.

        Returns:
            Numbers where the time is a number, else tensors of the samples' type that broadcast
            against them.
        """
        if not isinstance(t, Tensor):
            return self.levels(float(t))
        return shaped(self.alpha(t), sample), shaped(self.sigma(t), sample)

    def add_noise(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """Jump from clean samples to time `t` in one go: `alpha(t) x0 + sigma(t) noise`.

        Args:
            x0: Clean samples `(N, *shape)`.
            t: One time for all, or one for each, `(N,)`; in `[0, t_max]`.
            noise: Standard normal noise, shaped as `x0`.

        Raises:
            ValueError: `noise` or `t` does not fit `x0`, or `t` is out of range.
        """
        if noise.shape != x0.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 {tuple(x0.shape)}")
        alpha, sigma = self.alpha(t).to(x0), self.sigma(t).to(x0)
        if alpha.ndim:
            if alpha.shape != x0.shape[:1]:
                raise ValueError(
                    f"t must be a float or have shape ({x0.shape[0]},), one time a sample; "
                    f"got {tuple(alpha.shape)}"
                )
            column = (-1,) + (1,) * (x0.ndim - 1)
            alpha, sigma = alpha.reshape(column), sigma.reshape(column)
        return alpha * x0 + sigma * noise

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> NoiseProcess:
        """Rebuild the process that `to_config` described; `ValueError` for an unknown kind."""
        settings = dict(config)
        kind = settings.pop("kind", None)
        kinds = {name: each for name, each in NoiseProcess._kinds.items() if not isabstract(each)}
        if kind not in kinds:
            raise unknown_name("noise process", kind, kinds)
        return kinds[kind](**settings)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, NoiseProcess) and self.to_config() == other.to_config()

    __hash__ = None  # type: ignore[assignment]

    def _check_time(self, t: float | Tensor) -> Tensor:
        time = _float64(t)
        if not bool(((time >= 0) & (time <= self.t_max)).all()):
            raise ValueError(f"times must lie in [0, {self.t_max:g}]; got {t}")
        return time

    def _check_log_snr(self, log_snr: float | Tensor) -> Tensor:
        value = _float64(log_snr)
        least = float(self.log_snr(self.t_max))
        # Callers build grids from log_snr(t_max) by arithmetic: forgive its last digits.
        if not bool((value >= least - 1e-9 * max(1.0, abs(least))).all()):
            raise ValueError(f"log-SNR must be at least {least:g}, that of t_max; got {log_snr}")
        return value


def shaped(level: Tensor, sample: Tensor) -> Tensor:
    """Cast a coefficient, `()` or `(N,)`, so that it broadcasts against samples `(N, *shape)`."""
    level = level.to(sample)
    return level.view(-1, *[1] * (sample.ndim - 1)) if level.ndim else level


def _float64(value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    # Apple's GPUs have no float64: there the coefficients are computed on the CPU.
    return (value.cpu() if value.device.type == "mps" else value).double()
