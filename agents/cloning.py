"""BehaviorCloning: ordinary diffusion training, seen as imitation of the reversed noising process.

    loss = E_{x_0, t, eps} || prediction(alpha_t x_0 + sigma_t eps, t) - target ||^2    (DDPM)

It gives SFT-PG its initial policy. With an "edm" denoiser the same loss is EDM's weighted one, and
noise levels are drawn as there: ln sigma ~ N(p_mean, p_std^2) (Karras et al. 2022, Table 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.arguments import checked
from ..common.checks import at_least, not_negative, positive
from ..common.optimisation import (
    Averaged,
    adam,
    learning_rate,
    learning_rate_schedule,
    seeded,
    set_learning_rate,
)
from ..common.precision import Precision
from .base import Agent, Environment
from .denoisers.denoiser import Denoiser
from .policy_gradient.execution import Execution, as_executed
from .solvers import Options


class BehaviorCloning(Agent):
    """Train a denoiser with the DDPM loss. One round is one gradient step.

    Args:
        env: the environment; its target gives the data, its process the noise.
        denoiser: the network to train, in place.
        batch_size: samples a gradient step.
        learning_rate: of Adam; 1e-4 to 5e-3.
        lr_schedule: "cosine", "linear" or "constant".
        max_grad_norm: the gradient's norm is clipped here; None does not clip.
        ema: decay of the average of the weights, 0 (none) to 1 (excluded); the averaged weights
            sample.
        p_mean: mean of ln sigma in the draw of noise levels, for an "edm" denoiser only; EDM's -1.2
            suits images of standard deviation 0.5.
        p_std: standard deviation of ln sigma there, > 0.
        precision: "float32", or "bf16": bfloat16 where that is safe (autocast).
        channels_last: keep convolution weights in that memory format; faster on most GPUs.
        compile: run the denoiser through `torch.compile`.
        micro_batch_size: most samples that the denoiser sees at once; gradients are accumulated
            over the pieces of a batch. None takes it whole.
        solver: see `Agent`, as the remaining arguments.

    Raises:
        ValueError: `p_mean` is not finite, `p_std` not positive and finite, or another setting is
            unknown or out of range.
    """

    name = "behavior-cloning"
    data_parallel = True

    @checked
    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        *,
        batch_size: int = 1024,
        learning_rate: float = 5e-3,
        lr_schedule: str = "cosine",
        max_grad_norm: float | None = 1.0,
        ema: float = 0.99,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        precision: Precision = "float32",
        channels_last: bool = False,
        compile: bool = False,
        micro_batch_size: int | None = None,
        solver: str = "ancestral",
        solver_options: Options | None = None,
        seed: int = 0,
        verbose: int = 0,
        tensorboard_log: str | None = None,
    ) -> None:
        super().__init__(
            env,
            denoiser,
            solver=solver,
            solver_options=solver_options,
            seed=seed,
            verbose=verbose,
            tensorboard_log=tensorboard_log,
        )
        if not (math.isfinite(p_mean) and 0 < p_std < math.inf):
            raise ValueError(
                f"ln sigma needs a finite p_mean and a positive p_std, got {p_mean} and {p_std}."
            )
        at_least(1, batch_size=batch_size, micro_batch_size=micro_batch_size)
        not_negative(learning_rate=learning_rate)
        positive(max_grad_norm=max_grad_norm)
        self.micro_batch_size = micro_batch_size
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule
        self.max_grad_norm = max_grad_norm
        self.p_mean, self.p_std = p_mean, p_std
        learning_rate_schedule(lr_schedule)  # refuses one that does not exist
        self.optimizer = adam(self.denoiser.parameters())
        self.averaged = Averaged(self.denoiser, ema)
        self.precision, self.channels_last, self.compile = precision, channels_last, compile
        self.execution = Execution(self.denoiser, precision, channels_last, compile)

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module

    @property
    def timesteps_per_round(self) -> int:
        """One call on each sample of the batch, on all processes."""
        return self._size

    @property
    def _size(self) -> int:
        return self.batch_size * self.processes.count

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        half = max((self.micro_batch_size or self.batch_size) // 2, 1)
        return f"Take micro_batch_size={half}, the same gradient in more pieces."

    @as_executed
    def train_round(self) -> dict[str, Tensor]:
        """Take one gradient step on one batch."""
        # What all processes need, the same on each, of which each takes its share.
        everyone = self.mdp.target.sample(self._size, self.generator)
        t = self.processes.share(self._draw_times())
        noise = self.processes.share(torch.empty_like(everyone).normal_(generator=self.generator))
        clean = self.processes.share(everyone)
        self.optimizer.zero_grad()
        size = self.micro_batch_size or self.batch_size
        loss = torch.zeros((), device=self.device)
        with self._training_mode():
            for piece in zip(clean.split(size), t.split(size), noise.split(size), strict=True):
                part = len(piece[0]) / self.batch_size * self._loss(*piece)
                part.backward()
                loss += part.detach()
        self.processes.average_gradients(self.denoiser.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.denoiser.parameters(), self.max_grad_norm or math.inf
        )
        rate = learning_rate(self.learning_rate, self.lr_schedule, self.progress)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.averaged.update()
        self.num_timesteps += self.timesteps_per_round
        return {"train/loss": loss, "train/grad_norm": grad_norm}

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Turn dropout on, where there is any, with noise that the round and the process fix."""
        dropouts = (
            m for m in self.denoiser.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        )
        if not any(module.p > 0 for module in dropouts):
            yield
            return
        key = (self.seed, self.rounds, self.processes.rank)
        self.denoiser.train()
        try:
            with seeded(int(np.random.SeedSequence(key).generate_state(1)[0])):
                yield
        finally:
            self.denoiser.eval()

    def _loss(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        noisy = self.mdp.process.add_noise(clean, t, noise)
        target = self.denoiser.training_target(clean, noise, t)
        return (self.denoiser(noisy, t) - target).square().mean()

    def _draw_times(self) -> Tensor:
        """Draw times for the batches of all processes.

        Levels of a discrete process are alike; others are uniform in log-SNR, or log-normal for an
        "edm" denoiser.
        """
        return self.denoiser.parameterisation.draw_times(
            self.mdp.process, self._size, self.generator, self.device, self.p_mean, self.p_std
        )

    def settings(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments."""
        return {
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_schedule": self.lr_schedule,
            "max_grad_norm": self.max_grad_norm,
            "ema": self.averaged.decay,
            "p_mean": self.p_mean,
            "p_std": self.p_std,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "compile": self.compile,
            "micro_batch_size": self.micro_batch_size,
        }

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state["optimizer"])
