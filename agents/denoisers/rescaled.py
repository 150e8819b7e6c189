"""Denoisers in other units than those of the data that their network was trained on.

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
`Denoiser.rescaled` is this class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...common.precision import Precision
from ...envs.processes.process import MOST_LEVELS, VE, DiscreteVP, NoiseProcess
from ..variance.head import HeadInputs
from .denoiser import Denoiser, shaped

# Times nearer than this to a whole noising are meant to be one: what remains is rounding.
_ROUNDING = 1e-7
# Share of a noise level by which a question may miss the network's range, for rounding.
_SLACK = 1e-6


class RescaledDenoiser(Denoiser):
    """A denoiser that asks another one's network in the network's own units.

    It shares the body with the denoiser it is made of: training either trains both. `prediction` is
    what the body returns, in the network's units; `sigma_data` and `clip` speak of this denoiser's.

    Args:
        denoiser: as the network was trained.
        scale: see the module, not 0.
        shift: a number.
        process: of the new denoiser; see `Denoiser.rescaled`.
        clip: see `Denoiser`, in the new units.

    Raises:
        ValueError: see `Denoiser.rescaled`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        shift: float = 0.0,
        process: NoiseProcess | None = None,
        clip: bool = False,
    ) -> None:
        if not (math.isfinite(scale) and scale != 0 and math.isfinite(shift)):
            raise ValueError(
                "scale must be a finite number other than 0 and shift a finite number, got "
                f"{scale} and {shift}."
            )
        if isinstance(denoiser, RescaledDenoiser):
            raise ValueError("This denoiser is rescaled already: rescale the one it is made of.")
        process = same_times(denoiser.process, scale) if process is None else process
        aligned = _aligned(denoiser.process, process, scale)
        if denoiser.head is not None or (denoiser.gamma is not None and not aligned):
            raise ValueError(
                "Its Gamma or second head holds variances of the network's own process and units: "
                "rescale a denoiser without, and train `VarianceLearning` on the new one."
            )
        nn.Module.__init__(self)
        self.scale, self.shift = float(scale), float(shift)
        self.body = denoiser.body
        # Its own wrapper of the same body, so that its precision is its own as well.
        self.network = Denoiser(
            denoiser.body, denoiser.process, denoiser.prediction, denoiser.sigma_data
        )
        self.process = process
        self.prediction = denoiser.prediction
        self.sigma_data = denoiser.sigma_data / abs(scale)
        self.clip = bool(clip)
        # The pipeline's own variance goes with its own process.
        self.variance = None
        self.gamma, self.head = denoiser.gamma, None
        self.precision = "float32"
        self._aligned = aligned
        self._known: dict[float, tuple[float, float, float]] = {}
        self.eval()

    def __repr__(self) -> str:
        return (
            f"RescaledDenoiser(scale={self.scale:g}, shift={self.shift:g}, "
            f"process={self.process!r}, network={type(self.body).__name__} on "
            f"{self.network.process!r})"
        )

    def run_with(
        self, precision: Precision = "float32", channels_last: bool = False, compile: bool = False
    ) -> Denoiser:
        """See `Denoiser.run_with`."""
        self.network.run_with(precision, channels_last, compile)
        self.precision = precision
        return self

    def forward(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return the body's raw prediction (N, *shape), in its units; see `Denoiser.forward`."""
        return self.network(*self._question(sample, t))

    def network_time(self, t: float) -> float:
        """Return the body's own time for time t > 0 of this denoiser's process."""
        return self.network.network_time(self._levels_at(t)[0])

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Return what the body should predict, in its units; see `Denoiser.training_target`."""
        tau = self._answers(clean, t)[0]
        return self.network.training_target(
            self.scale * clean + self.shift, self._sign * noise, tau
        )

    def head_inputs(self, sample: Tensor, t: float | Tensor) -> tuple[Tensor, HeadInputs]:
        """See `Denoiser.head_inputs`; the noise and the levels are those of this denoiser."""
        raw, read = self.network.head_inputs(*self._question(sample, t))
        levels = self._levels(t, sample)
        return raw, HeadInputs(read.features, self._sign * read.epsilon, *levels)

    def to_tree(self) -> dict[str, Any]:
        """See `Denoiser.to_tree`: the network as it was trained, and how it is rescaled."""
        rescaled = {
            "scale": self.scale,
            "shift": self.shift,
            "process": self.process.to_config(),
            "clip": self.clip,
        }
        own = {key: value for key, value in super().to_tree().items() if key in ("gamma", "head")}
        return {**self.network.to_tree(), **own, "rescaled": rescaled}

    @classmethod
    def of_tree(cls, network: Denoiser, tree: Mapping[str, Any]) -> RescaledDenoiser:
        """Rebuild it from its network and the entry "rescaled" of `to_tree`."""
        process = NoiseProcess.from_config(tree["process"])
        return cls(network, tree["scale"], tree["shift"], process, tree["clip"])

    @property
    def _sign(self) -> float:
        return math.copysign(1.0, self.scale)

    def _epsilon_of(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        epsilon = self.network._epsilon_of(raw, *self._question(sample, t))
        return epsilon if self.scale > 0 else -epsilon

    def _denoised_of(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        clean = self.network._denoised_of(raw, *self._question(sample, t))
        return (clean - self.shift) / self.scale

    def _question(self, sample: Tensor, t: float | Tensor) -> tuple[Tensor, float | Tensor]:
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
        factor = alpha / self.process.alpha(t) * self.scale
        return tau, shaped(factor, sample), shaped(alpha * self.shift, sample)

    def _levels_at(self, t: float) -> tuple[float, float, float]:
        """Answer `_answers` for one time as numbers, which are remembered."""
        if t not in self._known:
            if len(self._known) >= MOST_LEVELS:
                self._known.clear()
            tau = float(self._time(torch.tensor(t, dtype=torch.float64)))
            alpha = self.network.process.levels(tau)[0]
            factor = alpha / self.process.levels(t)[0] * self.scale
            self._known[t] = tau, factor, alpha * self.shift
        return self._known[t]

    def _time(self, t: Tensor) -> Tensor:
        """Return the network's time tau for times t, () or (N,), differentiable."""
        if self._aligned and not t.is_floating_point():
            return t
        theirs = self.network.process
        if isinstance(theirs, VE) and isinstance(self.process, VE):
            tau = t * abs(self.scale)
            self._check(t, tau)
            return tau.clamp(max=theirs.t_max)
        level = self.process.log_snr(t) - math.log(abs(self.scale))
        least = float(theirs.log_snr(theirs.t_max))
        self._check(t, level.neg().exp(), math.exp(-least))
        tau = theirs.time_of_log_snr(level.clamp(min=least))
        if not self._aligned:
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


def same_times(process: NoiseProcess, scale: float) -> NoiseProcess:
    """Return the process of data x on which a network of y = scale x + shift knows every time.

    On a `VE` noise levels are divided by |scale|. On a `DiscreteVP` the chain has other betas, such
    that sigma / alpha after n noisings is that of the network's chain divided by |scale|.
    """
    if abs(scale) == 1:
        return process
    if isinstance(process, VE):
        return VE(process.t_min / abs(scale), process.t_max / abs(scale))
    if not isinstance(process, DiscreteVP):
        raise ValueError(
            f"For a {type(process).__name__} name the process of the rescaled denoiser."
        )
    # -log abar' = log(1 + (abar^-1 - 1) / scale^2), by differences for each noising.
    decay = -torch.log1p(-process.betas).cumsum(0)
    decay = torch.log1p(torch.expm1(decay) / scale**2)
    return DiscreteVP(-torch.expm1(-decay.diff(prepend=decay.new_zeros(1))))


def _aligned(theirs: NoiseProcess, ours: NoiseProcess, scale: float) -> bool:
    """Tell whether the whole noisings of two chains are the same, up to rounding."""
    if not isinstance(theirs, DiscreteVP) or not isinstance(ours, DiscreteVP):
        return False
    betas = same_times(theirs, scale).betas  # type: ignore[attr-defined]
    return len(betas) == len(ours.betas) and torch.allclose(betas, ours.betas, rtol=1e-8, atol=0)
