"""Denoiser: a network body, the noise process it was trained on, and what it predicts.

Whatever the body predicts, `epsilon(x, t)` and `denoised(x, t)` give the predicted noise and the
predicted clean sample (MATH.md 0.2), so solvers and agents never ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..envs.names import unknown_name
from ..envs.process import DiscreteVP, NoiseProcess
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .networks import body_from_config

Prediction = Literal["epsilon", "sample", "v"]


class Denoiser(nn.Module):
    """A denoising network with the conversions between its parameterisations.

    Args:
        body: any module `body(x, t)` with x (N, *shape) and t (N,) the network's own time
            (`process.network_time`), returning (N, *shape).
        process: the forward process x_t = alpha(t) x_0 + sigma(t) eps.
        prediction: what the body returns: the noise ("epsilon"), the clean sample ("sample"), or
            the velocity v = alpha eps - sigma x_0 ("v", variance-preserving processes only).

    Raises:
        ValueError: unknown prediction, or "v" on a process with alpha^2 + sigma^2 != 1.
    """

    def __init__(
        self, body: nn.Module, process: NoiseProcess, prediction: Prediction = "epsilon"
    ) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise unknown_name("prediction", prediction, get_args(Prediction))
        if prediction == "v" and not isinstance(process, DiscreteVP):
            raise ValueError("prediction='v' needs a variance-preserving process (DiscreteVP).")
        self.body = body
        self.process = process
        self.prediction: Prediction = prediction

    def forward(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Return the body's raw prediction (N, *shape) for samples at time t, a number or (N,)."""
        return self.body(sample, self._network_time(t, sample))

    def epsilon(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Predict the noise in `sample` (N, *shape) at time t > 0, a number or (N,)."""
        raw = self(sample, t)
        if self.prediction == "epsilon":
            return raw
        alpha, sigma = self._levels(t, sample)
        if self.prediction == "sample":
            return (sample - alpha * raw) / sigma
        return alpha * raw + sigma * sample

    def denoised(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """Predict the clean sample behind `sample` (N, *shape) at time t > 0, a number or (N,)."""
        raw = self(sample, t)
        if self.prediction == "sample":
            return raw
        alpha, sigma = self._levels(t, sample)
        if self.prediction == "epsilon":
            return (sample - sigma * raw) / alpha
        return alpha * sample - sigma * raw

    def training_target(self, clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Return what the body should predict for x_t = alpha clean + sigma noise."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        alpha, sigma = self._levels(t, clean)
        return alpha * noise - sigma * clean

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one safetensors file."""
        save_checkpoint(
            path,
            {
                "kind": "denoiser",
                "prediction": self.prediction,
                "process": self.process.to_config(),
                "body": getattr(self.body, "config", None),
                "weights": self.body.state_dict(),
            },
        )

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", body: nn.Module | None = None
    ) -> Denoiser:
        """Read a denoiser from a file of `save`, or out of an agent's checkpoint.

        Args:
            path: the file.
            device: where its weights go.
            body: needed only for a body that is not one of `fewstep.agents.networks`.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, or weights that do not fit the
                body.
        """
        tree = load_checkpoint(path, device)
        tree = tree.get("denoiser", tree)
        if "body" not in tree or "prediction" not in tree:
            raise CheckpointError(f"{path} holds no denoiser.")
        if body is None:
            if tree["body"] is None:
                raise CheckpointError(f"{path} holds a foreign body: pass it as body=...")
            body = body_from_config(tree["body"])
        try:
            body.load_state_dict(tree["weights"])
        except RuntimeError as error:
            raise CheckpointError(f"The weights in {path} do not fit the body: {error}") from None
        return cls(body.to(device), NoiseProcess.from_config(tree["process"]), tree["prediction"])

    def _network_time(self, t: float | Tensor, sample: Tensor) -> Tensor:
        if isinstance(t, Tensor) and t.ndim == 1:
            return self.process.network_time(t)
        value = self.process.network_time(float(t))
        integral = value == int(value)
        time = torch.full(
            (1,), value, dtype=torch.int64 if integral else sample.dtype, device=sample.device
        )
        # Stride 0 tells the body that the whole batch shares one time.
        return time.expand(len(sample))

    def _levels(self, t: float | Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        def shaped(level: Tensor) -> Tensor:
            level = level.to(sample)
            return level.view(-1, *[1] * (sample.ndim - 1)) if level.ndim else level

        return shaped(self.process.alpha(t)), shaped(self.process.sigma(t))
