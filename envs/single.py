"""The single shell: one sample as NumPy arrays, for tools that expect a plain `gymnasium.Env`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ..common.arguments import checked
from .mdp import DiffusionMDP, Observation, Reward
from .processes import NoiseProcess
from .schedules import Schedule
from .targets.target import Target
from .vector import DiffusionVectorEnv, observation_space, to_tensor, with_horizon

NumpyObservation = dict[str, np.ndarray]


class DiffusionEnv(gym.Env[NumpyObservation, np.ndarray]):
    """One sample being denoised: a `DiffusionVectorEnv` of one, spoken to in NumPy.

    Observations are `{"sample": (*shape,), "timestep": (1,)}` float32 arrays; the timestep is a
    vector because the networks of Stable-Baselines3 cannot read a scalar.

    Args:
        mdp: A decision process, or the name of a registered one, such as `"SwissRoll"`.
        render_mode: None or `"rgb_array"`.
        **settings: For a name: the keyword arguments of `make_mdp`.
    """

    _spec: EnvSpec | None = None
    metadata: dict[str, Any] = DiffusionVectorEnv.metadata

    @checked
    def __init__(
        self, mdp: DiffusionMDP | str, *, render_mode: str | None = None, **settings: Any
    ) -> None:
        self._vector = DiffusionVectorEnv(
            mdp, 1, render_mode=render_mode, autoreset_mode=AutoresetMode.DISABLED, **settings
        )
        self.render_mode = render_mode
        self.observation_space = observation_space(self.mdp, (1,))
        self.action_space = self._vector.single_action_space

    @property
    def spec(self) -> EnvSpec | None:
        """Gymnasium's specification; see `DiffusionVectorEnv.spec`."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = with_horizon(spec, self.mdp.steps)

    @property
    def mdp(self) -> DiffusionMDP:
        """The decision process."""
        return self._vector.mdp

    @property
    def target(self) -> Target:
        """The real distribution."""
        return self._vector.target

    @property
    def process(self) -> NoiseProcess:
        """The noise process."""
        return self._vector.process

    @property
    def schedule(self) -> Schedule:
        """The schedule of every episode whose `reset` does not name another."""
        return self._vector.schedule

    @property
    def reward(self) -> Reward | None:
        """The critic of the finished sample; see `DiffusionVectorEnv.reward`."""
        return self._vector.reward

    @reward.setter
    def reward(self, reward: Reward) -> None:
        self._vector.reward = reward

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NumpyObservation, dict[str, Any]]:
        """Start an episode; see `DiffusionVectorEnv.reset`.

        Args:
            seed: Restarts the stream of noise; None continues it.
            options: `"schedule"`, and `"sample"`, or what the decision process itself takes, as an
                array `shape`; the `"condition"` is a class, a text or an embedding.
        """
        super().reset(seed=seed)
        self._vector.np_random = self.np_random
        for name in ("sample", *self.mdp.own_options):
            if options and options.get(name) is not None:
                options = {**options, name: self._to_batch(options[name], name)}
        observation, info = self._vector.reset(options=options)
        if seed is not None:
            self.mdp.forget()
        return to_numpy(observation, 0), info

    def step(
        self, action: np.ndarray
    ) -> tuple[NumpyObservation, float, bool, bool, dict[str, Any]]:
        """Move the sample to `action`, the next sample; errors as the vector shell's."""
        observation, reward, terminated, _, info = self._vector.step(
            self._to_batch(action, "action")
        )
        return to_numpy(observation, 0), float(reward), bool(terminated), False, info

    def render(self) -> np.ndarray | None:
        """Draw the sample, `(H, W, 3)` uint8; None without a render mode."""
        frames = self._vector.render()
        return None if frames is None else frames[0]

    def _to_batch(self, sample: np.ndarray, what: str) -> Tensor:
        return to_tensor(np.asarray(sample)[None], self.mdp.device, what)


def to_numpy(observation: Observation, index: int | slice = slice(None)) -> NumpyObservation:
    """Bring an observation to the NumPy shells: arrays, each timestep a vector of one."""
    arrays = {name: values.cpu().numpy() for name, values in observation.items()}
    arrays["timestep"] = arrays["timestep"][:, None]
    return {name: values[index] for name, values in arrays.items()}
