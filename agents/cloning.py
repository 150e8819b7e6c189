"""BehaviorCloning: ordinary diffusion training, seen as imitation of the reversed noising process.

    loss = E_{x_0, t, eps} || prediction(alpha_t x_0 + sigma_t eps, t) - target ||^2    (DDPM)

It gives SFT-PG its initial policy. With an "edm" denoiser the same loss is EDM's weighted one, and
noise levels are drawn as there: ln sigma ~ N(p_mean, p_std^2) (Karras et al. 2022, Table 1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..envs import DiscreteVP
from .base import Agent, Environment
from .denoiser import Denoiser
from .solvers import Options
from .training import Averaged, adam, learning_rate_schedule, set_learning_rate


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
        solver: see `Agent`, as the remaining arguments.

    Raises:
        ValueError: `p_mean` is not finite, `p_std` not positive and finite, or another setting is
            unknown or out of range.
    """

    name = "behavior-cloning"

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
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule
        self.max_grad_norm = max_grad_norm
        self.p_mean, self.p_std = p_mean, p_std
        self._factor = learning_rate_schedule(lr_schedule)
        self.optimizer = adam(self.denoiser.parameters())
        self.averaged = Averaged(self.denoiser, ema)

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module

    @property
    def timesteps_per_round(self) -> int:
        """One call on each sample of the batch."""
        return self.batch_size

    def train_round(self) -> dict[str, Tensor]:
        """Take one gradient step on one batch."""
        clean = self.mdp.target.sample(self.batch_size, self.generator)
        t = self._draw_times()
        noise = torch.empty_like(clean).normal_(generator=self.generator)
        noisy = self.mdp.process.add_noise(clean, t, noise)
        target = self.denoiser.training_target(clean, noise, t)
        loss = (self.denoiser(noisy, t) - target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.denoiser.parameters(), self.max_grad_norm or math.inf
        )
        set_learning_rate(self.optimizer, self.learning_rate * self._factor(self.progress))
        self.optimizer.step()
        self.averaged.update()
        self.num_timesteps += self.timesteps_per_round
        return {"train/loss": loss.detach(), "train/grad_norm": grad_norm}

    def _draw_times(self) -> Tensor:
        """Draw (batch_size,) times.

        Levels of a discrete process are alike; others are uniform in log-SNR, or log-normal for an
        "edm" denoiser.
        """
        process = self.mdp.process
        size, device = (self.batch_size,), self.device
        if isinstance(process, DiscreteVP):
            last = int(process.t_max)
            return torch.randint(1, last + 1, size, generator=self.generator, device=device)
        if self.denoiser.prediction == "edm":
            normal = torch.randn(size, generator=self.generator, device=device, dtype=torch.float64)
            # In float32 a clamped level could lie beyond t_max.
            return (self.p_mean + self.p_std * normal).exp().clamp(process.t_min, process.t_max)
        low, high = (float(process.log_snr(t)) for t in (process.t_max, process.t_min))
        uniform = torch.rand(size, generator=self.generator, device=device, dtype=torch.float64)
        return process.time_of_log_snr(low + (high - low) * uniform).float()

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
        }

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state["optimizer"])
