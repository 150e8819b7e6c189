"""Denoiser: a network body, the noise process it was trained on, and what it predicts.

Whatever the body predicts, `epsilon(x, t)` and `denoised(x, t)` give the predicted noise and the
predicted clean sample (MATH.md 0.2), so solvers and agents never ask. What the body predicts is a
`Parameterisation`, which knows how it is asked and what its answer means.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...common.arguments import checked
from ...common.checkpoint import CheckpointError, save_checkpoint
from ...common.conditions import Classes, Conditions, Kind, as_conditions
from ...common.precision import Precision, check_precision, lower_precision
from ...common.reading import damage_named
from ...envs.processes import NoiseProcess
from .asking import ask, wants_whole_times
from .conditioning import OPEN, Conditioning
from .files import find_tree, parts_of
from .networks.configs import check_times, declared, own_config
from .parameterisations import Parameterisation, make_parameterisation
from .parameterisations.rescaled import Rescaled
from .variance_head import HeadInputs, VarianceHead

# What a denoiser is asked for: the predicted noise, or the predicted clean sample.
Output = Literal["epsilon", "sample"]

# Of ancestral sampling's steps: the posterior's, that of the noising, or that in the last step too.
Variance = Literal["small", "large", "beta"]


class Denoiser(nn.Module):
    """A denoising network with the conversions between its parameterisations.

    Args:
        body: any module `body(x, t)` with x (N, *shape), returning (N, *shape) of any floating
            type, and t (N,) the network's own time: the 0-based index of the noising, 0 .. T - 1,
            on a `DiscreteVP` of T noisings, the noise level sigma on a `VE`, and log(sigma) / 4 for
            "edm". An index is int64 where all times of the batch are whole, as in diffusers, so
            that an embedding table may look it up; fractional times, between noisings, come in x's
            floating type (a table is refused then, with ValueError). Noise levels always do, and so
            does a time that requires a gradient. Where one time serves the whole batch t has stride
            0 (an expanded number): such a body may embed `t[:1]` instead of N equal times, and must
            not write into t.
        process: the forward process x_t = alpha(t) x_0 + sigma(t) eps.
        prediction: what the body returns, a key of `PARAMETERISATIONS`: the noise ("epsilon"), the
            clean sample ("sample"), the velocity v = alpha eps - sigma x_0 ("v",
            variance-preserving processes only), or EDM's preconditioned F ("edm", VE only). Or a
            `Parameterisation` that exists; it brings its process and `sigma_data`.
        sigma_data: standard deviation of the data, > 0, in the coefficients of "edm"; the others
            ignore it.
        clip: whether its predicted clean samples are meant to be clamped to [-1, 1] when sampling.
            The denoiser itself never does; solvers made by name with it do by default.
        variance: the one that its ancestral sampler is meant to have, "small", "large" or "beta",
            see `solvers.ancestral`; None says nothing.
        classes: of a conditional body `body(x, t, condition)`, which gets classes (N,) int64, 0 to
            `classes` - 1, and `classes` itself for none; what the body's `.config` says if None.
        drops: whether that was trained with dropped labels, and so knows "none".
        conditions: of a conditional body whose conditions are others, such as `Captions(64)`, which
            it gets as `(N, *conditions.shape)`.

    Attributes:
        parameterisation: what the body returns, and how it is asked.
        gamma: (T,) float64 on the CPU, the Gamma_n of Analytic-DPM for the T noisings of a
            `DiscreteVP` (MATH.md 1.11), or None. `VarianceLearning` estimates it.
        head: the second head of SN-DDPM or NPR-DDPM (MATH.md 1.12), or None, trained by the same.
        conditioning: under which condition, and with how much guidance, a conditional body is
            asked, see `given`; None for an unconditional one.

    Raises:
        ValueError: unknown prediction or variance, "v" on a process with alpha^2 + sigma^2 != 1,
            "edm" on one that is not VE, sigma_data is not positive and finite, or a body of ours is
            made for other network times than the process has.
    """

    @checked
    def __init__(
        self,
        body: nn.Module,
        process: NoiseProcess,
        prediction: str | Parameterisation = "epsilon",
        sigma_data: float = 0.5,
        clip: bool = False,
        variance: Variance | None = None,
        classes: int | None = None,
        drops: bool = False,
        conditions: Conditions | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(prediction, Parameterisation):
            prediction = make_parameterisation(prediction, process, sigma_data)
        self.body = body
        self.parameterisation = prediction
        self.clip = bool(clip)
        self.variance: Variance | None = variance
        self.gamma: Tensor | None = None
        self.head: VarianceHead | None = None
        self.precision: Precision = "float32"
        if classes is None and conditions is None:
            its = declared(body)
            classes, conditions = its.get("classes"), its.get("conditions")
        known = as_conditions(conditions, classes)
        self.conditioning = None if known is None else Conditioning(known, drops)
        check_times(body, *prediction.network_times)
        # The same question gets the same answer; only behaviour cloning turns dropout on.
        self.eval()

    @property
    def process(self) -> NoiseProcess:
        """The forward process of the samples."""
        return self.parameterisation.process

    @property
    def prediction(self) -> str:
        """The name of what the body returns; of a rescaled denoiser in the network's units."""
        return self.parameterisation.name

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data, in the units of the samples."""
        return self.parameterisation.sigma_data

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, as far as the body's `.config` says it."""
        shape = declared(self.body).get("shape")
        return None if shape is None else tuple(shape)

    def check_shape(self, shape: Sequence[int], origin: Path | str = "The denoiser") -> None:
        """Raise ValueError if an environment's samples have another shape than the body's.

        Args:
            shape: of one sample of the environment.
            origin: what the message calls the denoiser.
        """
        if self.shape not in (None, tuple(shape)):
            raise ValueError(
                f"{origin} was made for another environment: its samples have shape {self.shape}, "
                f"here they have {tuple(shape)}."
            )

    def run_with(
        self, precision: Precision = "float32", channels_last: bool = False, compile: bool = False
    ) -> Denoiser:
        """Choose how the body is run; its weights stay float32, and no file remembers this.

        Args:
            precision: "float32", or "bf16": bfloat16 where that is safe (autocast).
            channels_last: keep convolution weights in that memory format.
            compile: hand the body to `torch.compile`, which needs a C++ compiler and takes a minute
                at the first call with each batch size.

        Raises:
            ValueError: unknown precision.
        """
        check_precision(precision)
        self.precision = precision
        if channels_last:
            self.body.to(memory_format=torch.channels_last)
        if compile:
            self.body.compile()
        return self

    def forward(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return the body's raw prediction (N, *shape) for samples at time t, a number or (N,)."""
        question = self.parameterisation.question(sample, t)
        if self.conditioning is None:
            return self._ask(*question)
        return self.conditioning.answer(self._ask, *question, lambda: self._level(t))

    def epsilon(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Predict the noise in `sample` (N, *shape) at time t > 0, a number or (N,)."""
        return self.parameterisation.epsilon(self(sample, t), sample, t)

    def denoised(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Predict the clean sample behind `sample` (N, *shape) at time t > 0, a number or (N,)."""
        return self.parameterisation.denoised(self(sample, t), sample, t)

    def outputs_with_covariance(
        self, sample: Tensor, t: float | Tensor, output: Output = "epsilon"
    ) -> tuple[Tensor, Tensor]:
        """Predict the noise or the clean sample, and the variance of the latter, in one call.

        Args:
            sample: (N, *shape).
            t: time > 0, a number or (N,).
            output: "epsilon" or "sample".

        Returns:
            The prediction (N, *shape), and Cov0 in [0, 1] (N, *shape), what the second head says of
            Var[x_0 | x_t]; (N, 1, ...) if that averages over pixels.

        Raises:
            ValueError: there is no second head, or the body does not show what that reads (see
                `head_inputs`).
        """
        if self.head is None:
            raise ValueError(
                "The variance of each pixel comes from a second head, which this denoiser has not: "
                "train one with VarianceLearning, kind='sn' or 'npr'."
            )
        raw, read = self.head_inputs(sample, t)
        covariance = self.head.covariance(*read)
        if output == "epsilon":
            return read.epsilon, covariance
        return self.parameterisation.denoised(raw, sample, t), covariance

    def head_inputs(self, sample: Tensor, t: float | Tensor) -> tuple[Tensor, HeadInputs]:
        """Return the body's raw prediction, and what a second head reads, from one call.

        Its features are what the body's last layer `body.out` read.

        Raises:
            ValueError: a body without a layer `out`, or one that runs through `torch.compile`.
        """
        last = getattr(self.body, "out", None)
        if not isinstance(last, nn.Module):
            raise ValueError(
                f"A second head reads the input of the network's last layer, `body.out`; "
                f"{type(self.body).__name__} has none."
            )
        if getattr(self.body, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "A compiled network hides its features: with a second head leave compile off."
            )
        caught: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            raw = self(sample, t)
        finally:
            hook.remove()
        epsilon = self.parameterisation.epsilon(raw, sample, t)
        levels = self.process.levels_for(sample, t)
        # Of each piece, see `ask`. Guided, the half with the condition comes first.
        features = torch.cat(caught)[: len(raw)].to(raw.dtype)
        return raw, HeadInputs(features, epsilon, *levels)

    def given(
        self,
        condition: Any = OPEN,
        guidance: float | None = None,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
    ) -> Denoiser:
        """Return a view of a conditional denoiser that is asked under these terms.

        The view has a denoiser's face, and shares body and weights: solvers, policies and agents
        take it as any other. Without a condition it waits for one, which a conditional environment
        shows with each observation, and keeps the guidance until then.

        Args:
            condition: one for all samples: a class 0 to `classes` - 1, a text, or an embedding; or
                one for each, a list, an array or a tensor (N, ...); None for no condition; by
                default the view's own one.
            guidance: w of classifier-free guidance, >= 0: 0 is without, 1 with the condition alone,
                at the cost of one network evaluation an answer; all others cost two.
            interval: noise levels sigma / alpha, (low, high), at which w holds; 1 elsewhere.
            rescale: share, 0 to 1, of the guided answer that is rescaled to the standard deviation
                of the answer with the condition.

        Terms that are left out stay as they are.

        Raises:
            TypeError: a condition of another kind.
            ValueError: an unconditional denoiser, a condition of another shape or that does not
                exist, terms out of range, an interval or a `rescale` without guidance, or guidance
                of a network that was trained without dropped labels.
        """
        if self.conditioning is None:
            raise ValueError(
                "This denoiser is unconditional: it takes neither condition nor guidance."
            )
        changes: dict[str, Any] = {"guidance": guidance, "interval": interval, "rescale": rescale}
        changes = {name: value for name, value in changes.items() if value is not None}
        if condition is not OPEN:
            condition = self.conditioning.checked(condition)
            if isinstance(condition, Tensor):  # moved once, not at each answer
                weight = next(self.body.parameters(), None)
                condition = condition if weight is None else condition.to(weight.device)
            changes["condition"] = condition
        conditioning = replace(self.conditioning, **changes)
        if conditioning.guidance == 1:
            if interval is not None:
                raise ValueError(
                    "An interval says at which noise levels guidance holds: it needs a guidance "
                    "other than 1."
                )
            if rescale:
                raise ValueError(
                    "rescale is the share of a guided answer that is rescaled: it needs a guidance "
                    "other than 1."
                )
        return self._view(conditioning)

    def under(self, condition: Tensor | None) -> Denoiser:
        """Return the view for conditions (N, ...) that are known to be right; itself for None."""
        if condition is None or self.conditioning is None:
            return self
        return self._view(self.conditioning.under(condition))

    def under_shown(self, condition: Any, device: torch.device) -> Denoiser:
        """Return the view for what an observation shows, `"condition"`, single or batched."""
        if self.conditioning is None:
            return self
        return self.under(self.conditioning.conditions.shown(condition, device))

    def under_some(self) -> Denoiser:
        """Return the view under some condition, if it waits for one, to see what answers it has."""
        if self.conditions is None or not self.is_open:
            return self
        return self.given(self.conditions.some())

    def at(self, rows: slice | Tensor) -> Denoiser:
        """Return the view for some of the samples, where each has a condition of its own."""
        if self.conditioning is None:
            return self
        return self._view(self.conditioning.at(rows))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Denoiser:
        """Move the condition along with the weights."""
        super()._apply(fn, recurse)
        if self.conditioning is not None:
            weight = next(self.body.parameters(), None)
            if weight is not None:
                self.conditioning = self.conditioning.on(weight.device)
        return self

    def _view(self, conditioning: Conditioning) -> Denoiser:
        view = self.view()
        view.conditioning = conditioning
        return view

    def view(self) -> Denoiser:
        """Return a denoiser with the same body and weights, whose other attributes are its own."""
        view = copy.copy(self)
        view._modules = dict(self._modules)
        return view

    @property
    def conditions(self) -> Conditions | None:
        """Which conditions it knows; None if it is unconditional."""
        return None if self.conditioning is None else self.conditioning.conditions

    @property
    def classes(self) -> int | None:
        """The number of classes; None if it is unconditional, or has other conditions."""
        return self.conditions.count if isinstance(self.conditions, Classes) else None

    @property
    def is_open(self) -> bool:
        """Whether it is conditional, and waits for its condition."""
        return self.conditioning is not None and self.conditioning.condition is OPEN

    @property
    def waits_for(self) -> Kind | Literal[False]:
        """The kind of condition that it waits for, `conditional` of its environment, or False."""
        return self.conditions.kind if self.conditions is not None and self.is_open else False

    def evaluations(self, t: float) -> int:
        """Return how many network evaluations an answer costs at time t: 2 if guided, else 1."""
        if self.conditioning is None:
            return 1
        alpha, sigma = self.process.levels(t)
        return self.conditioning.evaluations(sigma / alpha if alpha else math.inf)

    def _level(self, t: float | Tensor) -> float | Tensor:
        """Return sigma / alpha at a time, a number or (N,)."""
        if isinstance(t, Tensor) and t.ndim:
            return self.process.log_snr(t).neg().exp()
        alpha, sigma = self.process.levels(float(t))
        return sigma / alpha if alpha else math.inf

    def network_time(self, t: float) -> float:
        """Return the body's own time for time t > 0."""
        return self.parameterisation.network_time(t)

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Return what the body should predict for x_t = alpha clean + sigma noise."""
        return self.parameterisation.training_target(clean, noise, t)

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one safetensors file."""
        save_checkpoint(path, {"kind": "denoiser", **self.to_tree()})

    def to_tree(self) -> dict[str, Any]:
        """Return weights and settings as a tree for `save_checkpoint`, which `load` understands."""
        return {
            **self.parameterisation.to_config(),
            "clip": self.clip,
            "variance": self.variance,
            # An unconditional denoiser's file says nothing of conditions.
            **({"given": self.conditioning.to_config()} if self.conditioning else {}),
            "body": own_config(self.body),
            "weights": self.body.state_dict(),
            # Numbers, not a tensor: it stays in float64 on the CPU whatever device it is read to.
            "gamma": None if self.gamma is None else self.gamma.tolist(),
            "head": None
            if self.head is None
            else {"config": self.head.config, "weights": self.head.state_dict()},
        }

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", body: nn.Module | None = None
    ) -> Denoiser:
        """Read a denoiser from a file of `save`, or out of an agent's checkpoint.

        Args:
            path: the file, or the folder of a run, whose newest denoiser is read.
            device: where its weights go.
            body: needed only for a body that is not one of `fewstep.agents.denoisers.networks`.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, or weights that do not fit the
                body or are not finite; `ForeignBodyError` where `body` is needed.
        """
        path, tree = find_tree(path)
        with damage_named(path, CheckpointError):
            parts = parts_of(tree, path, body)
            denoiser = cls(
                parts.body.to(device),
                parts.parameterisation.process,
                parts.parameterisation,
                clip=parts.clip,
                variance=parts.variance,
            )
        terms = parts.conditioning
        denoiser.conditioning = None if terms is None else terms.on(torch.device(device))
        denoiser.gamma = parts.gamma
        denoiser.head = None if parts.head is None else parts.head.to(device)
        return denoiser

    def rescaled(
        self,
        scale: float,
        shift: float = 0.0,
        *,
        process: NoiseProcess | None = None,
        clip: bool = False,
    ) -> Denoiser:
        """Return a denoiser of data x with this network, which was trained on y = scale x + shift.

        A network of images in [0, 1], in an environment of images in [-1, 1], is
        `denoiser.rescaled(0.5, 0.5)`. The mapping of samples, times and answers is exact; its
        formula is in `parameterisations.rescaled`. The body is shared, not copied: training either
        denoiser trains both. Solvers, policies, agents and D-ODE take the new denoiser as any
        other, it trains, and it is saved and loaded; no diffusers pipeline can describe it.

        Args:
            scale: not 0; negative for data of the opposite sign.
            shift: in the network's units.
            process: of the new denoiser, and of the environment that it acts in. By default the one
                on which every time t means the network's time t: a `DiscreteVP` of other betas,
                whose whole noisings are the network's, or a `VE` of noise levels divided by
                |scale|. Any other will do, of another kind too (a network of a `DiscreteVP` on a
                `VE`, with scale 1, say), but its noisiest times may lie beyond the network's
                training, which is refused when the network is asked there, and its cleanest times
                may ask the network between its first noising and clean data, or below its least
                noise level, where it extrapolates.
            clip: whether predicted clean samples are meant to be clamped to [-1, 1] in the new
                units.

        Raises:
            ValueError: scale 0 or a number that is not finite, a denoiser that is rescaled already
                or has a second head, or has a Gamma while `process` is given.
        """
        parameterisation = Rescaled(self.parameterisation, scale, shift, process)
        if self.head is not None or (self.gamma is not None and not parameterisation.aligned):
            raise ValueError(
                "Its Gamma or second head holds variances of the network's own process and units: "
                "rescale a denoiser without, and train `VarianceLearning` on the new one."
            )
        # No variance: the network's own goes with its own process.
        denoiser = Denoiser(self.body, parameterisation.process, parameterisation, clip=clip)
        denoiser.gamma, denoiser.conditioning = self.gamma, self.conditioning
        return denoiser

    def _ask(self, sample: Tensor, time: Tensor, *condition: Tensor) -> Tensor:
        try:
            with lower_precision(self.precision, sample.device):
                return ask(self.body, sample, time, *condition).to(sample.dtype)
        except (IndexError, RuntimeError) as error:
            asked_between = self.parameterisation.indexed and time.is_floating_point()
            if not (asked_between and wants_whole_times(error)):
                raise
            raise ValueError(
                f"The network {type(self.body).__name__} takes whole noisings only, and is asked "
                f"between two, at index {float(time[0]):g}: choose a schedule and a solver of "
                "whole times (D-ODE: integer_times=True), or interpolate its time embedding."
            ) from error
