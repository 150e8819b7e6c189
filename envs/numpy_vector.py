"""The NumPy shell of the vector environment, for tools that expect arrays and not torch tensors.

Gymnasium's vector wrappers add rewards to NumPy arrays, and TorchRL wants every entry of an
observation to have as many dimensions as the others. `gym.make_vec(id, num_envs, numpy=True)` makes
one; `docs/rl-tools.md` says which client wants which shell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from ..common.arguments import checked
from .mdp import DiffusionMDP, Observation, Reward
from .single import NumpyObservation, to_numpy
from .vector import DiffusionVectorEnv, observation_space, to_tensor

Step = tuple[NumpyObservation, NDArray, NDArray, NDArray, dict[str, Any]]


class NumpyVectorEnv(VectorWrapper[NumpyObservation, NDArray, Observation, Tensor, Any]):
    """A `DiffusionVectorEnv`, spoken to in NumPy.

    Observations are `{"sample": (N, *shape), "timestep": (N, 1)}` float32 arrays, actions arrays
    `(N, *shape)`, rewards `(N,)` float32 and flags `(N,)` bool arrays.

    Args:
        env: the environment, on any device.
    """

    env: DiffusionVectorEnv

    @checked
    def __init__(self, env: DiffusionVectorEnv) -> None:
        super().__init__(env)
        self.single_observation_space = observation_space(env.mdp, (1,))
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    @property
    def mdp(self) -> DiffusionMDP:
        """The decision process."""
        return self.env.mdp

    @property
    def reward(self) -> Reward | None:
        """The critic of the finished sample; see `DiffusionVectorEnv.reward`."""
        return self.env.reward

    @reward.setter
    def reward(self, reward: Reward) -> None:
        self.env.reward = reward

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """What happens after the last step; see `DiffusionVectorEnv`."""
        return self.env.autoreset_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NumpyObservation, dict[str, Any]]:
        """Start an episode; see `DiffusionVectorEnv.reset`. Samples in the options are arrays."""
        for name in ("sample", *self.mdp.own_options):
            if options and isinstance(given := options.get(name), np.ndarray):
                options = {**options, name: to_tensor(given, self.env.device, name)}
        observation, info = self.env.reset(seed=seed, options=options)
        return to_numpy(observation), info

    def step(self, actions: NDArray) -> Step:
        """Move every sample to the state that its action names; see `DiffusionVectorEnv.step`."""
        observation, reward, terminated, truncated, info = self.env.step(np.asarray(actions))
        if "final_obs" in info:
            parts = {key: _array(info[key]) for key in ("_final_obs", "_final_info")}
            info = {**info, **parts, "final_obs": to_numpy(info["final_obs"])}
        flags = _array(terminated), _array(truncated)
        return to_numpy(observation), _array(reward), *flags, info


@checked
def make_vector_env(
    mdp: DiffusionMDP | str,
    num_envs: int = 1,
    *,
    numpy: bool = False,
    max_episode_steps: int | None = None,
    **settings: Any,
) -> VectorEnv:
    """Build what `gym.make_vec` returns: a `DiffusionVectorEnv`, or with `numpy` its NumPy shell.

    Args:
        mdp: see `DiffusionVectorEnv`, as for the rest.
        num_envs: Batch size, at least 1.
        numpy: speak NumPy.
        max_episode_steps: Gymnasium passes the horizon of a spec; no other one is possible.
        **settings: of `DiffusionVectorEnv`.

    Raises:
        TypeError: a setting does not exist, or `numpy` is no flag.
        ValueError: `max_episode_steps` is not the number of steps; a setting is out of range.
    """
    env = DiffusionVectorEnv(mdp, num_envs, **settings)
    if max_episode_steps not in (None, env.mdp.steps):
        raise ValueError(
            f"max_episode_steps={max_episode_steps}, but an episode is the schedule's "
            f"{env.mdp.steps} steps, neither more nor fewer: a sample that stops before is not "
            f"finished. Give steps={max_episode_steps} for a schedule of as many."
        )
    return NumpyVectorEnv(env) if numpy else env


def _array(values: Tensor) -> NDArray:
    return values.cpu().numpy()
