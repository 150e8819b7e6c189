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

from ...common.arguments import checked
from ...common.checks import at_least, fraction, not_negative, positive
from ...common.precision import Precision
from ...envs.mdp import Reward
from ..base import Environment
from ..denoisers.denoiser import Denoiser
from ..samplers.gaussian import Reduction
from ..solvers import Options
from .execution import as_executed
from .shortcut import Buffer, Critic, ShortcutAgent


class SFTPG(ShortcutAgent):
    """Fine-tune a sampler as a policy against a learned critic, with a value baseline.

    A round: roll out n_critic batches; one Adam step of critic and baseline on each; then
    n_generator policy-gradient steps, each on a minibatch of transitions drawn from the buffer
    without replacement.

    Args:
        env: the environment; its reward becomes the critic.
        denoiser: the network theta, trained in place.
        critic: f and V; by default an `IPMCritic` built from the next eight arguments. A plain
            reward function (N, *shape) -> (N,) gets a learned baseline and is maximised as it is.
        regularizer: of the critic: "baseline" is SFT-PG (B), "gradient-penalty" SFT-PG (GP); also
            "weight-clip", "spectral-norm", "none".
        coefficient: weight of the regulariser; the critic's default if None.
        critic_width: hidden width of f, or the channels of its first stage; see `make_critic`.
        residual_baseline: V(x_t, t) = f(x_t) + a learned residual; False learns V alone, as
            published.
        baseline_states: of the K states of a trajectory, how many V is trained on in a critic step.
        critic_learning_rate: of f.
        baseline_learning_rate: of V.
        critic_lr_schedule: of both: "constant", "linear" or "cosine".
        batch_size: trajectories a critic step.
        n_critic: critic steps a round.
        n_generator: policy steps a round.
        critic_rounds: rounds at the start in which the critic learns alone. What a raw critic
            prefers is chance, and with normalised advantages the policy would follow it.
        minibatch_size: transitions a policy step; 10 * batch_size by default, whatever K, so that
            memory does not grow with K, or the buffer's share where that is less.
        learning_rate: of theta.
        betas: Adam's, for theta.
        lr_schedule: of theta: "constant", "linear" or "cosine".
        max_grad_norm: the gradient's norm is clipped here (paper A's gamma).
        clip_range: PPO's clip of the importance ratio at 1 +- clip_range; None, as published, has
            no ratio at all.
        log_density: over dimensions: "sum", or "mean" (paper A on images).
        gae_lambda: 1 is the advantage above; below 1 mixes in the differences of V along the
            trajectory (generalised advantage estimation, Schulman et al. 2016, with V(x_0) =
            f(x_0)).
        normalize_advantage: divide the advantages by their standard deviation over the buffer.
        noise_power: weight each step's gradient by its standard deviation to this power, relative
            to the other steps'. 0 is the policy gradient, in which steps of little noise drown the
            others, as their scores are of size 1 / std; 1 makes all steps' scores alike; 2 is the
            natural gradient in each step's mean (our extension).
        ema: decay a round of the averaged theta, which samples; 0 uses theta itself.
        learn_std: train the K standard deviations as well.
        precision: "float32", or "bf16": networks compute in bfloat16 where that is safe (autocast);
            weights, densities and rewards stay float32.
        channels_last: keep convolution weights in that memory format; faster on most GPUs.
        compile: run the denoiser through `torch.compile`.
        micro_batch_size: most samples that the denoiser sees at once, in rollouts and, with
            gradients accumulated, in policy steps; None takes them whole. The result is the same to
            rounding, the memory is not.
        buffer: where trajectories are kept: beside the networks as "float32" or "float16", or on
            the "cpu" ("cpu-float16"). Half precision rounds each state by up to 2.4e-4 of its
            size, which a last standard deviation of 0.001 hardly notices.
        solver: the chain; it must be one-step with noise in every step.
        solver_options: of the solver; None takes paper A's choice for the kind of data.
        seed: seed of all randomness.
        verbose: 1 prints the log to the screen.
        tensorboard_log: folder for TensorBoard.

    Raises:
        ValueError: a chain without densities, counts below 1, a negative noise_power, or a buffer
            smaller than n_generator * minibatch_size.
    """

    name = "sft-pg"
    uses_baseline = True

    @checked
    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        *,
        critic: Critic | Reward | None = None,
        regularizer: str = "baseline",
        coefficient: float | None = None,
        critic_width: int | None = None,
        residual_baseline: bool = True,
        baseline_states: int = 3,
        critic_learning_rate: float = 1e-3,
        baseline_learning_rate: float = 1e-3,
        critic_lr_schedule: str = "constant",
        batch_size: int = 256,
        n_critic: int = 5,
        n_generator: int = 2,
        critic_rounds: int = 0,
        minibatch_size: int | None = None,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        lr_schedule: str = "linear",
        max_grad_norm: float = 1.0,
        clip_range: float | None = None,
        log_density: Reduction = "sum",
        gae_lambda: float = 0.9,
        normalize_advantage: bool = True,
        noise_power: float = 0.0,
        ema: float = 0.95,
        learn_std: bool = False,
        precision: Precision = "float32",
        channels_last: bool = False,
        compile: bool = False,
        micro_batch_size: int | None = None,
        buffer: Buffer = "float32",
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
            residual_baseline=residual_baseline,
            baseline_states=baseline_states,
            critic_learning_rate=critic_learning_rate,
            baseline_learning_rate=baseline_learning_rate,
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
        at_least(1, minibatch_size=minibatch_size)
        positive(clip_range=clip_range)
        fraction(with_one=True, gae_lambda=gae_lambda)
        not_negative(noise_power=noise_power)
        self.clip_range = clip_range
        self.log_density = log_density
        self.gae_lambda = gae_lambda
        self.normalize_advantage = normalize_advantage
        self.noise_power = noise_power
        weights = torch.from_numpy(self._tableau.base_std**noise_power)
        self._step_weights = (weights / weights.mean()).to(self.device, torch.float32)
        transitions = n_critic * batch_size * self.policy.steps
        # The default fits any sampler, also one of a single step.
        self.minibatch_size = minibatch_size or max(
            1, min(10 * batch_size, transitions // n_generator)
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
        if self.gae_lambda == 1:
            advantages = final - values
        else:
            gains = torch.diff(values, dim=0, append=final.unsqueeze(0))
            advantages = gains
            for j in range(len(gains) - 2, -1, -1):
                advantages[j] += self.gae_lambda * advantages[j + 1]
        if self.normalize_advantage:
            advantages = advantages / self.processes.std(advantages).clamp_min(1e-8)
        return advantages

    def _values(self, states: Tensor, step: Tensor) -> Tensor:
        """Return V (1, M) of stored states (1, M, *shape) before one step."""
        parts = self._split(states, dim=1)
        return torch.cat([self.critic.value(self.fetch(part), step) for part in parts], dim=1)

    def _split(self, stored: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Split a part of the buffer into what the networks may see at once."""
        return stored.split(self.micro_batch_size or stored.shape[dim], dim)

    def policy_loss(
        self, log_density: Tensor, advantage: Tensor, old_log_density: Tensor | None
    ) -> Tensor:
        """Return the surrogate whose gradient is S.4's, or PPO's clipped one with `clip_range`."""
        if self.clip_range is None or old_log_density is None:
            return -(advantage * log_density).mean()
        ratio = (log_density - old_log_density).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return -torch.minimum(ratio * advantage, clipped * advantage).mean()

    def _draw_transitions(self, advantages: Tensor) -> list[Tensor]:
        """Draw n_generator minibatches of indices into advantages (K, M), none twice.

        Several processes draw from the transitions of all of them, and each keeps its own.
        """
        count, batch = self.processes.count, self.batch_size
        size = self.minibatch_size * count
        everyone = count * advantages.numel()
        order = torch.randperm(everyone, generator=self.generator, device=self.device)
        chosen = order[: self.n_generator * size].split(size)
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
        for piece in minibatch.split(self.micro_batch_size):
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
            log_density = self.policy.log_density(next_sample, sample, step, self.log_density)
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
            densities.append(self.policy.log_density(next_sample, sample, step, self.log_density))
        return torch.cat(densities)

    def _behaviour_log_densities(self, minibatches: list[Minibatch]) -> list[Tensor | None]:
        """Return log p before any update, by the same calls: the first ratio is exactly 1."""
        needed = len(minibatches) if self.clip_range is not None else int(self.will_log)
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
        half = max((self.micro_batch_size or self.minibatch_size) // 2, 1)
        return (
            f"Give micro_batch_size={half}, which changes no result, or buffer='cpu', or a "
            f"batch_size below {self.batch_size}."
        )

    def settings(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments."""
        return {
            **super().settings(),
            "minibatch_size": self.minibatch_size,
            "clip_range": self.clip_range,
            "log_density": self.log_density,
            "gae_lambda": self.gae_lambda,
            "normalize_advantage": self.normalize_advantage,
            "noise_power": self.noise_power,
        }


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
