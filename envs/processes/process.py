"""Forward noising: the physics of the environment.

A ``NoiseProcess`` says how a clean sample decays, ``x_t = alpha(t) x_0 + sigma(t) eps`` with
``eps ~ N(0, I)``, and translates between times and log signal-to-noise ratios,
``log_snr(t) = log(alpha(t) / sigma(t))``, the clock that every solver uses. Time 0 is clean data.
``DiscreteVP`` is DDPM's chain of betas, ``VE`` the variance-exploding process of EDM. Coefficients
are float64; they are cast once, where they meet a sample.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ...common.names import unknown_name

Time = TypeVar("Time", float, Tensor)

# Levels that a process remembers; a sampler asks for at most some thousands.
MOST_LEVELS = 65_536

# How many roundings a time or a level may lie beside a whole noising and still be meant as it. The
# way from a time to its level and back rounds about twenty times.
_ROUNDINGS = 256 * torch.finfo(torch.float64).eps


class NoiseProcess(ABC):
    """A Gaussian forward process on times ``0 <= t <= t_max``.

    Attributes:
        t_max: The noisiest time, where sampling starts.
        t_min: The smallest time at which the log-SNR is of practical use (it is infinite at 0).
        grid: Key of ``SCHEDULES``: the grid of its times where none is named.
        discrete: Whether whole times count noisings, so that a network knows them by an index.
    """

    t_max: float
    t_min: float
    grid: ClassVar[str] = "uniform"
    discrete: ClassVar[bool] = False
    _kinds: ClassVar[dict[str, type[NoiseProcess]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        NoiseProcess._kinds[cls.__name__] = cls

    @abstractmethod
    def alpha(self, t: float | Tensor) -> Tensor:
        """Signal coefficient, float64, shaped as ``t``; ``ValueError`` outside ``[0, t_max]``."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Noise coefficient, float64, shaped as ``t``; ``ValueError`` outside ``[0, t_max]``."""

    @abstractmethod
    def log_snr(self, t: float | Tensor) -> Tensor:
        """``log(alpha / sigma)``, strictly decreasing in ``t`` and infinite at 0; float64."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of ``log_snr``; ``ValueError`` below ``log_snr(t_max)``, which no time has."""

    @abstractmethod
    def network_time(self, t: Time) -> Time:
        """The time that a network trained on this process is asked at."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """A JSON-able description that ``NoiseProcess.from_config`` reads back exactly."""

    def kinks(self, low: float, high: float) -> Tensor:
        """The times strictly inside ``(low, high)`` at which ``log_snr(t)`` is not smooth.

        A quadrature over times is accurate only between them. By default there are none.

        Returns:
            Ascending float64 times on the CPU, perhaps none.
        """
        return torch.empty(0, dtype=torch.float64)

    def prior_std(self, t: float) -> float:
        """Standard deviation of the noise that sampling starts from at time ``t``, its first.

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
        """Draw the first state from ``N(0, prior_std(t)^2 I)``.

        ``Schedule.prior_sample`` and ``Tableau.prior_sample`` know the first time themselves.

        Args:
            shape: ``(N, *shape)``.
            generator: Source of randomness; the global one if None.
            t: The time that sampling starts at, in ``(0, t_max]``.
            device: Where the sample lives; the generator's device if None.
            dtype: Floating type of the sample.
        """
        if device is None and generator is not None:
            device = generator.device
        noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
        std = self.prior_std(t)
        return noise if std == 1.0 else noise.mul_(std)

    def draw_times(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw times ``(n,)`` to train a denoiser at: uniform in the log-SNR by default."""
        low, high = (float(self.log_snr(t)) for t in (self.t_max, self.t_min))
        uniform = torch.rand((n,), generator=generator, device=device, dtype=torch.float64)
        return self.time_of_log_snr(low + (high - low) * uniform).float()

    def levels(self, t: float) -> tuple[float, float]:
        """``alpha`` and ``sigma`` at one time, as numbers.

        They are remembered: a sampling loop asks for the same few again and again, and looking them
        up anew costs as much as a small network.
        """
        known: dict[float, tuple[float, float]] = self.__dict__.setdefault("_known_levels", {})
        if t not in known:
            if len(known) >= MOST_LEVELS:
                known.clear()
            known[t] = float(self.alpha(t)), float(self.sigma(t))
        return known[t]

    def add_noise(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """Jump from clean samples to time ``t`` in one go: ``alpha(t) x0 + sigma(t) noise``.

        Args:
            x0: Clean samples ``(N, *shape)``.
            t: One time for all, or one for each, ``(N,)``; in ``[0, t_max]``.
            noise: Standard normal noise, shaped as ``x0``.

        Raises:
            ValueError: ``noise`` or ``t`` does not fit ``x0``, or ``t`` is out of range.
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
        """Rebuild the process that ``to_config`` described; ``ValueError`` for an unknown kind."""
        settings = dict(config)
        kind = settings.pop("kind", None)
        if kind not in NoiseProcess._kinds:
            raise unknown_name("noise process", kind, NoiseProcess._kinds)
        return NoiseProcess._kinds[kind](**settings)

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


class DiscreteVP(NoiseProcess):
    """DDPM's variance-preserving chain, ``alpha^2 + sigma^2 = 1`` (Ho et al. 2020, Eq. 4).

    Time ``t = n`` is the state after ``n`` noisings, so ``alpha(n)^2 = abar[n]`` with
    ``abar[0] = 1``. Between integers ``log alpha`` is linear in ``t``. A network trained with the
    usual 0-based index is asked at ``t - 1``.

    The slope jumps at the integers. Derivatives there are those of the side of more noise (at
    ``t_max``, the only side), and what lies within float64's rounding of an integer is taken for
    it: ``time_of_log_snr(log_snr(n)) == n`` exactly, with the same derivatives on every machine.

    Args:
        betas: Noise added by each noising, ``(T,)``, each in (0, 1).

    Attributes:
        betas: The same, float64 on the CPU; a copy at each access, for a process never changes.
        abar: Cumulative products of ``1 - betas``, ``(T + 1,)``, with ``abar[0] = 1``; likewise.

    Raises:
        ValueError: ``betas`` is not a non-empty vector of numbers inside (0, 1).
    """

    discrete = True

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"betas must be a non-empty vector; got {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("every beta must lie strictly between 0 and 1")
        self._betas = betas
        self.t_max = float(len(betas))
        self.t_min = 1.0
        zero = torch.zeros(1, dtype=torch.float64)
        log_abar = torch.cat([zero, torch.log1p(-betas).cumsum(0)])
        self._abar = log_abar.exp()
        # -log alpha(n), strictly increasing; one copy a device, so that lookups do not copy.
        self._decay = {torch.device("cpu"): -0.5 * log_abar}

    @property
    def betas(self) -> Tensor:
        """A copy of the betas, ``(T,)`` float64 on the CPU."""
        return self._betas.clone()

    @property
    def abar(self) -> Tensor:
        """A copy of ``abar``, ``(T + 1,)`` float64 on the CPU."""
        return self._abar.clone()

    @classmethod
    def linear(
        cls,
        T: int = 1000,  # noqa: N803
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> DiscreteVP:
        """Betas on a line (Ho et al. 2020)."""
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    def sigmoid(cls, T: int) -> DiscreteVP:  # noqa: N803
        """Betas on a sigmoid from 1e-5 to 1e-2, the toy process of SFT-PG (MATH.md S.8).

        With few steps it hardly noises at all: ``x_T`` stays far from ``N(0, I)``, by intention.
        """
        ramp = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64))
        return cls(ramp * (1e-2 - 1e-5) + 1e-5)

    @classmethod
    def cosine(cls, T: int = 1000) -> DiscreteVP:  # noqa: N803
        """``abar(t) = cos^2((t/T + 0.008) / 1.008 pi/2)``, betas capped at 0.999.

        Nichol & Dhariwal 2021, Eq. 17.
        """
        phase = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * (math.pi / 2)
        abar = phase.cos().square()
        return cls((1 - abar[1:] / abar[:-1]).clamp(max=0.999))

    def subsampled(self, steps: int) -> DiscreteVP:
        """The chain of ``steps`` noisings that visits this one's levels, evenly spaced in time.

        State ``k`` of the new chain has the noise of this one at time ``t_k``, ``k T / steps``
        rounded to a whole number: ``beta_k = 1 - abar(t_k) / abar(t_{k-1})``. Trained on it, a DDPM
        of 10 steps still ends in noise, which the first 10 of 1000 betas would not.

        Args:
            steps: 1 to ``T``.

        Raises:
            ValueError: ``steps`` is out of range, or so few that one noising would keep less of the
                signal than float64 can tell from nothing.
        """
        noisings = len(self._betas)
        if not 1 <= steps <= noisings:
            raise ValueError(f"a chain of {noisings} noisings has no {steps} to visit")
        times = (torch.arange(steps + 1, dtype=torch.float64) * noisings / steps).round().long()
        # Sums of the few, not differences of cumulative sums: small betas keep their digits.
        groups = torch.log1p(-self._betas).split(times.diff().tolist())
        betas = -torch.expm1(torch.stack([group.sum() for group in groups]))
        if not bool((betas < 1).all()):
            raise ValueError(
                f"{steps} of {noisings} noisings are too few: one of them would leave no signal"
            )
        return DiscreteVP(betas)

    def draw_times(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw noisings ``(n,)`` to train a denoiser at, int64, all with the same probability."""
        return torch.randint(1, int(self.t_max) + 1, (n,), generator=generator, device=device)

    def alpha(self, t: float | Tensor) -> Tensor:
        """See ``NoiseProcess.alpha``."""
        return self._log_alpha(t).exp()

    def sigma(self, t: float | Tensor) -> Tensor:
        """See ``NoiseProcess.sigma``."""
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def log_snr(self, t: float | Tensor) -> Tensor:
        """See ``NoiseProcess.log_snr``."""
        log_alpha = self._log_alpha(t)
        return log_alpha - 0.5 * (-torch.expm1(2 * log_alpha)).log()

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """See ``NoiseProcess.time_of_log_snr``."""
        value = self._check_log_snr(log_snr)
        # alpha^2 = sigmoid(2 log_snr); logaddexp keeps the digits of a nearly clean sample.
        decay = 0.5 * torch.logaddexp(torch.zeros_like(value), -2 * value)
        table = self._decay_on(value.device)
        last = len(table) - 2
        n = torch.searchsorted(table, decay.detach(), right=True).sub(1).clamp(0, last)
        gap = table[n + 1] - table[n]
        share = (decay - table[n]) / gap
        # The rounding of a log-SNR v > 0 moves the decay by up to 2 v times the decay's own.
        magnified = decay * (1 + 2 * value.clamp(0, 400))
        slack = (_ROUNDINGS * magnified / gap).clamp(max=0.01).detach()
        after = share > 1 - slack
        beyond = (n + after).clamp(max=last)
        # No distance to the whole noising, only the derivative of the segment after it.
        nothing = (decay - decay.detach()) / (table[beyond + 1] - table[beyond])
        whole = after | (share < slack)
        return torch.where(whole, n + after + nothing, n + share)

    def network_time(self, t: Time) -> Time:
        """``t - 1``: the 0-based index of DDPM, at which ``abar`` holds ``n + 1`` noisings."""
        return t - 1

    def kinks(self, low: float, high: float) -> Tensor:
        """The integers: between them ``log alpha`` is linear. See ``NoiseProcess.kinks``."""
        first, end = max(math.floor(low) + 1, 1), min(math.ceil(high), len(self._betas))
        return torch.arange(first, max(first, end), dtype=torch.float64)

    def to_config(self) -> dict[str, Any]:
        """See ``NoiseProcess.to_config``."""
        return {"kind": "DiscreteVP", "betas": self._betas.tolist()}

    def __repr__(self) -> str:
        return f"DiscreteVP(T={len(self._betas)}, abar_T={float(self._abar[-1]):.3g})"

    def _log_alpha(self, t: float | Tensor) -> Tensor:
        time = self._check_time(t)
        table = self._decay_on(time.device)
        n = (time * (1 + _ROUNDINGS)).long().clamp(max=len(table) - 2)
        return -torch.lerp(table[n], table[n + 1], time - n)

    def _decay_on(self, device: torch.device) -> Tensor:
        if device not in self._decay:
            self._decay[device] = self._decay[torch.device("cpu")].to(device)
        return self._decay[device]


class VE(NoiseProcess):
    """The variance-exploding process of EDM (Karras et al. 2022): ``alpha = 1, sigma(t) = t``.

    The time *is* the noise level.

    Args:
        sigma_min: Smallest noise level that solvers step to before data, ``t_min``.
        sigma_max: Noise level that sampling starts from, ``t_max``.

    Raises:
        ValueError: Not ``0 < sigma_min < sigma_max < inf``.
    """

    grid: ClassVar[str] = "karras"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}")
        self.t_min, self.t_max = float(sigma_min), float(sigma_max)

    def prior_std(self, t: float) -> float:
        """``sigma(t)``: EDM starts from noise at the level of the schedule's own first time."""
        return self.levels(t)[1]

    def alpha(self, t: float | Tensor) -> Tensor:
        """See ``NoiseProcess.alpha``."""
        return torch.ones_like(self._check_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """See ``NoiseProcess.sigma``."""
        return self._check_time(t).clone()

    def log_snr(self, t: float | Tensor) -> Tensor:
        """See ``NoiseProcess.log_snr``."""
        return -self._check_time(t).log()

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """See ``NoiseProcess.time_of_log_snr``."""
        return (-self._check_log_snr(log_snr)).exp().clamp(max=self.t_max)

    def network_time(self, t: Time) -> Time:
        """``t``, the noise level."""
        return t

    def to_config(self) -> dict[str, Any]:
        """See ``NoiseProcess.to_config``."""
        return {"kind": "VE", "sigma_min": self.t_min, "sigma_max": self.t_max}

    def __repr__(self) -> str:
        return f"VE(sigma_min={self.t_min:g}, sigma_max={self.t_max:g})"


_CHAINS: dict[str, Callable[[int], DiscreteVP]] = {
    "sigmoid": DiscreteVP.sigmoid,
    "linear": DiscreteVP.linear,
    "cosine": DiscreteVP.cosine,
}
_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?)"


def make_process(name: str) -> NoiseProcess:
    """Build a noise process by name.

    Args:
        name: ``sigmoid-T``, ``linear-T`` or ``cosine-T`` for a ``DiscreteVP`` of ``T`` noisings
            (``linear-1000``, say), ``linear-1000/10`` for its ``subsampled`` chain of 10; ``ve``
            for the ``VE`` of EDM, ``ve-0.002-80`` for one from ``sigma_min`` to ``sigma_max``.

    Raises:
        ValueError: The kind is unknown, its numbers are missing or no numbers, or the process
            refuses them.
    """
    kind, _, rest = name.partition("-")
    if kind in _CHAINS:
        numbers = re.fullmatch(r"(0*[1-9]\d*)(?:/(0*[1-9]\d*))?", rest)
        if numbers is None:
            raise ValueError(
                f"{kind} needs its number of noisings, perhaps with how many of them to visit "
                f"('{kind}-1000/10'), as in '{kind}-1000'; got {name!r}"
            )
        chain = _CHAINS[kind](int(numbers[1]))
        return chain if numbers[2] is None else chain.subsampled(int(numbers[2]))
    if kind != "ve":
        raise unknown_name("noise process", kind, [*_CHAINS, "ve"])
    if name == "ve":
        return VE()
    levels = re.fullmatch(f"{_NUMBER}-{_NUMBER}", rest)
    if levels is None:
        raise ValueError(f"ve needs two noise levels or none, as in 've-0.002-80'; got {name!r}")
    return VE(float(levels[1]), float(levels[2]))


def _float64(value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    # Apple's GPUs have no float64: there the coefficients are computed on the CPU.
    return (value.cpu() if value.device.type == "mps" else value).double()
