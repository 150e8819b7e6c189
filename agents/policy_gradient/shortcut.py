"""ShortcutAgent: what SFT and SFT-PG share, a sampler fine-tuned against a learned critic.

Shortcut fine-tuning (paper A) alternates: n_critic critic steps with the sampler fixed, then
n_generator steps of the sampler with the critic fixed, descending the integral probability metric
Phi(p_0^theta, q_0) (MATH.md S.1, S.7). The two agents differ in the gradient of the second part
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...common.optimisation import (
    Averaged,
    TrainingDivergedError,
    adam,
    learning_rate,
    seeded,
    set_learning_rate,
)
from ...critics import IPMCritic, MLPBaseline, RewardCritic, make_baseline, make_critic
from ...envs.mdp import Reward
from ..base import Agent, Environment
from ..denoisers.denoiser import Denoiser
from ..samplers.gaussian import GaussianChain
from ..samplers.tableau import Tableau
from .execution import Execution, as_executed
from .settings import SFTPGSettings, SFTSettings, ShortcutSettings

WARMUP_ROUNDS = 20

# Where trajectories are kept (None: beside the networks) and as what.
BUFFERS: dict[str, tuple[str | None, torch.dtype]] = {
    "float32": (None, torch.float32),
    "float16": (None, torch.float16),
    "cpu": ("cpu", torch.float32),
    "cpu-float16": ("cpu", torch.float16),
}

# How a critic's metrics are called in the logs.
CRITIC_TAGS = {
    "critic_real": "rollout/critic_real",
    "critic_fake": "rollout/critic_fake",
    "ipm_gap": "rollout/ipm_gap",
    "critic_loss": "train/critic_loss",
    "baseline_loss": "train/baseline_loss",
    "regularization": "train/regularization",
    "critic_grad_norm": "train/critic_grad_norm",
}


@runtime_checkable
class Critic(Protocol):
    """What the shortcut agents ask of a critic (see `fewstep.critics`)."""

    def __call__(self, sample: Tensor) -> Tensor:
        """Return f (N,) for samples (N, *shape): high on data, low on fakes."""

    def value(self, states: Tensor, steps: Tensor | None = None) -> Tensor:
        """Return V (k, N) for states (k, N, *shape) before steps (k,)."""

    def update(
        self, real: Tensor, fake: Tensor, states: Tensor | None, steps: Tensor | None
    ) -> dict[str, Tensor]:
        """Learn from real and fake samples (N, *shape), states (k, N, *shape) before steps (k,)."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` restores."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore the critic."""


class ShortcutAgent(Agent):
    """Base of SFT and SFT-PG. See `SFTPG` for the arguments."""

    data_parallel = True
    uses_baseline: ClassVar[bool]

    settings: SFTPGSettings | SFTSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: ShortcutSettings | None = None,
        *,
        critic: Critic | Reward | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, **arguments)
        optimizer, execution = self.settings.optimizer, self.settings.execution
        self.policy = GaussianChain(
            self.denoiser, self._tableau, self.settings.policy.learn_std
        ).to(self.device)
        self.optimizer = adam(self.policy.trained(), optimizer.betas)
        self.averaged = Averaged(self.policy, optimizer.ema)
        # Only what trains: the averaged network samples as any user of its file will.
        self.execution = Execution(self.denoiser, execution)
        self.critic = self._default_critic() if critic is None else self._with_face(critic)
        # A critic of one's own comes with rates of its own.
        its = getattr(self.critic, "optimizer", None)
        self._critic_rates = [group["lr"] for group in its.param_groups] if its else []
        # The agent's own decision process pays what the critic says; the caller's stays as it is.
        self.mdp = self.mdp.with_reward(self.critic)

    def _with_face(self, critic: Critic | Reward) -> Critic:
        """Give a plain reward function the face of a critic."""
        if isinstance(critic, Critic):
            return critic
        with seeded(self.seed):
            baseline = self._default_baseline()
        rate = getattr(self.settings.critic, "baseline_learning_rate", 1e-3)
        return RewardCritic(critic, baseline, rate).to(self.device)

    def _default_baseline(self) -> MLPBaseline | None:
        if not self.uses_baseline:
            return None
        return make_baseline(tuple(self.mdp.shape), self.policy.steps)

    def _default_critic(self) -> IPMCritic:
        shape, execution = tuple(self.mdp.shape), self.settings.execution
        settings: Any = self.settings.critic
        with seeded(self.seed):
            critic = IPMCritic(
                make_critic(shape, settings.width),
                settings.regularizer,
                baseline=self._default_baseline(),
                residual_baseline=getattr(settings, "residual_baseline", False),
                coefficient=settings.coefficient,
                learning_rate=settings.learning_rate,
                baseline_learning_rate=getattr(
                    settings, "baseline_learning_rate", settings.learning_rate
                ),
                precision=execution.precision,
            )
        if execution.channels_last:
            critic.to(memory_format=torch.channels_last)
        return critic.to(self.device)

    @property
    def timesteps_per_round(self) -> int:
        """The rollouts' calls, those of all processes: n_critic batches of K steps."""
        return (
            self.settings.n_critic
            * self.settings.batch_size
            * self.policy.steps
            * self.processes.count
        )

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module.denoiser

    @property
    def tableau(self) -> Tableau:
        """The sampler, with the learned standard deviations when they are learned."""
        return self.averaged.module.export() if self.settings.policy.learn_std else self._tableau

    @as_executed
    def train_critic(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Roll out and take n_critic critic steps, each on its own batch of trajectories.

        The sampler is fixed meanwhile, so all n_critic batches are rolled out at once.

        Returns:
            The buffer of trajectories (K + 1, n_critic * batch_size, *shape), and the metrics.
        """
        count = self.processes.count
        with torch.no_grad():
            everyone = self.mdp.initial(
                self.settings.n_critic * self.settings.batch_size * count, self.generator
            )
            noise = self.processes.share(everyone, groups=self.settings.n_critic)
            buffer = self.policy.rollout(
                noise,
                draw=lambda like: self.fresh_noise(like, self.settings.n_critic),
                store=self._store(noise),
                micro_batch_size=self.settings.execution.micro_batch_size,
            )
        # On a GPU we do not wait for the answer: there it shows in the critic's metrics.
        if self.device.type == "cpu" and not buffer[-1].isfinite().all():
            raise TrainingDivergedError("rollout/sample", self.num_timesteps)
        for batch in buffer.split(self.settings.batch_size, dim=1):
            everyone = self.mdp.target.sample(self.settings.batch_size * count, self.generator)
            real = self.processes.share(everyone)
            states, steps = self._states_for_baseline(batch)
            metrics = self.critic.update(real, self.fetch(batch[-1]), states, steps)
        self.num_timesteps += self.timesteps_per_round
        tagged = {CRITIC_TAGS.get(key, f"train/{key}"): value for key, value in metrics.items()}
        # The reward of an episode is f(x_0): the mean of f over the fakes, under the name SB3
        # gives it.
        return buffer, {"rollout/ep_rew_mean": metrics["critic_fake"], **tagged}

    def _states_for_baseline(self, batch: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Draw `baseline_states` of the K states of each trajectory, the same steps for all."""
        if not self.uses_baseline:
            return None, None
        count = self.policy.steps
        steps = torch.randperm(count, generator=self.generator, device=self.device)
        critic: Any = self.settings.critic
        steps = steps[: critic.baseline_states]
        return self.fetch(batch[steps.to(batch.device)]), steps

    def fresh_noise(self, like: Tensor, groups: int = 1) -> Tensor:
        """Draw noise shaped like a tensor: this process's share of what all of them draw."""
        everyone = like.new_empty(self.processes.count * len(like), *like.shape[1:])
        return self.processes.share(everyone.normal_(generator=self.generator), groups=groups)

    def fetch(self, stored: Tensor) -> Tensor:
        """Return a part of the buffer as the networks take it."""
        return stored.to(self.device, torch.float32)

    def _store(self, noise: Tensor) -> Tensor | None:
        """Make room for the trajectories of prior samples, if they do not stay beside them."""
        if self.settings.execution.buffer == "float32":
            return None
        place, dtype = BUFFERS[self.settings.execution.buffer]
        device = self.device if place is None else torch.device(place)
        # Pinned memory is copied from a GPU several times as fast.
        pinned = device.type == "cpu" and self.device.type == "cuda"
        shape = (self.policy.steps + 1, *noise.shape)
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

    def descend(self, losses: Iterable[Tensor]) -> Tensor:
        """Take one clipped gradient step of the sampler; return the norm before clipping.

        Args:
            losses: their sum is descended, each one's graph freed before the next is built.
        """
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        self.processes.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, self.settings.optimizer.max_grad_norm or math.inf
        )
        self.optimizer.step()
        return norm

    @property
    def critic_alone(self) -> bool:
        """Whether this is one of the first rounds, in which the critic learns alone."""
        return self.rounds < self.settings.critic_rounds

    def anneal(self) -> None:
        """Set this round's learning rates; theta's rises over the first rounds of a raw critic."""
        done, update = self.progress, self.rounds - self.settings.critic_rounds
        rate = learning_rate(
            self.settings.optimizer.learning_rate,
            self.settings.optimizer.lr_schedule,
            done,
            update,
            WARMUP_ROUNDS,
        )
        set_learning_rate(self.optimizer, rate)
        if self._critic_rates:
            optimizer: torch.optim.Optimizer = self.critic.optimizer  # type: ignore[union-attr]
            schedule = self.settings.critic.lr_schedule
            rates = (learning_rate(peak, schedule, done) for peak in self._critic_rates)
            set_learning_rate(optimizer, *rates)

    def state(self) -> dict[str, Any]:
        """Return optimizer, critic, and the standard deviations."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict(),
            "log_std": [self.policy.log_std, self.averaged.module.log_std],
            "heads": [head.state_dict() for head in self._heads()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic.load_state_dict(state["critic"])
        with torch.no_grad():
            for parameter, value in zip(
                (self.policy.log_std, self.averaged.module.log_std), state["log_std"], strict=True
            ):
                parameter.copy_(value)
        # Files from before there were second heads have none.
        for head, weights in zip(self._heads(), state.get("heads", []), strict=True):
            head.load_state_dict(weights)

    def _heads(self) -> list[torch.nn.Module]:
        """Return the second head in training and the averaged one, if the denoiser has any."""
        denoisers = (self.policy.denoiser, self.averaged.module.denoiser)
        return [denoiser.head for denoiser in denoisers if denoiser.head is not None]
