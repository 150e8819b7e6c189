"""A network of data in other units than those of the data that its denoiser serves.

A network of data y = scale x + shift serves an environment of data x. With
x_t = alpha x_0 + sigma eps, the sample without its alpha, scaled and shifted as the data are, is

    scale x_t / alpha + shift = y_0 + |scale| (sigma / alpha) sign(scale) eps,

clean network data under noise of another level. So the network is asked at the time tau of its own
process (alpha', sigma') where

    sigma'(tau) / alpha'(tau) = |scale| sigma(t) / alpha(t),

about y = alpha'(tau) (scale x_t / alpha(t) + shift), and its answers come back as
x_0 = (y_0 - shift) / scale and eps = sign(scale) eps_y. Nothing is approximated: the posterior mean
of scaled data is the scaled posterior mean. On a VE process tau = |scale| t; on a
variance-preserving one rescaling the data changes the signal-to-noise ratio, so the time moves.
`Denoiser.rescaled` makes a denoiser of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....envs.processes import NoiseProcess
from ....envs.processes.base import MOST_LEVELS, shaped
from .base import Parameterisation

# Times nearer than this to a whole noising are meant to be one: what remains is rounding.
_ROUNDING = 1e-7
# Share of a noise level by which a question may miss the network's range, for rounding.
_SLACK = 1e-6


class Rescaled(Parameterisation):
    """Another parameterisation, whose network is asked in its own units.

    Args:
        network: as the network was trained.
        scale: see the module, not 0.
        shift: a number.
        process: of the denoiser in the new units; see `Denoiser.rescaled`.

    Attributes:
        name: the network's: what it answers, in its own units.
        aligned: whether the whole noisings of two chains are the same, up to rounding.

    Raises:
        ValueError: see `Denoiser.rescaled`.
    """

    def __init__(
        self,
        network: Parameterisation,
        scale: float,
        shift: float = 0.0,
        process: NoiseProcess | None = None,
    ) -> None:
        if not (math.isfinite(scale) and scale != 0 and math.isfinite(shift)):
            raise ValueError(
                "scale must be a finite number other than 0 and shift a finite number, got "
                f"{scale} and {shift}."
            )
        if isinstance(network, Rescaled):
            raise ValueError("This denoiser is rescaled already: rescale the one it is made of.")
        process = network.process.rescaled(scale) if process is None else process
        super().__init__(process, network.sigma_data / abs(scale))
        self.name, self.indexed = network.name, network.indexed
        self.network = network
        self.scale, self.shift = float(scale), float(shift)
        self.aligned = _aligned(network.process, process, scale)
        self._sign = math.copysign(1.0, self.scale)
        self._known: dict[float, tuple[float, float, float]] = {}

    def epsilon(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.epsilon`."""
        epsilon = self.network.epsilon(raw, *self._in_its_units(sample, t))
        return epsilon if self.scale > 0 else -epsilon

    def denoised(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.denoised`."""
        clean = self.network.denoised(raw, *self._in_its_units(sample, t))
        return (clean - self.shift) / self.scale

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """See `Parameterisation.training_target`: in the network's units."""
        tau = self._answers(clean, t)[0]
        return self.network.training_target(
            self.scale * clean + self.shift, self._sign * noise, tau
        )

    def question(self, sample: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterisation.question`."""
        return self.network.question(*self._in_its_units(sample, t))

    def network_time(self, t: float) -> float:
        """See `Parameterisation.network_time`."""
        return self.network.network_time(self._levels_at(t)[0])

    @property
    def network_times(self) -> tuple[float, float]:
        """Those that the network was trained at."""
        return self.network.network_times

    def draw_times(
        self,
        process: NoiseProcess,
        n: int,
        generator: torch.Generator,
        device: torch.device,
        mean: float,
        std: float,
    ) -> Tensor:
        """See `Parameterisation.draw_times`."""
        return self.network.draw_times(process, n, generator, device, mean, std)

    def to_config(self) -> dict[str, Any]:
        """See `Parameterisation.to_config`: the network as it was trained, and what is new."""
        rescaled = {
            "scale": self.scale,
            "shift": self.shift,
            "process": self.process.to_config(),
        }
        return {**self.network.to_config(), "rescaled": rescaled}

    @classmethod
    def from_config(cls, network: Parameterisation, config: Mapping[str, Any]) -> Rescaled:
        """Rebuild it from its network and the entry "rescaled" of `to_config`."""
        process = NoiseProcess.from_config(config["process"])
        return cls(network, config["scale"], config["shift"], process)

    def _in_its_units(self, sample: Tensor, t: float | Tensor) -> tuple[Tensor, float | Tensor]:
        """Return the network's sample y (N, *shape) and its time tau for a sample x_t at time t."""
        tau, factor, offset = self._answers(sample, t)
        return factor * sample + offset, tau

    def _answers(
        self, sample: Tensor, t: float | Tensor
    ) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        """Return tau, and the factor and the offset that make y of x_t."""
        if not isinstance(t, Tensor) or (t.ndim == 0 and not t.requires_grad):
            return self._levels_at(float(t))
        tau = self._time(t)
        alpha = self.network.process.alpha(tau)
        ours = self.process.alpha(t)
        # Where no signal is left, the ratio of the alphas is that of the noise.
        ratio = self.network.process.sigma(tau) / (abs(self.scale) * self.process.sigma(t))
        factor = torch.where(ours > 0, alpha / ours, ratio) * self.scale
        return tau, shaped(factor, sample), shaped(alpha * self.shift, sample)

    def _levels_at(self, t: float) -> tuple[float, float, float]:
        """Answer `_answers` for one time as numbers, which are remembered."""
        if t not in self._known:
            if len(self._known) >= MOST_LEVELS:
                self._known.clear()
            tau = float(self._time(torch.tensor(t, dtype=torch.float64)))
            alpha, sigma = self.network.process.levels(tau)
            ours, noise = self.process.levels(t)
            ratio = alpha / ours if ours else sigma / (abs(self.scale) * noise)
            self._known[t] = tau, ratio * self.scale, alpha * self.shift
        return self._known[t]

    def _time(self, t: Tensor) -> Tensor:
        """Return the network's time tau for times t, () or (N,), differentiable."""
        if self.aligned and not t.is_floating_point():
            return t
        theirs = self.network.process
        if theirs.time_is_level and self.process.time_is_level:
            tau = t * abs(self.scale)
            self._check(t, tau)
            return tau.clamp(max=theirs.t_max)
        level = self.process.log_snr(t) - math.log(abs(self.scale))
        least = float(theirs.log_snr(theirs.t_max))
        self._check(t, level.neg().exp(), math.exp(-least))
        tau = theirs.time_of_log_snr(level.clamp(min=least))
        if not self.aligned:
            return tau
        # The log-SNR has kinks at whole noisings, where rounding would choose the side on which it
        # is differentiated: it is the later one, as everywhere, and at the last time the earlier.
        whole = t.detach().round()
        near = (t.detach() - whole).abs() < _ROUNDING
        if t.requires_grad:
            side = torch.where(whole < self.process.t_max, -1e-9, 1e-9)
            beside = theirs.time_of_log_snr((level + near * side).clamp(min=least))
            tau = beside + (tau - beside).detach()
        return torch.where(near, tau + (whole - tau).detach(), tau)

    def _check(self, t: Tensor, level: Tensor, most: float | None = None) -> None:
        """Raise ValueError for a time at which the network would be asked beyond its process."""
        most = self.network.process.t_max if most is None else most
        beyond = level.detach() > most * (1 + _SLACK)
        if bool(beyond.any()):
            first = float(t.detach()[beyond][0]) if t.ndim else float(t)
            raise ValueError(
                f"At time {first:g} the rescaled network would be asked about noise of "
                f"{float(level.detach().max()):.4g} standard deviations of signal, and it was "
                f"trained up to {most:.4g}: start the schedule later, or leave out `process`, "
                "for one on which every time is within its range."
            )


def _aligned(theirs: NoiseProcess, ours: NoiseProcess, scale: float) -> bool:
    """Tell whether the whole noisings of two chains are the same, up to rounding."""
    if theirs.betas is None or ours.betas is None:
        return False
    betas = theirs.rescaled(scale).betas
    assert betas is not None
    return len(betas) == len(ours.betas) and torch.allclose(betas, ours.betas, rtol=1e-8, atol=0)
