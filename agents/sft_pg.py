"""SFT-PG: shortcut fine-tuning with the policy gradient (paper A; MATH.md S.2 to S.7).

    grad Phi = -E[ sum_j A_j grad log p_theta(x_s | x_t) ],      A_j = f(x_0) - V(x_t, t_j)

No gradient of f with respect to x is needed, none flows through the chain, and memory does not grow
with K beyond the stored trajectories.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..envs.mdp import Reward
from .base import Environment
from .chain import Reduction
from .denoiser import Denoiser
from .shortcut import Critic, ShortcutAgent
from .solvers import Options


class SFTPG(ShortcutAgent):
    """Fine-tune a sampler as a policy against a learned critic, with a value baseline.

    A round: roll out n_critic batches; one Adam step of critic and baseline on each; then
    n_generator policy-gradient steps, each on a minibatch of transitions drawn from the buffer
    without replacement.

    Args:
        env: the environment; its reward becomes the critic.
        denoiser: the network theta, trained in place.
        critic: f and V; by default an `IPMCritic` built from the next seven arguments. A plain
            reward function (N, *shape) -> (N,) gets a learned baseline and is maximised as it is.
        regularizer: of the critic: "baseline" is SFT-PG (B), "gradient-penalty" SFT-PG (GP); also
            "weight-clip", "spectral-norm", "none".
        coefficient: weight of the regulariser; the critic's default if None.
        residual_baseline: V(x_t, t) = f(x_t) + a learned residual; False learns V alone, as
            published.
        baseline_states: of the K states of a trajectory, how many V is trained on in a critic step.
        critic_learning_rate: of f.
        baseline_learning_rate: of V.
        critic_lr_schedule: of both: "constant", "linear" or "cosine".
        batch_size: trajectories a critic step.
        n_critic: critic steps a round.
        n_generator: policy steps a round.
        minibatch_size: transitions a policy step; 10 * batch_size by default, whatever K, so that
            memory does not grow with K, or the buffer's share where that is less.
        learning_rate: of theta.
        betas: Adam's, for theta.
        lr_schedule: of theta: "constant", "linear" or "cosine".
        max_grad_norm: the gradient's norm is clipped here (gamma of S.6).
        clip_range: PPO's clip of the importance ratio at 1 +- clip_range; None, as published, has
            no ratio at all.
        log_density: over dimensions: "sum", or "mean" (paper A on images).
        gae_lambda: 1 is the advantage above; below 1 mixes in the differences of V along the
            trajectory (generalised advantage estimation, Schulman et al. 2016, with V(x_0) =
            f(x_0)).
        normalize_advantage: divide the advantages by their standard deviation over the buffer.
        ema: decay a round of the averaged theta, which samples; 0 uses theta itself.
        learn_std: train the K standard deviations as well.
        solver: the chain; it must be one-step with noise in every step.
        solver_options: of the solver; None takes paper A's choice for the kind of data.
        seed: seed of all randomness.
        verbose: 1 prints the log to the screen.
        tensorboard_log: folder for TensorBoard.

    Raises:
        ValueError: a chain without densities, counts below 1, or a buffer smaller than
            n_generator * minibatch_size.
    """

    name = "sft-pg"
    uses_baseline = True

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        *,
        critic: Critic | Reward | None = None,
        regularizer: str = "baseline",
        coefficient: float | None = None,
        residual_baseline: bool = True,
        baseline_states: int = 3,
        critic_learning_rate: float = 1e-3,
        baseline_learning_rate: float = 1e-3,
        critic_lr_schedule: str = "constant",
        batch_size: int = 256,
        n_critic: int = 5,
        n_generator: int = 2,
        minibatch_size: int | None = None,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        lr_schedule: str = "linear",
        max_grad_norm: float = 1.0,
        clip_range: float | None = None,
        log_density: Reduction = "sum",
        gae_lambda: float = 0.9,
        normalize_advantage: bool = True,
        ema: float = 0.95,
        learn_std: bool = False,
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
            residual_baseline=residual_baseline,
            baseline_states=baseline_states,
            critic_learning_rate=critic_learning_rate,
            baseline_learning_rate=baseline_learning_rate,
            critic_lr_schedule=critic_lr_schedule,
            batch_size=batch_size,
            n_critic=n_critic,
            n_generator=n_generator,
            learning_rate=learning_rate,
            betas=betas,
            lr_schedule=lr_schedule,
            max_grad_norm=max_grad_norm,
            ema=ema,
            learn_std=learn_std,
            solver=solver,
            solver_options=solver_options,
            seed=seed,
            verbose=verbose,
            tensorboard_log=tensorboard_log,
        )
        self.clip_range = clip_range
        self.log_density = log_density
        self.gae_lambda = gae_lambda
        self.normalize_advantage = normalize_advantage
        transitions = n_critic * batch_size * self.policy.steps
        # The default fits any sampler, also one of a single step.
        self.minibatch_size = minibatch_size or max(
            1, min(10 * batch_size, transitions // n_generator)
        )
        if n_generator * self.minibatch_size > transitions:
            raise ValueError(
                f"The buffer holds n_critic * batch_size * steps = {transitions} transitions, "
                f"fewer than n_generator * minibatch_size = {n_generator * self.minibatch_size}."
            )

    def train_round(self) -> dict[str, Tensor]:
        """Do one round of S.7."""
        self.anneal()
        buffer, metrics = self.train_critic()
        advantages = self.advantages(buffer)
        minibatches = self._minibatches(buffer, advantages)
        old = self._behaviour_log_densities(minibatches)
        for minibatch, old_log_density in zip(minibatches, old, strict=True):
            sample, next_sample, step, advantage = minibatch
            log_density = self.policy.log_density(next_sample, sample, step, self.log_density)
            if self.will_log and minibatch is minibatches[0] and old_log_density is not None:
                ratio = (log_density.detach() - old_log_density).exp()
                metrics["train/ratio_first_batch"] = ratio.mean()
            loss = self.policy_loss(log_density, advantage, old_log_density)
            grad_norm = self.descend(loss)
        self.averaged.update()
        metrics["train/policy_loss"] = loss.detach()
        metrics["train/grad_norm"] = grad_norm
        if self.will_log and old[0] is not None:
            metrics |= self._divergence(minibatches[0], old[0])
        return metrics

    @torch.no_grad()
    def advantages(self, buffer: Tensor) -> Tensor:
        """Return A (K, M) for trajectories (K + 1, M, *shape): lambda-returns minus V."""
        # Step by step: the networks' activations then need memory for one state, not for K.
        steps = torch.arange(self.policy.steps, device=self.device).unsqueeze(1)
        values = torch.cat(
            [self.critic.value(buffer[j : j + 1], step) for j, step in enumerate(steps)]
        )
        final = self.critic(buffer[-1])
        if self.gae_lambda == 1:
            advantages = final - values
        else:
            gains = torch.diff(values, dim=0, append=final.unsqueeze(0))
            advantages = gains
            for j in range(len(gains) - 2, -1, -1):
                advantages[j] += self.gae_lambda * advantages[j + 1]
        if self.normalize_advantage:
            advantages = advantages / advantages.std().clamp_min(1e-8)
        return advantages

    def policy_loss(
        self, log_density: Tensor, advantage: Tensor, old_log_density: Tensor | None
    ) -> Tensor:
        """Return the surrogate whose gradient is S.4's, or PPO's clipped one with `clip_range`."""
        if self.clip_range is None or old_log_density is None:
            return -(advantage * log_density).mean()
        ratio = (log_density - old_log_density).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return -torch.minimum(ratio * advantage, clipped * advantage).mean()

    def _minibatches(self, buffer: Tensor, advantages: Tensor) -> list[tuple[Tensor, ...]]:
        """Draw n_generator minibatches (x_t, x_s, step, advantage), no transition twice."""
        count = advantages.shape[1]
        samples, next_samples = buffer[:-1].flatten(0, 1), buffer[1:].flatten(0, 1)
        order = torch.randperm(advantages.numel(), generator=self.generator, device=self.device)
        chosen = order[: self.n_generator * self.minibatch_size].split(self.minibatch_size)
        flat = advantages.flatten()
        return [(samples[i], next_samples[i], i // count, flat[i]) for i in chosen]

    @torch.no_grad()
    def _behaviour_log_densities(
        self, minibatches: list[tuple[Tensor, ...]]
    ) -> list[Tensor | None]:
        """Return log p before any update, by the same calls: the first ratio is exactly 1."""
        needed = len(minibatches) if self.clip_range is not None else int(self.will_log)
        densities: list[Tensor | None] = [
            self.policy.log_density(next_sample, sample, step, self.log_density)
            for sample, next_sample, step, _ in itertools.islice(minibatches, needed)
        ]
        return densities + [None] * (len(minibatches) - needed)

    @torch.no_grad()
    def _divergence(self, minibatch: tuple[Tensor, ...], old: Tensor) -> dict[str, Tensor]:
        """Measure how far the round moved the policy (Schulman's k3 estimate of the KL)."""
        sample, next_sample, step, _ = minibatch
        log_ratio = self.policy.log_density(next_sample, sample, step, self.log_density) - old
        ratio = log_ratio.exp()
        return {
            "train/approx_kl": (ratio - 1 - log_ratio).mean(),
            "train/ratio_max": ratio.max(),
            "train/ratio_min": ratio.min(),
        }

    def settings(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments."""
        return {
            **super().settings(),
            "minibatch_size": self.minibatch_size,
            "clip_range": self.clip_range,
            "log_density": self.log_density,
            "gae_lambda": self.gae_lambda,
            "normalize_advantage": self.normalize_advantage,
        }
