"""The decision process itself: a diffusion sampler is a policy in a finite-horizon MDP.

State: the noisy sample and its time. Action: the next sample. Transition: the identity, unless a
subclass says otherwise. Reward: 0, until the finished sample `x_0` is shown to the critic,
`f(x_0)`, to be maximised. Horizon: the steps of the schedule (SFT-PG, Fan & Lee 2023, section 3;
MATH.md S.2). These are pure functions on batched tensors that keep gradients. `rollout` is the loop
in which agents train; the shells (`vector`, `single`, `sb3`) dress the same functions for Gymnasium
and Stable-Baselines3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..common.arguments import check_fields
from ..common.conditions import Classes, Conditional, Conditions, Kind, kind_of
from ..common.distributed import ALONE, Processes
from ..common.even import even_normal
from ..critics.checks import needs_condition, rewards_of
from ..critics.joint import JointMMDCritic
from ..critics.mmd import MMDCritic
from .processes import NoiseProcess
from .schedules import Schedule
from .schedules.ends import warn_of_ends
from .targets.target import Target

Observation = dict[str, Tensor]
Reward = Callable[..., Tensor]
# Returns fresh standard normal noise, shaped like its argument.
Draw = Callable[[Tensor], Tensor]
MDP = TypeVar("MDP", bound="DiffusionMDP")

# Real samples of the default reward: enough to guide, and about as dear as the toys' networks.
DEFAULT_REWARD_SAMPLES = 512


class Policy(Protocol):
    """What acts in a decision process."""

    def act(self, observation: Observation, step: int, draw: Draw) -> Tensor:
        """Return the actions `(N, *shape)` for what `DiffusionMDP.observe` shows in state `step`.

        Args:
            observation: The samples `(N, *shape)` and their time.
            step: Which state this is, 0 to `steps - 1`; a policy need not look it up by the time.
            draw: Its source of randomness.
        """


class Recorder(Protocol):
    """What keeps the trajectories of a rollout."""

    def begin(self, episodes: DiffusionMDP) -> None:
        """Learn of the decision process of the episodes that begin, see `DiffusionMDP.episodes`."""

    def keep(self, step: int, sample: Tensor, action: Tensor | None = None) -> Tensor:
        """Keep the state `(N, *shape)` number `step`, and the action that was asked for before it.

        Returns:
            The state from which the rollout goes on: the one given, rounded as it is kept.
        """


class DefaultReward(MMDCritic):
    """The reward of a decision process that was given none."""


class DefaultConditionalReward(JointMMDCritic):
    """The same under conditions: of samples together with what was asked for."""


@dataclass(frozen=True, eq=False)
class DiffusionMDP:
    """What a sampler acts in.

    A subclass may override any of `initial`, `observe`, `transition` and `terminal_reward`: agents
    and shells call them, never a copy. `Inpainting` is an example.

    Step `j = 0..K-1` counts the transitions in sampling order, 0 the noisiest; state `j` is the
    state before step `j` and state `K` the finished sample.

    Args:
        target: The real distribution; its device is where everything lives.
        process: The noise process.
        schedule: The times to visit, on the same process.
        reward: `(N, *shape) -> (N,)`, high on data, a tensor or NumPy array of finite numbers. One
            with an argument named `condition` gets the conditions `(N, ...)`, too, where there are
            any. If
            it has a `judge`, that judges finished samples, and may learn from them. None is an
            `MMDCritic` of some training samples: it compares the finished samples with those and
            with each other, so that their mean reward is minus the energy distance to the data;
            under conditions a `JointMMDCritic`, of samples together with their conditions.
        conditional: Each episode is played under a condition, which the agent sees, `"condition"`,
            and which the reward may see: a class of the target's (True), or a caption ("captions")
            or an embedding ("embeddings").
        condition: The conditions `(n, ...)` of the episodes that have begun; None before.

    A decision process never changes: `with_schedule` and `with_reward` make another one.

    Raises:
        ValueError: The schedule belongs to another process, or the target of a conditional
            environment has no labels, or whatever conditions it asks for.
        TypeError: The reward is not callable, or another argument of another class.
    """

    target: Target
    process: NoiseProcess
    schedule: Schedule
    reward: Reward | None = None
    conditional: Conditional = False
    condition: Tensor | None = None

    # Options of a shell's `reset` that `episodes` takes in every environment of this kind.
    own_options: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.reward is not None:
            check_reward(self.reward)
        kind = kind_of(self.conditional)
        check_fields(self, DiffusionMDP)
        if self.schedule.process != self.process:
            raise ValueError(
                f"the schedule is made for {self.schedule.process!r}, "
                f"the environment has {self.process!r}; build it on that one"
            )
        # One word for classes, which files of runs hold.
        object.__setattr__(self, "conditional", True if kind == "classes" else kind or False)
        if kind is not None:
            _ = self.conditions  # there are some, or an error
        if self.reward is None:
            object.__setattr__(self, "reward", self._default_reward(kind))
        if not self.conditional and needs_condition(self.reward):
            raise TypeError(
                "this reward needs the condition of its samples: make the environment conditional, "
                "or give its argument a default"
            )

    def _default_reward(self, kind: Kind | None) -> MMDCritic:
        real = self.target.subset(DEFAULT_REWARD_SAMPLES)
        if kind is None:
            return DefaultReward(real)
        assert self.conditions is not None  # there is a kind
        condition = self.target.subset_conditions(DEFAULT_REWARD_SAMPLES, kind=kind)
        return DefaultConditionalReward(real, condition, self.conditions.points)

    @cached_property
    def _times(self) -> list[float]:
        return self.schedule.times.tolist()

    @cached_property
    def steps(self) -> int:
        """The horizon `K`."""
        return self.schedule.steps

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of one sample."""
        return self.target.shape

    @cached_property
    def device(self) -> torch.device:
        """Where samples, actions and rewards live."""
        return self.target.device

    @property
    def has_own_reward(self) -> bool:
        """Whether its reward was given, and is not `no_reward`: then agents maximise that one."""
        default = DefaultReward | DefaultConditionalReward
        return self.reward is not no_reward and not isinstance(self.reward, default)

    @property
    def is_plain(self) -> bool:
        """Whether episodes begin with the process's noise, and each next state is the action."""
        own = type(self)
        return own.transition is DiffusionMDP.transition and own.initial is DiffusionMDP.initial

    @property
    def kind(self) -> Kind | None:
        """The kind of its conditions; None if it is unconditional."""
        return kind_of(self.conditional)

    @cached_property
    def conditions(self) -> Conditions | None:
        """Which conditions there are; None if it is unconditional."""
        return None if self.kind is None else self.target.known(self.kind).conditions

    @property
    def classes(self) -> int | None:
        """How many classes there are; None if it is unconditional, or has other conditions."""
        return self.conditions.count if isinstance(self.conditions, Classes) else None

    @property
    def episode_options(self) -> tuple[str, ...]:
        """Options of a shell's `reset` that `episodes` takes, beside those of every environment."""
        return (*(("condition",) if self.conditional else ()), *self.own_options)

    def with_schedule(self: MDP, schedule: Schedule) -> MDP:
        """The same decision process on other times."""
        return replace(self, schedule=schedule)

    def with_reward(self: MDP, reward: Reward) -> MDP:
        """The same decision process with another reward."""
        return replace(self, reward=reward)

    def episodes(
        self: MDP,
        n: int,
        generator: torch.Generator | None = None,
        condition: Any = None,
    ) -> MDP:
        """Draw what `n` new episodes keep from their start to their end.

        Args:
            n: How many.
            generator: Source of randomness; the global one if None.
            condition: The conditions `(n, ...)` of a conditional environment, or one for all, see
                `Conditions.checked`; those of training samples if None.

        Returns:
            The decision process of these episodes, whose methods are then called on batches of `n`.
            Without conditions nothing is drawn, and it is this one.

        Raises:
            ValueError: A condition in an environment without, one of another shape or that does not
                exist, or as many of them as there are no episodes.
            TypeError: Conditions of another kind.
        """
        if condition is not None:
            return replace(self, condition=self._checked_condition(condition, n))
        if self.kind is None:
            return self
        drawn, _ = self.target.sample_conditions(n, generator, self.kind)
        return replace(self, condition=drawn)

    def _checked_condition(self, condition: Any, n: int) -> Tensor:
        if self.conditions is None:
            raise ValueError("this environment is unconditional: it takes no condition")
        given = self.conditions.rows(self.conditions.checked(condition), n, self.device)
        return given.clone(memory_format=torch.contiguous_format)

    def at(self: MDP, rows: Tensor | slice) -> MDP:
        """The decision process of some of the episodes that `episodes` began, by their indices."""
        return self if self.condition is None else replace(self, condition=self.condition[rows])

    def initial(
        self, n: int, generator: torch.Generator | None = None, even_groups: int = 0
    ) -> Tensor:
        """Draw the first state, `(n, *shape)` float32: noise as at the schedule's first time.

        Warns of a start or an end that makes the samples wrong (`envs.schedules.ends`).

        Args:
            n: How many.
            generator: Source of randomness; the global one if None.
            even_groups: Spread each of so many batches evenly, see `even_normal`; 0 does not.
        """
        noise = torch.randn((n, *self.shape), generator=generator, device=self.device)
        if even_groups:
            noise = even_normal(noise, generator, even_groups)
        return noise if self._prior_std == 1.0 else noise.mul_(self._prior_std)

    @cached_property
    def _prior_std(self) -> float:
        warn_of_ends(self.process, self._times[0], self._times[-1])
        return self.process.prior_std(self._times[0])

    def observe(self, sample: Tensor, step: int) -> Observation:
        """What the agent sees in state `step`.

        Args:
            sample: `(N, *shape)`.
            step: 0 to `steps`, the latter for the finished sample.

        Returns:
            `{"sample": (N, *shape), "timestep": (N,)}`; the timestep is a new tensor, the sample
            is the one given. In a conditional environment `"condition"`, `(N, ...)`, as well.
        """
        timestep = torch.full(
            (len(sample),), self._times[step], dtype=torch.float32, device=sample.device
        )
        seen = {"sample": sample, "timestep": timestep}
        return seen if self.condition is None else {**seen, "condition": self.condition}

    def transition(
        self, sample: Tensor, action: Tensor, step: int, draw: Draw = torch.randn_like
    ) -> Tensor:
        """Move to the next state, which is the action itself as float32.

        Args:
            sample: The current state `(N, *shape)`.
            action: The next sample that is asked for, of the same shape and device.
            step: Which state the current one is, 0 to `steps - 1`.
            draw: The source of randomness of an environment that needs one.
        """
        return action.to(torch.float32)

    def terminal_reward(self, sample: Tensor) -> Tensor:
        """Judge finished samples, by the reward's `judge` if it has one.

        A reward that learns from what it judges, as the default does, learns here and nowhere else:
        calling `reward` itself changes nothing.

        Args:
            sample: `x_0`, `(N, *shape)`.

        Returns:
            The reward, `(N,)` float32, to be maximised.

        Raises:
            TypeError: The reward returned neither a tensor nor a NumPy array of numbers.
            ValueError: It returned another shape or device.
        """
        assert self.reward is not None  # __post_init__ saw to it
        judge = getattr(self.reward, "judge", self.reward)
        return rewards_of(judge, sample, self.condition).to(torch.float32)

    def rollout(
        self,
        policy: Policy,
        n: int,
        generator: torch.Generator | None = None,
        *,
        recorder: Recorder | None = None,
        processes: Processes = ALONE,
        groups: int = 1,
        even: bool = False,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Play `n` whole episodes; gradients flow through them unless the caller forbids it.

        Nothing is checked on the way, so that no device is waited for: look at what comes back.

        Args:
            policy: What acts.
            n: How many episodes; of several processes, how many each one plays.
            generator: Source of randomness; the global one if None.
            recorder: Keeps states and actions; None keeps nothing but the last state.
            processes: Those that play together: all draw the same numbers, and each takes its share
                of the episodes.
            groups: The episodes are so many batches, each of which is shared out in equal parts.
            even: Spread the noise of every state evenly over each of these batches, see
                `even_normal`.
            condition: See `episodes`; with several processes those of all episodes.

        Returns:
            The finished samples `(n, *shape)`.
        """
        everyone, spread = n * processes.count, {"even_groups": groups} if even else {}
        given = {} if condition is None else {"condition": condition}
        episodes = self.episodes(everyone, generator, **given)
        sample = self.initial(everyone, generator, **spread)
        if processes.count > 1:
            mine = processes.share(torch.arange(everyone, device=sample.device), groups=groups)
            episodes, sample = episodes.at(mine), sample[mine]
        draw = functools.partial(processes.noise, generator=generator, groups=groups, even=even)
        if recorder is not None:
            recorder.begin(episodes)
            sample = recorder.keep(0, sample)
        for step in range(self.steps):
            action = policy.act(episodes.observe(sample, step), step, draw)
            sample = episodes.transition(sample, action, step, draw)
            if recorder is not None:
                sample = recorder.keep(step + 1, sample, action)
        return sample

    def forget(self) -> None:
        """Let the reward forget the samples that it has judged, if it can."""
        if callable(forget := getattr(self.reward, "forget", None)):
            forget()

    def check_action(self, sample: Tensor, action: Tensor) -> None:
        """Validate what a user asks for in a state `(N, *shape)`; this waits for the device.

        Raises:
            TypeError: The action is not a floating torch tensor.
            ValueError: The action has another shape or device, or holds NaN or infinity.
        """
        check_batch(action, "action", sample.shape, sample.device)

    def check_sample(self, sample: Tensor, n: int) -> Tensor:
        """Validate a start `(n, *shape)` that a user gives; returns a float32 copy."""
        check_batch(sample, "sample", torch.Size((n, *self.shape)), self.device)
        return sample.detach().to(torch.float32, copy=True)


def check_reward(reward: object, name: str = "reward") -> None:
    """Raise TypeError for a reward that cannot be called, or whose class is given."""
    if isinstance(reward, type):
        raise TypeError(f"{name} must be an instance; got the class {reward.__name__}")
    if not callable(reward):
        raise TypeError(
            f"{name} must be callable, (N, *shape) -> (N,); got {type(reward).__name__}"
        )


def no_reward(sample: Tensor) -> Tensor:
    """Reward every finished sample `(N, *shape)` with 0, for those who only need the process."""
    return sample.new_zeros(len(sample))


def check_batch(values: Tensor, what: str, shape: torch.Size, device: torch.device) -> None:
    """Raise TypeError or ValueError for a batch that is not finite floats of shape and device."""
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
