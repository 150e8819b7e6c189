"""Denoiser: a network body, the noise process it was trained on, and what it predicts.

Whatever the body predicts, `epsilon(x, t)` and `denoised(x, t)` give the predicted noise and the
predicted clean sample (MATH.md 0.2), so solvers and agents never ask. With "edm" the body is
preconditioned as in Karras et al. 2022, Table 1: it sees and returns numbers of unit size,

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise).                              (MATH.md 3.7)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...common.arguments import checked
from ...common.checkpoint import CheckpointError, ForeignBodyError, load_checkpoint, save_checkpoint
from ...common.precision import Precision, check_precision, lower_precision
from ...common.reading import damage_named, reason
from ...envs.processes.process import VE, DiscreteVP, NoiseProcess
from ..variance.head import HeadInputs, VarianceHead
from .networks.small import body_from_config, built_for, check_times, declared, own_config

if TYPE_CHECKING:
    from ..samplers.tableau import Output, Tableau

Prediction = Literal["epsilon", "sample", "v", "edm"]

# Of ancestral sampling's steps: the posterior's, that of the noising, or that in the last step too.
Variance = Literal["small", "large", "beta"]

# A coefficient: one number for all samples, or a tensor that broadcasts against them.
Level = float | Tensor


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
        prediction: what the body returns: the noise ("epsilon"), the clean sample ("sample"), the
            velocity v = alpha eps - sigma x_0 ("v", variance-preserving processes only), or EDM's
            preconditioned F ("edm", VE only).
        sigma_data: standard deviation of the data, > 0, in the coefficients of "edm"; the others
            ignore it.
        clip: whether its predicted clean samples are meant to be clamped to [-1, 1] when sampling.
            The denoiser itself never does; solvers made by name with it do by default.
        variance: the one that its ancestral sampler is meant to have, "small", "large" or "beta",
            see `solvers.ancestral`; None says nothing.

    Attributes:
        gamma: (T,) float64 on the CPU, the Gamma_n of Analytic-DPM for the T noisings of a
            `DiscreteVP` (MATH.md 1.11), or None. `VarianceLearning` estimates it.
        head: the second head of SN-DDPM or NPR-DDPM (MATH.md 1.12), or None, trained by the same.

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
        prediction: Prediction = "epsilon",
        sigma_data: float = 0.5,
        clip: bool = False,
        variance: Variance | None = None,
    ) -> None:
        super().__init__()
        if prediction == "v" and not isinstance(process, DiscreteVP):
            raise ValueError("prediction='v' needs a variance-preserving process (DiscreteVP).")
        if prediction == "edm" and not isinstance(process, VE):
            raise ValueError("prediction='edm' needs a variance-exploding process (VE).")
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {sigma_data}.")
        self.body = body
        self.process = process
        self.prediction: Prediction = prediction
        self.sigma_data = float(sigma_data)
        self.clip = bool(clip)
        self.variance: Variance | None = variance
        self.gamma: Tensor | None = None
        self.head: VarianceHead | None = None
        self.precision: Precision = "float32"
        check_times(body, self.network_time(process.t_min), self.network_time(process.t_max))
        # The same question gets the same answer; only behaviour cloning turns dropout on.
        self.eval()

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
        if self.prediction == "edm":
            sigma, scale = self._edm_levels(t, sample)
            if isinstance(sigma, Tensor):
                time = (sigma.log() / 4).flatten()
            else:
                time = torch.full(
                    (1,), math.log(sigma) / 4, dtype=sample.dtype, device=sample.device
                )
            # One time for all becomes one of stride 0, as in _network_time.
            return self._ask(scale * sample, time.expand(len(sample)))
        return self._ask(sample, self._network_time(t, sample))

    def epsilon(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Predict the noise in `sample` (N, *shape) at time t > 0, a number or (N,)."""
        return self._epsilon_of(self(sample, t), sample, t)

    def denoised(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Predict the clean sample behind `sample` (N, *shape) at time t > 0, a number or (N,)."""
        return self._denoised_of(self(sample, t), sample, t)

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
        return read.epsilon if output == "epsilon" else self._denoised_of(
            raw, sample, t
        ), covariance

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
        epsilon = self._epsilon_of(raw, sample, t)
        return raw, HeadInputs(caught[-1].to(raw.dtype), epsilon, *self._levels(t, sample))

    def _epsilon_of(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return raw
        if self.prediction == "edm":
            # (x - D) / sigma, without the cancellation at small sigma.
            sigma, scale = self._edm_levels(t, sample)
            return scale * (sigma * scale * sample - self.sigma_data * raw)
        alpha, sigma = self._levels(t, sample)
        if self.prediction == "sample":
            return (sample - alpha * raw) / sigma
        return alpha * raw + sigma * sample

    def _denoised_of(self, raw: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        if self.prediction == "sample":
            return raw
        if self.prediction == "edm":
            sigma, scale = self._edm_levels(t, sample)
            skip = (self.sigma_data * scale) ** 2
            return skip * sample + sigma * self.sigma_data * scale * raw
        alpha, sigma = self._levels(t, sample)
        if self.prediction == "epsilon":
            return (sample - sigma * raw) / alpha
        return alpha * sample - sigma * raw

    def network_time(self, t: float) -> float:
        """Return the body's own time for time t > 0."""
        if self.prediction == "edm":
            return math.log(self.process.levels(t)[1]) / 4
        return self.process.network_time(t)

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Return what the body should predict for x_t = alpha clean + sigma noise.

        For "edm" it is (clean - c_skip x_t) / c_out, so that the plain squared error of the body is
        EDM's loss with its weights (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        if self.prediction == "edm":
            sigma, scale = self._edm_levels(t, clean)
            return scale * (sigma / self.sigma_data * clean - self.sigma_data * noise)
        alpha, sigma = self._levels(t, clean)
        return alpha * noise - sigma * clean

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one safetensors file."""
        save_checkpoint(path, {"kind": "denoiser", **self.to_tree()})

    def to_tree(self) -> dict[str, Any]:
        """Return weights and settings as a tree for `save_checkpoint`, which `load` understands."""
        return {
            "prediction": self.prediction,
            "sigma_data": self.sigma_data,
            "clip": self.clip,
            "variance": self.variance,
            "process": self.process.to_config(),
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
            body: needed only for a body that is not one of
                `fewstep.agents.denoisers.networks.small`.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, or weights that do not fit the
                body or are not finite; `ForeignBodyError` where `body` is needed.
        """
        path = _file_of(Path(path))
        tree = load_checkpoint(path)
        with damage_named(path, CheckpointError):
            return cls._from_tree(tree.get("denoiser", tree), path, device, body)

    @classmethod
    def _from_tree(
        cls,
        tree: dict[str, Any],
        path: Path,
        device: str | torch.device,
        body: nn.Module | None,
    ) -> Denoiser:
        if "body" not in tree or "prediction" not in tree:
            raise CheckpointError(f"{path} holds no denoiser.")
        if body is None:
            if tree["body"] is None:
                raise ForeignBodyError(f"{path} holds a foreign body: pass it as body=...")
            body = body_from_config(tree["body"], tree["weights"])
        head = None
        saved: Any = tree.get("head")
        if saved is not None:
            head = built_for(saved["weights"], VarianceHead, saved["config"])
        try:
            body.load_state_dict(tree["weights"])
            if head is not None:
                head.load_state_dict(saved["weights"])
        except RuntimeError as error:
            raise CheckpointError(
                f"The weights in {path} do not fit the body: {reason(error)}"
            ) from None
        process = NoiseProcess.from_config(tree["process"])
        # Older files say nothing of these, and have no use for them.
        settings = {
            "sigma_data": tree.get("sigma_data", 0.5),
            "clip": tree.get("clip", False),
            "variance": tree.get("variance"),
        }
        denoiser = Denoiser(body.to(device), process, tree["prediction"], **settings)
        if tree.get("rescaled") is not None:
            from .rescaled import RescaledDenoiser

            denoiser = RescaledDenoiser.of_tree(denoiser, tree["rescaled"])
        # Nor of these two.
        if tree.get("gamma") is not None:
            denoiser.gamma = torch.tensor(tree["gamma"], dtype=torch.float64)
        denoiser.head = None if head is None else head.to(device)
        return denoiser

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        download: bool = False,
        variant: str | None = None,
    ) -> Denoiser:
        """Read a denoiser from a diffusers pipeline or model: see `pretrained.diffusers`."""
        from ..pretrained.diffusers import from_pretrained

        return from_pretrained(name_or_folder, device=device, download=download, variant=variant)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a pipeline that diffusers opens: see `fewstep.agents.pretrained.pipelines`."""
        from ..pretrained.pipelines import save_pretrained

        save_pretrained(folder, self)

    def export_pipeline(self, folder: str | Path, tableau: Tableau) -> None:
        """Write a pipeline that samples with a tableau: see `pretrained.pipelines`."""
        from ..pretrained.pipelines import export_pipeline

        export_pipeline(folder, self, tableau)

    @classmethod
    def from_edm(
        cls, module: nn.Module, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> Denoiser:
        """Make a denoiser of a preconditioned network D(x; sigma): see `denoisers.edm`."""
        from .edm import from_edm

        return from_edm(module, sigma_min, sigma_max)

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
        formula is in `fewstep.agents.denoisers.rescaled`. The body is shared, not copied. Solvers,
        policies,
        agents and D-ODE take the new denoiser as any other, it trains, and it is saved and loaded;
        no diffusers pipeline can describe it.

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
        from .rescaled import RescaledDenoiser

        return RescaledDenoiser(self, scale, shift, process, clip)

    def _ask(self, sample: Tensor, time: Tensor) -> Tensor:
        try:
            with lower_precision(self.precision, sample.device):
                return self.body(sample, time).to(sample.dtype)
        except (IndexError, RuntimeError) as error:
            wants_index = re.search(r"\blong, int", str(error), re.IGNORECASE)
            if not (wants_index and self.process.discrete and time.is_floating_point()):
                raise
            raise ValueError(
                f"The network {type(self.body).__name__} takes whole noisings only, and is asked "
                f"between two, at index {float(time[0]):g}: choose a schedule and a solver of "
                "whole times (D-ODE: integer_times=True), or interpolate its time embedding."
            ) from error

    def _network_time(self, t: float | Tensor, sample: Tensor) -> Tensor:
        if isinstance(t, Tensor) and (t.ndim == 1 or t.requires_grad):
            times = self.process.network_time(t)
            # A time that is learned has to stay a floating tensor.
            if self.process.discrete and not t.requires_grad and _whole(times):
                return times.long()
            times = times.to(sample.dtype)
            return times if times.ndim else times.expand(len(sample))
        value = self.process.network_time(float(t))
        index = self.process.discrete and value == int(value)
        time = torch.full(
            (1,), value, dtype=torch.int64 if index else sample.dtype, device=sample.device
        )
        # Stride 0 tells the body that the whole batch shares one time.
        return time.expand(len(sample))

    def _edm_levels(self, t: float | Tensor, sample: Tensor) -> tuple[Level, Level]:
        """Return sigma and c_in = 1 / sqrt(sigma^2 + sigma_data^2); the rest follows from them."""
        _, sigma = self._levels(t, sample)
        return sigma, (sigma**2 + self.sigma_data**2) ** -0.5

    def _levels(self, t: float | Tensor, sample: Tensor) -> tuple[Level, Level]:
        if not isinstance(t, Tensor):
            return self.process.levels(float(t))
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return shaped(alpha, sample), shaped(sigma, sample)


def edm_time_range(process: VE) -> tuple[float, float]:
    """Range of the network times log(sigma) / 4 of an "edm" denoiser, for a body's `time_range`."""
    return math.log(process.t_min) / 4, math.log(process.t_max) / 4


def _whole(times: Tensor) -> bool:
    return not times.is_floating_point() or bool((times == times.round()).all())


# The files of a run folder that hold a denoiser, the newest stage first.
STAGES = ("checkpoint.safetensors", "denoiser.safetensors")


def _file_of(path: Path) -> Path:
    """Return the file of a run folder that holds its newest denoiser; any other path as it is."""
    if not path.is_dir():
        return path
    for name in STAGES:
        if (path / name).is_file():
            return path / name
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a folder without {' or '.join(STAGES)}; Denoiser.from_pretrained reads "
            "those that diffusers writes."
        )
    raise CheckpointError(f"{path} is a folder without {' or '.join(STAGES)}.")


def shaped(level: Tensor, sample: Tensor) -> Tensor:
    """Cast a coefficient, one for all or (N,), so that it broadcasts against samples."""
    level = level.to(sample)
    return level.view(-1, *[1] * (sample.ndim - 1)) if level.ndim else level
