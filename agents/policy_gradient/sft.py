"""SFT: shortcut fine-tuning with the pathwise gradient, like a WGAN generator (MATH.md S.3).

    grad Phi = -E[ grad_theta f(x_0(theta, noise)) ]      by back-propagation through the chain

It needs a critic whose gradient means something, hence the gradient penalty, and its memory grows
with K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...common.arguments import checked
from ...common.precision import Precision
from ...envs.mdp import Reward
from ..base import Environment
from ..denoisers.denoiser import Denoiser
from ..solvers import Options
from .execution import as_executed
from .shortcut import Buffer, Critic, ShortcutAgent


class SFT(ShortcutAgent):
    """Fine-tune a sampler by back-propagating a critic through it (paper A, Eq. 14).

    A round: n_critic rollouts and critic steps, then n_generator steps of theta, each through fresh
    rollouts of `batch_size`.

    Args:
        gradient_checkpointing: recompute each step's activations in the backward pass: memory for
            one network evaluation instead of K, for the price of one more forward pass.

    The remaining arguments are `SFTPG`'s; `micro_batch_size` bounds only the critic's rollouts.
    """

    name = "sft"
    uses_baseline = False

    @checked
    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        *,
        critic: Critic | Reward | None = None,
        regularizer: str = "gradient-penalty",
        coefficient: float | None = None,
        critic_width: int | None = None,
        critic_learning_rate: float = 1e-3,
        critic_lr_schedule: str = "constant",
        batch_size: int = 256,
        n_critic: int = 5,
        n_generator: int = 1,
        critic_rounds: int = 0,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        lr_schedule: str = "linear",
        max_grad_norm: float = 1.0,
        ema: float = 0.95,
        learn_std: bool = False,
        precision: Precision = "float32",
        channels_last: bool = False,
        compile: bool = False,
        micro_batch_size: int | None = None,
        buffer: Buffer = "float32",
        gradient_checkpointing: bool = False,
        solver: str = "ancestral",
        solver_options: Options | None = None,
        seed: int = 0,
        verbose: int = 0,
        tensorboard_log: str | None = None,
    ) -> None:
        super().__init__(
            env,
            denoiser,
            critic,
            regularizer=regularizer,
            coefficient=coefficient,
            critic_width=critic_width,
            residual_baseline=False,
            baseline_states=1,
            critic_learning_rate=critic_learning_rate,
            baseline_learning_rate=critic_learning_rate,
            critic_lr_schedule=critic_lr_schedule,
            batch_size=batch_size,
            n_critic=n_critic,
            n_generator=n_generator,
            critic_rounds=critic_rounds,
            learning_rate=learning_rate,
            betas=betas,
            lr_schedule=lr_schedule,
            max_grad_norm=max_grad_norm,
            ema=ema,
            learn_std=learn_std,
            precision=precision,
            channels_last=channels_last,
            compile=compile,
            micro_batch_size=micro_batch_size,
            buffer=buffer,
            solver=solver,
            solver_options=solver_options,
            seed=seed,
            verbose=verbose,
            tensorboard_log=tensorboard_log,
        )
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def timesteps_per_round(self) -> int:
        """The calls of n_critic rollouts for the critic and n_generator for theta, everywhere."""
        rollouts = self.n_critic + self.n_generator
        return rollouts * self.batch_size * self.policy.steps * self.processes.count

    @as_executed
    def train_round(self) -> dict[str, Tensor]:
        """Do one round."""
        self.anneal()
        _, metrics = self.train_critic()
        if self.critic_alone:
            return metrics
        for _ in range(self.n_generator):
            loss = -self.critic(self.differentiable_samples()).mean()
            grad_norm = self.descend([loss])
        self.averaged.update()
        metrics["train/policy_loss"] = loss.detach()
        metrics["train/grad_norm"] = grad_norm
        return metrics

    def differentiable_samples(self) -> Tensor:
        """Roll out finished samples (batch_size, *shape) that keep their gradient in theta."""
        everyone = self.mdp.initial(self.batch_size * self.processes.count, self.generator)
        sample = self.processes.share(everyone)
        for step in range(self.policy.steps):
            # The noise is drawn outside, so recomputing a step repeats it.
            noise = self.fresh_noise(sample)
            if self.gradient_checkpointing:
                sample = checkpoint(self._move, sample, step, noise, use_reentrant=False)
            else:
                sample = self._move(sample, step, noise)
        return sample

    def _move(self, sample: Tensor, step: int, noise: Tensor) -> Tensor:
        mean, std = self.policy.distribution(sample, step)
        return torch.addcmul(mean, std, noise)

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        return f"Give gradient_checkpointing=True, or a batch_size below {self.batch_size}."

    def settings(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments."""
        settings = super().settings()
        for unused in ("baseline_learning_rate", "residual_baseline", "baseline_states"):
            del settings[unused]
        return {**settings, "gradient_checkpointing": self.gradient_checkpointing}
