"""SFT: shortcut fine-tuning with the pathwise gradient, like a WGAN generator (MATH.md S.3).

    grad Phi = -E[ grad_theta f(x_0(theta, noise)) ]      by back-propagation through the chain

It needs a critic whose gradient means something, hence the gradient penalty, and its memory grows
with K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .execution import as_executed
from .settings import SFTSettings
from .shortcut import ShortcutAgent


class SFT(ShortcutAgent):
    """Fine-tune a sampler by back-propagating a critic through it (paper A, Eq. 14).

    A round: n_critic rollouts and critic steps, then n_generator steps of theta, each through fresh
    rollouts of `batch_size`.

    Its arguments are `SFTPG`'s, its settings `SFTSettings`.
    """

    name = "sft"
    uses_baseline = False

    settings: SFTSettings
    Settings = SFTSettings

    @property
    def timesteps_per_round(self) -> int:
        """The calls of n_critic rollouts for the critic and n_generator for theta, everywhere."""
        rollouts = self.settings.n_critic + self.settings.n_generator
        return rollouts * self.settings.batch_size * self.policy.steps * self.processes.count

    @as_executed
    def train_round(self) -> dict[str, Tensor]:
        """Do one round."""
        self.anneal()
        _, metrics = self.train_critic()
        if self.critic_alone:
            return metrics
        for _ in range(self.settings.n_generator):
            loss = -self.critic(self.differentiable_samples()).mean()
            grad_norm = self.descend([loss])
        self.averaged.update()
        metrics["train/policy_loss"] = loss.detach()
        metrics["train/grad_norm"] = grad_norm
        return metrics

    def differentiable_samples(self) -> Tensor:
        """Roll out finished samples (batch_size, *shape) that keep their gradient in theta."""
        everyone = self.mdp.initial(self.settings.batch_size * self.processes.count, self.generator)
        sample = self.processes.share(everyone)
        for step in range(self.policy.steps):
            # The noise is drawn outside, so recomputing a step repeats it.
            noise = self.fresh_noise(sample)
            if self.settings.policy.gradient_checkpointing:
                sample = checkpoint(self._move, sample, step, noise, use_reentrant=False)
            else:
                sample = self._move(sample, step, noise)
        return sample

    def _move(self, sample: Tensor, step: int, noise: Tensor) -> Tensor:
        mean, std = self.policy.distribution(sample, step)
        return torch.addcmul(mean, std, noise)

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        return (
            f"Give gradient_checkpointing=True, or a batch_size below {self.settings.batch_size}."
        )
