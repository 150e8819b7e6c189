"""ShortcutAgent: what SFT and SFT-PG share, a sampler fine-tuned against a learned critic.

Shortcut fine-tuning (paper A) alternates: n_critic critic steps with the sampler fixed, then
n_generator steps of the sampler with the critic fixed, descending the integral probability metric
Phi(p_0^theta, q_0) (MATH.md S.1, S.7). The two agents differ in the gradient of the second part
only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...common.checks import at_least, not_negative, positive
from ...common.optimisation import (
    Averaged,
    TrainingDivergedError,
    adam,
    learning_rate,
    learning_rate_schedule,
    seeded,
    set_learning_rate,
)
from ...common.precision import Precision
from ...critics import IPMCritic, MLPBaseline, RewardCritic, make_baseline, make_critic
from ...envs.mdp import Reward
from ..base import Agent, Environment
from ..denoisers.denoiser import Denoiser
from ..samplers.gaussian import GaussianChain
from ..samplers.tableau import Tableau
from ..solvers import Options
from .execution import Execution, as_executed

WARMUP_ROUNDS = 20

Buffer = Literal["float32", "float16", "cpu", "cpu-float16"]
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

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        critic: Critic | Reward | None,
        *,
        regularizer: str,
        coefficient: float | None,
        critic_width: int | None,
        residual_baseline: bool,
        baseline_states: int,
        critic_learning_rate: float,
        baseline_learning_rate: float,
        critic_lr_schedule: str,
        batch_size: int,
        n_critic: int,
        n_generator: int,
        critic_rounds: int,
        learning_rate: float,
        betas: tuple[float, float],
        lr_schedule: str,
        max_grad_norm: float,
        ema: float,
        learn_std: bool,
        precision: Precision,
        channels_last: bool,
        compile: bool,
        micro_batch_size: int | None,
        buffer: Buffer,
        solver: str,
        solver_options: Options | None,
        seed: int,
        verbose: int,
        tensorboard_log: str | None,
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
        at_least(
            1,
            batch_size=batch_size,
            n_critic=n_critic,
            n_generator=n_generator,
            baseline_states=baseline_states,
            critic_width=critic_width,
            micro_batch_size=micro_batch_size,
        )
        at_least(0, critic_rounds=critic_rounds)
        not_negative(
            learning_rate=learning_rate,
            critic_learning_rate=critic_learning_rate,
            baseline_learning_rate=baseline_learning_rate,
        )
        positive(max_grad_norm=max_grad_norm)
        self.micro_batch_size = micro_batch_size
        self.buffer = buffer
        self.regularizer = regularizer
        self.coefficient = coefficient
        self.critic_width = critic_width
        self.residual_baseline = residual_baseline
        self.baseline_states = min(baseline_states, self._tableau.steps)
        self.critic_learning_rate = critic_learning_rate
        self.baseline_learning_rate = baseline_learning_rate
        self.critic_lr_schedule = critic_lr_schedule
        self.batch_size = batch_size
        self.n_critic = n_critic
        self.n_generator = n_generator
        self.critic_rounds = critic_rounds
        self.learning_rate = learning_rate
        self.betas = (betas[0], betas[1])
        self.lr_schedule = lr_schedule
        self.max_grad_norm = max_grad_norm
        self.learn_std = learn_std
        for schedule in (lr_schedule, critic_lr_schedule):
            learning_rate_schedule(schedule)  # refuses one that does not exist
        self.policy = GaussianChain(self.denoiser, self._tableau, learn_std).to(self.device)
        self.optimizer = adam(self.policy.trained(), self.betas)
        self.averaged = Averaged(self.policy, ema)
        # Only what trains: the averaged network samples as any user of its file will.
        self.precision, self.channels_last, self.compile = precision, channels_last, compile
        self.execution = Execution(self.denoiser, precision, channels_last, compile)
        self.critic = self._default_critic() if critic is None else self._with_face(critic)
        # A critic of one's own comes with rates of its own.
        optimizer = getattr(self.critic, "optimizer", None)
        self._critic_rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        # The agent's own decision process pays what the critic says; the caller's stays as it is.
        self.mdp = self.mdp.with_reward(self.critic)

    def _with_face(self, critic: Critic | Reward) -> Critic:
        """Give a plain reward function the face of a critic."""
        if isinstance(critic, Critic):
            return critic
        with seeded(self.seed):
            baseline = self._default_baseline()
        return RewardCritic(critic, baseline, self.baseline_learning_rate).to(self.device)

    def _default_baseline(self) -> MLPBaseline | None:
        if not self.uses_baseline:
            return None
        return make_baseline(tuple(self.mdp.shape), self.policy.steps)

    def _default_critic(self) -> IPMCritic:
        shape = tuple(self.mdp.shape)
        with seeded(self.seed):
            critic = IPMCritic(
                make_critic(shape, self.critic_width),
                self.regularizer,
                baseline=self._default_baseline(),
                residual_baseline=self.residual_baseline,
                coefficient=self.coefficient,
                learning_rate=self.critic_learning_rate,
                baseline_learning_rate=self.baseline_learning_rate,
                precision=self.precision,
            )
        if self.channels_last:
            critic.to(memory_format=torch.channels_last)
        return critic.to(self.device)

    @property
    def timesteps_per_round(self) -> int:
        """The rollouts' calls, those of all processes: n_critic batches of K steps."""
        return self.n_critic * self.batch_size * self.policy.steps * self.processes.count

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module.denoiser

    @property
    def tableau(self) -> Tableau:
        """The sampler, with the learned standard deviations when they are learned."""
        return self.averaged.module.export() if self.learn_std else self._tableau

    @as_executed
    def train_critic(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Roll out and take n_critic critic steps, each on its own batch of trajectories.

        The sampler is fixed meanwhile, so all n_critic batches are rolled out at once.

        Returns:
            The buffer of trajectories (K + 1, n_critic * batch_size, *shape), and the metrics.
        """
        count = self.processes.count
        with torch.no_grad():
            everyone = self.mdp.initial(self.n_critic * self.batch_size * count, self.generator)
            noise = self.processes.share(everyone, groups=self.n_critic)
            buffer = self.policy.rollout(
                noise,
                draw=lambda like: self.fresh_noise(like, self.n_critic),
                store=self._store(noise),
                micro_batch_size=self.micro_batch_size,
            )
        # On a GPU we do not wait for the answer: there it shows in the critic's metrics.
        if self.device.type == "cpu" and not buffer[-1].isfinite().all():
            raise TrainingDivergedError("rollout/sample", self.num_timesteps)
        for batch in buffer.split(self.batch_size, dim=1):
            everyone = self.mdp.target.sample(self.batch_size * count, self.generator)
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
        steps = steps[: self.baseline_states]
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
        if self.buffer == "float32":
            return None
        place, dtype = BUFFERS[self.buffer]
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
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        return norm

    @property
    def critic_alone(self) -> bool:
        """Whether this is one of the first rounds, in which the critic learns alone."""
        return self.rounds < self.critic_rounds

    def anneal(self) -> None:
        """Set this round's learning rates; theta's rises over the first rounds of a raw critic."""
        done, update = self.progress, self.rounds - self.critic_rounds
        rate = learning_rate(self.learning_rate, self.lr_schedule, done, update, WARMUP_ROUNDS)
        set_learning_rate(self.optimizer, rate)
        if self._critic_rates:
            optimizer: torch.optim.Optimizer = self.critic.optimizer  # type: ignore[union-attr]
            schedule = self.critic_lr_schedule
            rates = (learning_rate(peak, schedule, done) for peak in self._critic_rates)
            set_learning_rate(optimizer, *rates)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments."""
        return {
            "regularizer": self.regularizer,
            "coefficient": self.coefficient,
            "critic_width": self.critic_width,
            "residual_baseline": self.residual_baseline,
            "baseline_states": self.baseline_states,
            "critic_learning_rate": self.critic_learning_rate,
            "baseline_learning_rate": self.baseline_learning_rate,
            "critic_lr_schedule": self.critic_lr_schedule,
            "batch_size": self.batch_size,
            "n_critic": self.n_critic,
            "n_generator": self.n_generator,
            "critic_rounds": self.critic_rounds,
            "learning_rate": self.learning_rate,
            "betas": list(self.betas),
            "lr_schedule": self.lr_schedule,
            "max_grad_norm": self.max_grad_norm,
            "ema": self.averaged.decay,
            "learn_std": self.learn_std,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "compile": self.compile,
            "micro_batch_size": self.micro_batch_size,
            "buffer": self.buffer,
        }

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
