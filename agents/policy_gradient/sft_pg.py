"""SFT-PG: shortcut fine-tuning with the policy gradient (paper A; MATH.md S.2 to S.7).

    grad Phi = -E[ sum_j A_j grad log p_theta(x_s | x_t) ],      A_j = f(x_0) - V(x_t, t_j)

No gradient of f with respect to x is needed, none flows through the chain, and memory does not grow
with K beyond the stored trajectories.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...envs.mdp import Reward
from ..base import Environment
from ..denoisers.denoiser import Denoiser
from .execution import as_executed
from .settings import SFTPGSettings
from .shortcut import Critic, ShortcutAgent


class SFTPG(ShortcutAgent):
    """Fine-tune a sampler as a policy against a learned critic, with a value baseline.

    A round: roll out n_critic batches; one Adam step of critic and baseline on each; then
    n_generator policy-gradient steps, each on a minibatch of transitions drawn from the buffer
    without replacement.

    Args:
        env: the environment; its reward becomes the critic.
        denoiser: the network theta, trained in place.
        settings: see `SFTPGSettings`.
        critic: f and V; by default an `IPMCritic` as the settings say. A plain reward function
            (N, *shape) -> (N,) gets a learned baseline and is maximised as it is.
        arguments: see `Agent`: single settings by name, seed, verbose, tensorboard_log.

    Raises:
        ValueError: a chain without densities, counts below 1, a negative noise_power, or a buffer
            smaller than n_generator * minibatch_size.
    """

    name = "sft-pg"
    uses_baseline = True

    settings: SFTPGSettings
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
        noise_power, n_generator = settings.policy.noise_power, settings.n_generator
        weights = torch.from_numpy(self._tableau.base_std**noise_power)
        self._step_weights = (weights / weights.mean()).to(self.device, torch.float32)
        transitions = settings.n_critic * settings.batch_size * self.policy.steps
        # The default fits any sampler, also one of a single step.
        self.minibatch_size = settings.minibatch_size or max(
            1, min(10 * settings.batch_size, transitions // n_generator)
        )
        if n_generator * self.minibatch_size > transitions:
            raise ValueError(
                f"The buffer holds n_critic * batch_size * steps = {transitions} transitions, "
                f"fewer than n_generator * minibatch_size = {n_generator * self.minibatch_size}: "
                f"take a minibatch_size of at most {transitions // n_generator}, or larger batches."
            )

    @as_executed
    def train_round(self) -> dict[str, Tensor]:
        """Do one round of S.7."""
        self.anneal()
        buffer, metrics = self.train_critic()
        if self.critic_alone:
            return metrics
        advantages = self.advantages(buffer)
        minibatches = [
            Minibatch(buffer, advantages, chosen) for chosen in self._draw_transitions(advantages)
        ]
        old = self._behaviour_log_densities(minibatches)
        for minibatch, old_log_density in zip(minibatches, old, strict=True):
            seen: list[tuple[Tensor, Tensor]] = []
            grad_norm = self.descend(self._losses(minibatch, old_log_density, seen))
            # A process may have no share in a tiny minibatch.
            nothing = advantages.new_empty(0)
            log_density = torch.cat([nothing, *(piece for piece, _ in seen)])
            loss = torch.cat([nothing, *(piece for _, piece in seen)]).sum()
            if self.will_log and minibatch is minibatches[0] and old_log_density is not None:
                ratio = (log_density - old_log_density).exp()
                metrics["train/ratio_first_batch"] = ratio.mean() if len(ratio) else loss + 1
        self.averaged.update()
        metrics["train/policy_loss"] = loss
        metrics["train/grad_norm"] = grad_norm
        if self.will_log and old[0] is not None:
            metrics |= self._divergence(minibatches[0], old[0])
        return metrics

    @torch.no_grad()
    def advantages(self, buffer: Tensor) -> Tensor:
        """Return A (K, M) for trajectories (K + 1, M, *shape): lambda-returns minus V."""
        # Step by step: the networks' activations then need memory for one state, not for K.
        steps = torch.arange(self.policy.steps, device=self.device).unsqueeze(1)
        values = torch.cat([self._values(buffer[j : j + 1], step) for j, step in enumerate(steps)])
        final = torch.cat([self.critic(self.fetch(part)) for part in self._split(buffer[-1])])
        if self.settings.policy.gae_lambda == 1:
            advantages = final - values
        else:
            gains = torch.diff(values, dim=0, append=final.unsqueeze(0))
            advantages = gains
            for j in range(len(gains) - 2, -1, -1):
                advantages[j] += self.settings.policy.gae_lambda * advantages[j + 1]
        if self.settings.policy.normalize_advantage:
            advantages = advantages / self.processes.std(advantages).clamp_min(1e-8)
        return advantages

    def _values(self, states: Tensor, step: Tensor) -> Tensor:
        """Return V (1, M) of stored states (1, M, *shape) before one step."""
        parts = self._split(states, dim=1)
        return torch.cat([self.critic.value(self.fetch(part), step) for part in parts], dim=1)

    def _split(self, stored: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Split a part of the buffer into what the networks may see at once."""
        return stored.split(self.settings.execution.micro_batch_size or stored.shape[dim], dim)

    def policy_loss(
        self, log_density: Tensor, advantage: Tensor, old_log_density: Tensor | None
    ) -> Tensor:
        """Return the surrogate whose gradient is S.4's, or PPO's clipped one with `clip_range`."""
        if self.settings.policy.clip_range is None or old_log_density is None:
            return -(advantage * log_density).mean()
        ratio = (log_density - old_log_density).exp()
        clipped = ratio.clamp(
            1 - self.settings.policy.clip_range, 1 + self.settings.policy.clip_range
        )
        return -torch.minimum(ratio * advantage, clipped * advantage).mean()

    def _draw_transitions(self, advantages: Tensor) -> list[Tensor]:
        """Draw n_generator minibatches of indices into advantages (K, M), none twice.

        Several processes draw from the transitions of all of them, and each keeps its own.
        """
        count, batch = self.processes.count, self.settings.batch_size
        size = self.minibatch_size * count
        everyone = count * advantages.numel()
        order = torch.randperm(everyone, generator=self.generator, device=self.device)
        chosen = order[: self.settings.n_generator * size].split(size)
        if count == 1:
            return list(chosen)
        mine = []
        for index in chosen:
            # (step, critic batch, process, place in the batch), as `train_critic` shared them out.
            batch_of_all, place = index // batch, index % batch
            index = index[batch_of_all % count == self.processes.rank]
            batch_of_all, place = index // batch, index % batch
            mine.append(batch_of_all // count * batch + place)
        return mine

    def _pieces(self, minibatch: Minibatch) -> Iterator[tuple[Tensor, ...]]:
        """Yield (x_t, x_s, step, advantage) of a minibatch, `micro_batch_size` at a time."""
        for piece in minibatch.split(self.settings.execution.micro_batch_size):
            sample, next_sample, step, advantage = piece
            yield self.fetch(sample), self.fetch(next_sample), step, advantage

    def _losses(
        self,
        minibatch: Minibatch,
        old_log_density: Tensor | None,
        seen: list[tuple[Tensor, Tensor]],
    ) -> Iterator[Tensor]:
        """Yield the pieces of a minibatch's loss; note log-densities and losses in `seen`."""
        done = 0
        for sample, next_sample, step, advantage in self._pieces(minibatch):
            log_density = self.policy.log_density(
                next_sample, sample, step, self.settings.policy.log_density
            )
            old = None
            if old_log_density is not None:
                old = old_log_density[done : done + len(sample)]
            done += len(sample)
            share = len(sample) / self.minibatch_size
            weighted = self._step_weights[step] * advantage
            loss = share * self.policy_loss(log_density, weighted, old)
            seen.append((log_density.detach(), loss.detach().view(1)))
            yield loss

    @torch.no_grad()
    def _log_densities(self, minibatch: Minibatch) -> Tensor:
        """Return log p (n,) of a minibatch's transitions under the policy as it is."""
        densities = [torch.empty(0, device=self.device)]
        for sample, next_sample, step, _ in self._pieces(minibatch):
            densities.append(
                self.policy.log_density(next_sample, sample, step, self.settings.policy.log_density)
            )
        return torch.cat(densities)

    def _behaviour_log_densities(self, minibatches: list[Minibatch]) -> list[Tensor | None]:
        """Return log p before any update, by the same calls: the first ratio is exactly 1."""
        needed = (
            len(minibatches) if self.settings.policy.clip_range is not None else int(self.will_log)
        )
        densities: list[Tensor | None] = [
            self._log_densities(minibatch) for minibatch in minibatches[:needed]
        ]
        return densities + [None] * (len(minibatches) - needed)

    @torch.no_grad()
    def _divergence(self, minibatch: Minibatch, old: Tensor) -> dict[str, Tensor]:
        """Measure how far the round moved the policy (Schulman's k3 estimate of the KL)."""
        log_ratio = self._log_densities(minibatch) - old
        if not len(log_ratio):
            log_ratio = log_ratio.new_zeros(1)  # no share in this minibatch, nothing to say
        ratio = log_ratio.exp()
        return {
            "train/approx_kl": (ratio - 1 - log_ratio).mean(),
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


class Minibatch:
    """Transitions picked from a buffer, read where they lie when they are needed.

    Args:
        buffer: trajectories (K + 1, M, *shape), on any device.
        advantages: (K, M).
        index: (n,) int64, into the flattened advantages.
    """

    def __init__(self, buffer: Tensor, advantages: Tensor, index: Tensor) -> None:
        self._samples, self._next = buffer[:-1].flatten(0, 1), buffer[1:].flatten(0, 1)
        self._advantages, self._index = advantages, index

    def split(self, size: int | None) -> Iterator[tuple[Tensor, ...]]:
        """Yield (x_t, x_s, step, advantage), `size` transitions at a time; None: all at once."""
        for index in (
            self._index.split(size or max(len(self._index), 1)) if len(self._index) else ()
        ):
            stored = index.to(self._samples.device)
            step = index // self._advantages.shape[1]
            advantage = self._advantages.flatten()[index]
            yield self._samples[stored], self._next[stored], step, advantage
