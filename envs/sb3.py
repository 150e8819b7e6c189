"""The Stable-Baselines3 shell: a vector environment as SB3's own `VecEnv`, in NumPy.

SB3 does not take a `gymnasium.vector.VectorEnv`. This adapter lets its algorithms, callbacks and
`evaluate_policy` run on one without a Python loop over environments; wrap it in SB3's
`VecMonitor` to have `rollout/ep_rew_mean`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from ..common.arguments import at_least, check_value
from .registration import make_registered
from .single import NumpyObservation, to_numpy
from .vector import DiffusionVectorEnv, observation_space


class SB3VecEnv(VecEnv):
    """A `DiffusionVectorEnv` behind Stable-Baselines3's interface.

    Observations are `{"sample": (N, *shape), "timestep": (N, 1)}` float32 arrays. As SB3
    expects, finished episodes restart in the same step, `x_0` is in
    `infos[i]["terminal_observation"]`. The batch is one environment: attributes, methods and
    options are shared by all `N`.

    Args:
        env: An environment in any autoreset mode, or a registered id such as
            `"fewstep/SwissRoll-v0"`.
        num_envs: Batch size, for an id.
        **settings: For an id: the keyword arguments of `DiffusionVectorEnv`.

    Raises:
        TypeError: `env` is not a diffusion environment, or an instance comes with settings.
    """

    actions: np.ndarray

    def __init__(self, env: DiffusionVectorEnv | str, num_envs: int = 1, **settings: Any) -> None:
        if isinstance(env, str):
            num_envs = check_value("num_envs", num_envs, int)
            at_least(1, num_envs=num_envs)
            settings.setdefault("autoreset_mode", AutoresetMode.DISABLED)
            made: Any = make_registered(env, num_envs, **settings).unwrapped
        elif settings:
            raise TypeError(f"an environment takes no further settings; got {', '.join(settings)}")
        else:
            made = getattr(env, "unwrapped", env)
        if not isinstance(made, DiffusionVectorEnv):
            raise TypeError(
                f"env must be a DiffusionVectorEnv or the id of one; got {type(made).__name__}"
            )
        self.env = made
        super().__init__(made.num_envs, observation_space(made.mdp, (1,)), made.single_action_space)

    def reset(self) -> NumpyObservation:
        """Start an episode, with the seed and the options given to `seed` and `set_options`."""
        observation, _ = self.env.reset(seed=self._seeds[0], options=self._options[0])
        self._reset_seeds()
        self._reset_options()
        return to_numpy(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step: observations, rewards `(N,)` float32, dones `(N,)`, infos."""
        observation, reward, terminated, _, info = self.env.step(self.actions)
        dones = terminated.cpu().numpy()
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones[0]:  # the batch ends together
            final = to_numpy(info.get("final_obs", observation))
            for i, row in enumerate(infos):
                row["terminal_observation"] = {key: final[key][i] for key in final}
                row["TimeLimit.truncated"] = False
            if "final_obs" not in info:
                observation, _ = self.env.reset()
        return to_numpy(observation), reward.cpu().numpy(), dones, infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One frame an environment, or None for each without a render mode."""
        return self.env.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The shared attribute, once for each index."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the shared attribute, `reward` for instance."""
        setattr(self.env, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Call the shared method once; its result for each index."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False for each: wrappers of single environments cannot be inside a batch."""
        return [False for _ in self._get_indices(indices)]
