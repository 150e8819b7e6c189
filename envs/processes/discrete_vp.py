"""`DiscreteVP`, the variance-preserving chain of betas that DDPM trains on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import checked
from .base import Time
from .variance_preserving import VariancePreserving

# How many roundings a time or a level may lie beside a whole noising and still be meant as it. The
# way from a time to its level and back rounds about twenty times.
_ROUNDINGS = 256 * torch.finfo(torch.float64).eps


class DiscreteVP(VariancePreserving):
    """DDPM's variance-preserving chain, `alpha^2 + sigma^2 = 1` (Ho et al. 2020, Eq. 4).

    Time `t = n` is the state after `n` noisings, so `alpha(n)^2 = abar[n]` with
    `abar[0] = 1`. Between integers `log alpha` is linear in `t`. A network trained with the
    usual 0-based index is asked at `t - 1`.

    The slope jumps at the integers. Derivatives there are those of the side of more noise (at
    `t_max`, the only side), and what lies within float64's rounding of an integer is taken for
    it: `time_of_log_snr(log_snr(n)) == n` exactly, with the same derivatives on every machine.

    The last beta may be 1: no signal is left after it (`zero_terminal_snr`), and between it and the
    noising before alpha itself is linear, for its logarithm has no end.

    Args:
        betas: Noise added by each noising, `(T,)`, each in (0, 1), the last one in (0, 1].

    Attributes:
        betas: The same, float64 on the CPU; a copy at each access, for a process never changes.
        abar: Cumulative products of `1 - betas`, `(T + 1,)`, with `abar[0] = 1`; likewise.

    Raises:
        ValueError: `betas` is not a non-empty vector of such numbers.
    """

    names = ("sigmoid", "linear", "cosine")
    discrete = True

    @checked
    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"betas must be a non-empty vector; got {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1))[:-1].all()) or not 0 < float(betas[-1]) <= 1:
            raise ValueError("every beta must lie strictly between 0 and 1; the last one may be 1")
        self._betas = betas
        self.t_max = float(len(betas))
        self.t_min = 1.0
        zero = torch.zeros(1, dtype=torch.float64)
        log_abar = torch.cat([zero, torch.log1p(-betas).cumsum(0)])
        self._abar = log_abar.exp()
        # -log alpha(n), strictly increasing; one copy a device, so that lookups do not copy.
        self._decay = {torch.device("cpu"): -0.5 * log_abar}

    @classmethod
    def named(cls, name: str) -> DiscreteVP:
        """See `NoiseProcess.named`: `linear-1000`, or `linear-1000/10`, of which it is 10 steps.

        With `-zero-snr` at the end no signal is left after the last noising.
        """
        kind, _, rest = name.partition("-")
        numbers = re.fullmatch(r"(0*[1-9]\d*)(?:/(0*[1-9]\d*))?(-zero-snr)?", rest)
        if numbers is None:
            raise ValueError(
                f"{kind} needs its number of noisings, perhaps with how many of them to visit "
                f"('{kind}-1000/10'), as in '{kind}-1000'; got {name!r}"
            )
        makers: dict[str, Callable[[int], DiscreteVP]] = {
            "sigmoid": cls.sigmoid,
            "linear": cls.linear,
            "cosine": cls.cosine,
        }
        chain = makers[kind](int(numbers[1]))
        chain = chain.zero_terminal_snr() if numbers[3] else chain
        return chain if numbers[2] is None else chain.subsampled(int(numbers[2]))

    @property
    def betas(self) -> Tensor:
        """A copy of the betas, `(T,)` float64 on the CPU."""
        return self._betas.clone()

    @property
    def abar(self) -> Tensor:
        """A copy of `abar`, `(T + 1,)` float64 on the CPU."""
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

        With few steps it hardly noises at all: `x_T` stays far from `N(0, I)`, by intention.
        """
        ramp = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64))
        return cls(ramp * (1e-2 - 1e-5) + 1e-5)

    @classmethod
    def cosine(cls, T: int = 1000) -> DiscreteVP:  # noqa: N803
        """`abar(t) = cos^2((t/T + 0.008) / 1.008 pi/2)`, betas capped at 0.999.

        Nichol & Dhariwal 2021, Eq. 17.
        """
        phase = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * (math.pi / 2)
        abar = phase.cos().square()
        return cls((1 - abar[1:] / abar[:-1]).clamp(max=0.999))

    def subsampled(self, steps: int) -> DiscreteVP:
        """The chain of `steps` noisings that visits this one's levels, evenly spaced in time.

        State `k` of the new chain has the noise of this one at time `t_k`, `k T / steps`
        rounded to a whole number: `beta_k = 1 - abar(t_k) / abar(t_{k-1})`. Trained on it, a DDPM
        of 10 steps still ends in noise, which the first 10 of 1000 betas would not.

        Args:
            steps: 1 to `T`.

        Raises:
            ValueError: `steps` is out of range, or so few that one noising would keep less of the
                signal than float64 can tell from nothing.
        """
        noisings = len(self._betas)
        if not 1 <= steps <= noisings:
            raise ValueError(f"a chain of {noisings} noisings has no {steps} to visit")
        times = (torch.arange(steps + 1, dtype=torch.float64) * noisings / steps).round().long()
        # Sums of the few, not differences of cumulative sums: small betas keep their digits.
        groups = torch.log1p(-self._betas).split(times.diff().tolist())
        betas = -torch.expm1(torch.stack([group.sum() for group in groups]))
        if not bool((betas < 1)[:-1].all()) or float(betas[-1]) == 1 != float(self._betas[-1]):
            raise ValueError(
                f"{steps} of {noisings} noisings are too few: one of them would leave no signal"
            )
        return DiscreteVP(betas)

    def zero_terminal_snr(self) -> DiscreteVP:
        """The chain whose alphas are shifted and stretched so that the last one is 0.

        Lin et al. 2024 ("Common diffusion noise schedules and sample steps are flawed"), Algorithm
        1; MATH.md 0.8: the first alpha stays as it is. Its networks predict "v", "sample" or
        "flow", and its grids start at the last noising ("trailing", "uniform").

        Raises:
            ValueError: The chain has one noising only.
        """
        if len(self._betas) < 2:
            raise ValueError("a chain of one noising has no last alpha beside its first")
        alpha = self._abar[1:].sqrt()
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        abar = torch.cat([self._abar[:1], alpha.square()])
        return DiscreteVP(1 - abar[1:] / abar[:-1])

    def draw_times(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw noisings `(n,)` to train a denoiser at, int64, all with the same probability."""
        return torch.randint(1, int(self.t_max) + 1, (n,), generator=generator, device=device)

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """See `NoiseProcess.time_of_log_snr`."""
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
        times = torch.where(whole, n + after + nothing, n + share)
        if self._betas[-1] < 1:
            return times
        # The last segment ends where nothing is left, and alpha falls to it on a line.
        lost = -torch.expm1(table[last] - decay)
        return torch.where(decay > table[last], last + lost, times.clamp(max=last))

    def network_time(self, t: Time) -> Time:
        """`t - 1`: the 0-based index of DDPM, at which `abar` holds `n + 1` noisings."""
        return t - 1

    def time_of_network(self, time: Time) -> Time:
        """See `NoiseProcess.time_of_network`."""
        return time + 1

    def rescaled(self, scale: float) -> DiscreteVP:
        """See `NoiseProcess.rescaled`: the noise levels match after every whole noising."""
        if abs(scale) == 1:
            return self
        # -log abar' = log(1 + (abar^-1 - 1) / scale^2), by differences for each noising.
        decay = -torch.log1p(-self._betas).cumsum(0)
        decay = torch.log1p(torch.expm1(decay) / scale**2)
        return DiscreteVP(-torch.expm1(-decay.diff(prepend=decay.new_zeros(1))))

    def kinks(self, low: float, high: float) -> Tensor:
        """The integers: between them `log alpha` is linear. See `NoiseProcess.kinks`."""
        first, end = max(math.floor(low) + 1, 1), min(math.ceil(high), len(self._betas))
        return torch.arange(first, max(first, end), dtype=torch.float64)

    def to_config(self) -> dict[str, Any]:
        """See `NoiseProcess.to_config`."""
        return {"kind": "DiscreteVP", "betas": self._betas.tolist()}

    def __repr__(self) -> str:
        return f"DiscreteVP(T={len(self._betas)}, abar_T={float(self._abar[-1]):.3g})"

    def _log_alpha(self, t: float | Tensor) -> Tensor:
        time = self._check_time(t)
        table = self._decay_on(time.device)
        n = (time * (1 + _ROUNDINGS)).long().clamp(max=len(table) - 2)
        if self._betas[-1] < 1:
            return -torch.lerp(table[n], table[n + 1], time - n)
        last = n == len(table) - 2
        inner = -torch.lerp(table[n], table[torch.where(last, n, n + 1)], time - n)
        # In the last segment alpha falls to 0 on a line.
        return torch.where(last, inner + torch.log1p(-torch.where(last, time - n, 0.0)), inner)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a GPU keeps: a file that pickles a process opens without one."""
        cpu = torch.device("cpu")
        return {**self.__dict__, "_decay": {cpu: self._decay[cpu]}}

    def _decay_on(self, device: torch.device) -> Tensor:
        if device not in self._decay:
            self._decay[device] = self._decay[torch.device("cpu")].to(device)
        return self._decay[device]
