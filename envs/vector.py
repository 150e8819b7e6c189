"""The vector shell: thousands of samples as one batch of tensors on one device.

`DiffusionVectorEnv` follows Gymnasium's vector contract, with torch float32 tensors where others
have arrays. The horizon is fixed, so the whole batch is always at the same step and every episode
ends together.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ..common.arguments import checked
from ..common.distributed import ALONE
from ..common.names import unknown_name
from ..common.shapes import is_vector
from ..critics.checks import check_rewards
from .clock import TimestepSpace
from .conditions import condition_space
from .mdp import DiffusionMDP, Observation, Reward, check_reward
from .processes import NoiseProcess
from .registration import make_mdp
from .rendering import MAX_REAL, frame
from .schedules import Schedule, make_schedule
from .targets.target import Target

RESET_OPTIONS = ("schedule", "sample", "reset_mask")


class DiffusionVectorEnv(VectorEnv[Observation, Tensor, Tensor]):
    """A batch of samples being denoised.

    Observations are `{"sample": (num_envs, *shape), "timestep": (num_envs,)}`, and in a conditional
    environment `"condition"`, `(num_envs, ...)`, see `condition_space`; actions are the next
    samples `(num_envs, *shape)`; rewards `(num_envs,)` are 0 until the last step. Rewards carry no
    gradient: agents that differentiate through the process use `env.mdp`.

    The three autoreset modes after the last step: `NEXT_STEP` returns `x_0` and spends one more
    step, whose action is ignored, on the reset; `SAME_STEP` returns the next episode's first
    observation and `x_0` in `info["final_obs"]`; `DISABLED` returns `x_0` and waits for
    `reset`.

    Args:
        mdp: A decision process, or the name of a registered one, such as `"SwissRoll"`.
        num_envs: Batch size, at least 1.
        render_mode: None or `"rgb_array"`.
        autoreset_mode: A Gymnasium `AutoresetMode`, or its name or value as a string.
        **settings: For a name: the keyword arguments of `make_mdp` (`steps`, `schedule`,
            `reward`, `device`, `data_dir`, `download`, `image_size`, `process`,
            `target`, `inpaint`, `conditional`).

    Raises:
        ValueError: A setting is out of range or a name unknown.
        TypeError: A setting does not exist.
    """

    _spec: EnvSpec | None = None
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    @checked
    def __init__(
        self,
        mdp: DiffusionMDP | str,
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **settings: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1; got {num_envs}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise unknown_name("render mode", render_mode, self.metadata["render_modes"])
        self.mdp = resolve_mdp(mdp, settings)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = parse_autoreset_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = observation_space(self.mdp)
        self.single_action_space = sample_space(self.mdp)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generator = torch.Generator(self.device)
        self._draw = functools.partial(ALONE.noise, generator=self._generator)
        self._episode = self.mdp  # the decision process of these episodes, on their schedule
        self._sample: Tensor | None = None
        self._step = 0

    @property
    def spec(self) -> EnvSpec | None:
        """Gymnasium's specification; its `max_episode_steps` is the schedule's number of steps.

        Wrappers that want the horizon find it there. The registry has none, because Gymnasium would
        add a `TimeLimit`, which calls the last step truncated.
        """
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = with_horizon(spec, self.mdp.steps)

    @property
    def target(self) -> Target:
        """The real distribution."""
        return self.mdp.target

    @property
    def process(self) -> NoiseProcess:
        """The noise process."""
        return self.mdp.process

    @property
    def schedule(self) -> Schedule:
        """The schedule of every episode whose `reset` does not name another."""
        return self.mdp.schedule

    @property
    def device(self) -> torch.device:
        """Where observations, actions and rewards live."""
        return self.mdp.device

    @property
    def reward(self) -> Reward | None:
        """The critic of the finished sample, `(N, *shape) -> (N,)`.

        Another one may be assigned at any time, and counts from the next reward on: the environment
        then has another `mdp`, the old one stays as it is.
        """
        return self.mdp.reward

    @reward.setter
    def reward(self, reward: Reward) -> None:
        check_reward(reward)  # None would mean the default
        self.mdp = self.mdp.with_reward(reward)
        self._episode = self._episode.with_reward(reward)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode for the whole batch.

        Args:
            seed: Restarts the stream of noise, and lets a reward that learns from what it judges,
                as the default does, forget: the same seed and actions give the same rewards. None
                goes on.
            options: For this episode only: `"schedule"`, a `Schedule` on the same process or
                the name of one, at whose first time it then starts, and `"sample"`, the noise to
                start from, `(num_envs, *shape)`; and what the decision process itself takes
                (`DiffusionMDP.episode_options`). Gymnasium's `"reset_mask"` must be all True.

        Returns:
            The first observation and an empty info.

        Raises:
            ValueError: An option is unknown or does not fit.
            TypeError: An option has the wrong type.
        """
        super().reset(seed=seed)
        observation = self._begin(options or {})
        if seed is not None:
            self.mdp.forget()
        return observation, {}

    @torch.no_grad()
    def step(
        self, actions: Tensor | np.ndarray
    ) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Move every sample to the state that its action names.

        Args:
            actions: The next samples: floating tensor `(num_envs, *shape)` on `device`, finite;
                or such a NumPy array, as `action_space` samples it, which is copied there.

        Returns:
            Observation, reward `(num_envs,)` float32, terminated and truncated `(num_envs,)`
            bool (truncated is never True), info.

        Raises:
            TypeError: The actions are not a floating tensor or array, or the rewards not a floating
                torch tensor.
            ValueError: They have the wrong shape or device, or hold NaN or infinity.
            ResetNeeded: Before the first `reset`, or after the end in mode `DISABLED`.
        """
        if self._sample is None:
            raise ResetNeeded("call reset() before step()")
        episode = self._episode
        if self._step == episode.steps:
            if self.autoreset_mode is not AutoresetMode.NEXT_STEP:
                raise ResetNeeded(f"the episode ended after {episode.steps} steps; call reset()")
            return self._begin({}), self._zeros(), self._flags(False), self._flags(False), {}

        if isinstance(actions, np.ndarray):
            actions = to_tensor(actions, self.device, "action")
        episode.check_action(self._sample, actions)
        # A copy, so that a caller who reuses its action buffer does not change our state.
        sample = episode.transition(self._sample, actions, self._step, self._draw).clone()
        done = self._step + 1 == episode.steps
        reward = self._zeros()
        if done:
            reward = episode.terminal_reward(sample)
            check_rewards(episode.reward, reward, sample)
        self._sample, self._step = sample, self._step + 1
        observation = self._observed()
        info: dict[str, Any] = {}
        if done and self.autoreset_mode is AutoresetMode.SAME_STEP:
            info = {
                "final_obs": observation,
                "_final_obs": self._flags(True),
                "final_info": {},
                "_final_info": self._flags(True),
            }
            observation = self._begin({})
        return observation, reward, self._flags(done), self._flags(False), info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Draw each sample: `num_envs` frames `(H, W, 3)` uint8, or None without a mode.

        `rendering.frame` draws the batch in a single picture.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs an environment made with render_mode='rgb_array'")
            return None
        if self._sample is None:
            raise ResetNeeded("call reset() before render()")
        # Images are drawn without real ones behind them.
        real = self.target.take(MAX_REAL) if is_vector(self.mdp.shape) else None
        return tuple(frame(one[None], self.mdp.shape, real=real) for one in self._sample)

    def _begin(self, options: dict[str, Any]) -> Observation:
        known = (*RESET_OPTIONS, *self.mdp.episode_options)
        for name in options:
            if name not in known:
                raise unknown_name("reset option", name, known)
        if "reset_mask" in options:
            self._check_reset_mask(options["reset_mask"])
        episode = self.mdp
        if (schedule := options.get("schedule")) is not None:
            if isinstance(schedule, str):
                schedule = make_schedule(schedule, self.process, self.mdp.steps)
            elif not isinstance(schedule, Schedule):
                raise TypeError(
                    f"options['schedule'] must be a Schedule or a name; got {schedule!r}"
                )
            episode = self.mdp.with_schedule(schedule)
        if (sample := options.get("sample")) is not None:
            sample = self.mdp.check_sample(sample, self.num_envs)
        own = {name: options[name] for name in self.mdp.episode_options if name in options}
        self._generator.manual_seed(int(self.np_random.integers(2**63)))
        episode = episode.episodes(self.num_envs, self._generator, **own)
        if sample is None:
            sample = episode.initial(self.num_envs, self._generator)
        self._episode, self._sample, self._step = episode, sample, 0
        return self._observed()

    def _observed(self) -> Observation:
        """Return the observation; its conditions are a copy, which a caller may change."""
        assert self._sample is not None
        seen = self._episode.observe(self._sample, self._step)
        return {k: v.clone() if k == "condition" else v for k, v in seen.items()}

    def _check_reset_mask(self, mask: Any) -> None:
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError("options['reset_mask'] must be a NumPy array of bool")
        if mask.shape != (self.num_envs,):
            raise ValueError(
                f"options['reset_mask'] must have shape ({self.num_envs},); got {mask.shape}"
            )
        if not mask.all():
            raise ValueError(
                "options['reset_mask'] must be all True: the horizon is fixed, so the whole batch "
                "is always at the same step and can only be reset together"
            )

    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_envs, device=self.device)

    def _flags(self, value: bool) -> Tensor:
        return torch.full((self.num_envs,), value, dtype=torch.bool, device=self.device)


def to_tensor(values: np.ndarray, device: torch.device, what: str) -> Tensor:
    """Copy a floating array to a float32 tensor; `what` names it in the message."""
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(
            f"{what} must hold floating numbers, as the space does; got an array of {values.dtype}"
        )
    return torch.from_numpy(values.astype(np.float32)).to(device)


def resolve_mdp(mdp: DiffusionMDP | str, settings: dict[str, Any]) -> DiffusionMDP:
    """Build the decision process of a name; a finished one takes no more settings."""
    if isinstance(mdp, str):
        known = inspect.signature(make_mdp).parameters
        for name in settings:
            if name not in known:
                raise TypeError(str(unknown_name("setting of an environment", name, known)))
        return make_mdp(mdp, **settings)
    if settings:
        raise TypeError(f"a DiffusionMDP takes no further settings; got {', '.join(settings)}")
    return mdp


def with_horizon(spec: EnvSpec | None, steps: int) -> EnvSpec | None:
    """Return a copy of a specification whose `max_episode_steps` is the horizon."""
    if spec is not None:
        spec = copy.copy(spec)
        spec.max_episode_steps = steps
    return spec


def parse_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """Accept the enum, its name (`"NEXT_STEP"`) or its value (`"NextStep"`)."""
    if isinstance(mode, AutoresetMode):
        return mode
    for known in AutoresetMode:
        if str(mode).replace("_", "").lower() == known.value.lower():
            return known
    raise unknown_name("autoreset mode", mode, [known.name for known in AutoresetMode])


def sample_space(mdp: DiffusionMDP) -> gym.spaces.Box:
    """The space of samples, and so of actions: a box so loose that no sampler meets its bounds.

    Stable-Baselines3 wants finite bounds and clips to them. They are 100 times the largest of 1,
    the standard deviation of the prior and the largest training value, rounded up: 100 for
    normalised data on a `DiscreteVP`, 8,000 on a `VE` with `sigma_max = 80`.
    """
    scale = max(1.0, mdp.process.prior_std(mdp.process.t_max), mdp.target.max_abs)
    bound = 100.0 * math.ceil(scale)
    return gym.spaces.Box(-bound, bound, tuple(mdp.shape), np.float32)


def observation_space(mdp: DiffusionMDP, timestep_shape: tuple[int, ...] = ()) -> gym.Space[Any]:
    """`{"sample", "timestep"}` of one environment, the timestep in `[0, t_max]`.

    A conditional one has `"condition"`, too: its class, caption or embedding.
    """
    spaces: dict[str, gym.Space[Any]] = {"sample": sample_space(mdp)}
    spaces["timestep"] = TimestepSpace(mdp.schedule, timestep_shape)
    if mdp.conditions is not None:
        spaces["condition"] = condition_space(mdp.conditions)
    return gym.spaces.Dict(spaces)
