"""SFT-PG: shortcut fine-tuning with the policy gradient (Fan & Lee 2023; MATH.md S.2 to S.7).

    grad Phi = -E[ sum_j A_j grad log p_theta(x_s | x_t) ],      A_j = f(x_0) - V(x_t, t_j)

No gradient of f with respect to x is needed, none flows through the chain, and memory does not grow
with K beyond the stored trajectories.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ...envs.mdp import Reward
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..samplers.gaussian import GaussianChain
from .buffer import Trajectories
from .critic import Critic
from .settings import SFTPGSettings
from .shortcut import ShortcutAgent


class SFTPG(ShortcutAgent):
    """Fine-tune a sampler as a policy against a learned critic, with a value baseline.

    A round: roll out n_critic batches; one Adam step of critic and baseline on each; then
    n_generator policy-gradient steps, each on a minibatch of transitions drawn from the buffer
    without replacement.

    Its arguments are `ShortcutAgent`'s, its settings `SFTPGSettings`.

    Raises:
        ValueError: a chain without densities, settings out of their bounds, or a buffer smaller
            than n_generator * minibatch_size.
    """

    name = "sft-pg"

    settings: SFTPGSettings
    policy: GaussianChain
    Settings = SFTPGSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: SFTPGSettings | None = None,
        *,
        critic: Critic | Reward | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, critic=critic, **arguments)
        settings = self.settings
        weights = torch.from_numpy(self._tableau.base_std**settings.policy.noise_power)
        self._step_weights = (weights / weights.mean()).to(self.device, torch.float32)
        transitions = settings.n_critic * settings.batch_size * self.policy.steps
        # The default fits any sampler, also one of a single step.
        self.minibatch_size = settings.minibatch_size or max(
            1, min(10 * settings.batch_size, transitions // settings.n_generator)
        )
        needed = settings.n_generator * self.minibatch_size
        if needed > transitions:
            raise ValueError(
                f"The buffer holds n_critic * batch_size * steps = {transitions} transitions, "
                f"fewer than n_generator * minibatch_size = {needed}: take a minibatch_size of at "
                f"most {transitions // settings.n_generator}, or larger batches."
            )

    def improve(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Take n_generator steps along the policy gradient, each on a minibatch of transitions."""
        settings = self.settings
        advantages = self.advantages(trajectories)
        weighted = (self._step_weights.unsqueeze(1) * advantages).flatten()
        minibatches = trajectories.minibatches(
            settings.n_generator, self.minibatch_size, self.generator
        )
        # Under the policy that acted, by the same calls as below: the first ratio is exactly 1.
        compared = len(minibatches) if settings.policy.clip_range else int(self.will_log)
        old = [self._log_densities(trajectories, chosen) for chosen in minibatches[:compared]]
        updated = []
        for number, minibatch in enumerate(minibatches):
            before: Iterable[Tensor | None] = old[number] if number < compared else repeat(None)
            loss, densities = weighted.new_zeros(()), []
            self.optimizer.zero_grad()
            for piece, old_density in zip(trajectories.pieces(minibatch), before, strict=False):
                log_density = self.policy.log_density(
                    piece.action,
                    piece.sample,
                    piece.step,
                    settings.policy.log_density,
                    piece.condition,
                )
                share = len(log_density) / self.minibatch_size
                part = share * self.policy_loss(log_density, weighted[piece.place], old_density)
                part.backward()
                loss += part.detach()
                densities.append(log_density.detach())
            grad_norm = self.descend()
            updated.append(densities)
        metrics = {"train/policy_loss": loss, "train/grad_norm": grad_norm}
        if self.will_log:
            after = self._log_densities(trajectories, minibatches[0])
            metrics |= self._divergence(old[0], updated[0], after)
        return metrics

    def policy_loss(self, log_density: Tensor, advantage: Tensor, old: Tensor | None) -> Tensor:
        """Return the surrogate whose gradient is S.4's, or PPO's clipped one with `clip_range`.

        Args:
            log_density: log p_theta(x_s | x_t) of transitions (n,).
            advantage: A, (n,).
            old: log_density before any update (n,), for the clip.
        """
        clip = self.settings.policy.clip_range
        if clip is None or old is None:
            return -(advantage * log_density).mean()
        ratio = (log_density - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()

    @torch.no_grad()
    def advantages(self, trajectories: Trajectories) -> Tensor:
        """Return A (K, M): lambda-returns of the terminal reward minus V."""
        # Step by step: the networks' activations then need memory for one state, not for K.
        values = []
        for step in range(self.policy.steps):
            values.append(torch.cat([self.value(*part, step) for part in trajectories.at(step)]))
        finished = trajectories.at(self.policy.steps)
        rewards = torch.cat([episodes.terminal_reward(x) for episodes, x in finished])
        value = torch.stack(values)
        if self.settings.policy.gae_lambda == 1:
            advantages = rewards - value
        else:
            advantages = torch.diff(value, dim=0, append=rewards.unsqueeze(0))
            for j in range(len(advantages) - 2, -1, -1):
                advantages[j] += self.settings.policy.gae_lambda * advantages[j + 1]
        if self.settings.policy.normalize_advantage:
            advantages = advantages / self.processes.std(advantages).clamp_min(1e-8)
        return advantages

    @torch.no_grad()
    def _log_densities(self, trajectories: Trajectories, minibatch: Tensor) -> list[Tensor]:
        """Return log p (n,) of each piece of a minibatch under the policy as it is."""
        reduction = self.settings.policy.log_density
        return [
            self.policy.log_density(
                piece.action, piece.sample, piece.step, reduction, piece.condition
            )
            for piece in trajectories.pieces(minibatch)
        ]

    def _divergence(
        self, old: list[Tensor], updated: list[Tensor], after: list[Tensor]
    ) -> dict[str, Tensor]:
        """Say how far the round moved the policy, by the log-densities of its first minibatch.

        Args:
            old: before the round.
            updated: when the minibatch was used; they differ from the old ones by a mistake only.
            after: after the round.
        """
        # A process may have no share in a tiny minibatch, and nothing to say.
        before, during, now = (
            torch.cat(part) if part else torch.zeros(1, device=self.device)
            for part in (old, updated, after)
        )
        ratio = (now - before).exp()
        return {
            "train/ratio_first_batch": (during - before).exp().mean(),
            # Schulman's k3 estimate of the KL divergence.
            "train/approx_kl": (ratio - 1 - (now - before)).mean(),
            "train/ratio_max": self.processes.largest(ratio.max()),
            "train/ratio_min": -self.processes.largest(-ratio.min()),
        }

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        half = max((self.settings.execution.micro_batch_size or self.minibatch_size) // 2, 1)
        return (
            f"Give micro_batch_size={half}, which changes no result, or buffer='cpu', or a "
            f"batch_size below {self.settings.batch_size}."
        )
