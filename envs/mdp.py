"""The decision process itself: a diffusion sampler is a policy in a finite-horizon MDP.

State: the noisy sample and its time. Action: the next sample. Transition: the identity. Reward: 0,
until the finished sample ``x_0`` is shown to the critic, ``f(x_0)``, to be maximised. Horizon: the
steps of the schedule (SFT-PG, Fan & Lee 2023, section 3; MATH.md S.2). These are pure functions on
batched tensors that keep gradients; agents call them directly, and the three shells (``vector``,
``single``, ``sb3``) dress them for Gymnasium and Stable-Baselines3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..critics.checks import rewards_of
from ..critics.mmd import MMDCritic
from .processes.process import NoiseProcess
from .schedules.schedule import Schedule
from .targets.target import Target

Observation = dict[str, Tensor]
Reward = Callable[[Tensor], Tensor]

# Real samples of the default reward: enough to guide, and about as dear as the toys' networks.
DEFAULT_REWARD_SAMPLES = 512


@dataclass(frozen=True, eq=False)
class DiffusionMDP:
    """What a sampler acts in.

    Step ``j = 0..K-1`` counts the transitions in sampling order, 0 the noisiest; state ``j`` is the
    state before step ``j`` and state ``K`` the finished sample.

    Args:
        target: The real distribution; its device is where everything lives.
        process: The noise process.
        schedule: The times to visit, on the same process.
        reward: ``(N, *shape) -> (N,)``, high on data, a tensor or NumPy array of finite numbers. If
            it has a ``judge``, that judges finished samples, and may learn from them. None is an
            ``MMDCritic`` of some training samples: it compares the finished samples with those and
            with each other, so that their mean reward is minus the energy distance to the data.

    A decision process never changes: ``with_schedule`` and ``with_reward`` make another one.

    Raises:
        ValueError: The schedule belongs to another process.
        TypeError: The reward is not callable.
    """

    target: Target
    process: NoiseProcess
    schedule: Schedule
    reward: Reward | None = None

    def __post_init__(self) -> None:
        if self.schedule.process != self.process:
            raise ValueError(
                f"the schedule is made for {self.schedule.process!r}, "
                f"the environment has {self.process!r}; build it on that one"
            )
        if self.reward is None:
            reward = MMDCritic(self.target.subset(DEFAULT_REWARD_SAMPLES))
            object.__setattr__(self, "reward", reward)
        check_reward(self.reward)

    @cached_property
    def _times(self) -> list[float]:
        return self.schedule.times.tolist()

    @property
    def steps(self) -> int:
        """The horizon ``K``."""
        return self.schedule.steps

    @property
    def shape(self) -> torch.Size:
        """Shape of one sample."""
        return self.target.shape

    @property
    def device(self) -> torch.device:
        """Where samples, actions and rewards live."""
        return self.target.device

    def with_schedule(self, schedule: Schedule) -> DiffusionMDP:
        """The same decision process on other times."""
        return replace(self, schedule=schedule)

    def with_reward(self, reward: Reward) -> DiffusionMDP:
        """The same decision process with another reward."""
        return replace(self, reward=reward)

    def initial(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the first state, ``(n, *shape)`` float32: noise as at the schedule's first time."""
        return self.schedule.prior_sample((n, *self.shape), generator, device=self.device)

    def observe(self, sample: Tensor, step: int) -> Observation:
        """What the agent sees in state ``step``.

        Args:
            sample: ``(N, *shape)``.
            step: 0 to ``steps``, the latter for the finished sample.

        Returns:
            ``{"sample": (N, *shape), "timestep": (N,)}``; the timestep is a new tensor, the sample
            is the one given.
        """
        timestep = torch.full(
            (len(sample),), self._times[step], dtype=torch.float32, device=sample.device
        )
        return {"sample": sample, "timestep": timestep}

    def transition(self, sample: Tensor, action: Tensor) -> Tensor:
        """Move to the next state, which is the action itself as float32.

        Args:
            sample: The current state ``(N, *shape)``.
            action: The next sample, of the same shape and device.

        Raises:
            TypeError: The action is not a floating torch tensor.
            ValueError: The action has another shape or device, or holds NaN or infinity.
        """
        _check_batch(action, "action", sample.shape, sample.device)
        return action.to(torch.float32)

    def terminal_reward(self, sample: Tensor) -> Tensor:
        """Judge finished samples, by the reward's ``judge`` if it has one.

        A reward that learns from what it judges, as the default does, learns here and nowhere else:
        calling ``reward`` itself changes nothing.

        Args:
            sample: ``x_0``, ``(N, *shape)``.

        Returns:
            The reward, ``(N,)`` float32, to be maximised.

        Raises:
            TypeError: The reward returned neither a tensor nor a NumPy array of numbers.
            ValueError: It returned another shape or device, or NaN or infinity.
        """
        assert self.reward is not None  # __post_init__ saw to it
        return rewards_of(getattr(self.reward, "judge", self.reward), sample).to(torch.float32)

    def forget(self) -> None:
        """Let the reward forget the samples that it has judged, if it can."""
        if callable(forget := getattr(self.reward, "forget", None)):
            forget()

    def check_sample(self, sample: Tensor, n: int) -> Tensor:
        """Validate a start ``(n, *shape)`` that a user gives; returns a float32 copy."""
        _check_batch(sample, "sample", torch.Size((n, *self.shape)), self.device)
        return sample.detach().to(torch.float32, copy=True)


def check_reward(reward: object) -> None:
    """Raise TypeError for a reward that cannot be called."""
    if not callable(reward):
        raise TypeError(
            f"reward must be callable, (N, *shape) -> (N,); got {type(reward).__name__}"
        )


def no_reward(sample: Tensor) -> Tensor:
    """Reward every finished sample ``(N, *shape)`` with 0, for those who only need the process."""
    return sample.new_zeros(len(sample))


def _check_batch(values: Tensor, what: str, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{what} must be a floating torch tensor; got {kind}")
    if values.shape != shape:
        raise ValueError(f"{what} must have shape {tuple(shape)}; got {tuple(values.shape)}")
    if values.device != device:
        raise ValueError(f"{what} is on {values.device}, the environment on {device}; move it")
    # A finite sum proves all terms finite in one pass; only an overflow needs the closer look.
    if not math.isfinite(values.detach().sum().item()):
        bad = (~values.isfinite()).reshape(len(values), -1).any(1).nonzero()
        if len(bad):
            raise ValueError(
                f"{what} holds NaN or infinity for {len(bad)} of {len(values)} samples, "
                f"the first at index {int(bad[0])}"
            )
