"""Policies for RL tooling: a denoiser as a Stable-Baselines3 actor-critic, a solver as a policy.

`DenoiserPolicy` lets SB3's own algorithms train a sampler; `SolverPolicy` runs any tableau step by
step in a Gymnasium loop, its history being the recurrent state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from ..common.arguments import checked
from ..critics import make_baseline
from ..envs.clock import TimestepSpace
from .denoisers.denoiser import Denoiser
from .samplers.gaussian import TIME_ROUNDING, GaussianChain, Reduction, gaussian_log_density
from .samplers.sampling import sample
from .samplers.tableau import Tableau

State = tuple[np.ndarray, ...]


class _PassThrough(BaseFeaturesExtractor):
    """Hand the observation dictionary on as it is."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observations: Any) -> Any:
        return observations


class DenoiserPolicy(ActorCriticPolicy):
    """N(m_theta(x_t, t), s_j^2 I) with a value V(x_t, t), as in `PPO(DenoiserPolicy, ...)`.

    Pass `policy_kwargs={"denoiser": ..., "tableau": ...}`. File names are better than objects
    there: Stable-Baselines3 pickles `policy_kwargs` into its own checkpoints.

    Args:
        observation_space: a Dict of "sample" (*shape) and "timestep".
        action_space: a Box (*shape).
        lr_schedule: of Stable-Baselines3.
        denoiser: a `Denoiser` of the environment's noise process, or the file of one.
        tableau: a one-step `Tableau` with noise in every step, on the environment's schedule, or
            the JSON file of one.
        learn_std: train the standard deviations.
        log_density: over dimensions: "sum", or "mean" for images. PPO's clip range must suit it.
        **kwargs: Stable-Baselines3's remaining arguments (optimizer_class, ...).

    Raises:
        ValueError: the denoiser, the tableau and the environment do not have the same noise
            process, or the tableau does not have the times of the environment's schedule. Asked
            about a time that the tableau has not, the policy raises it, too.
    """

    @checked
    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        action_space: gym.spaces.Box,
        lr_schedule: Schedule,
        denoiser: Denoiser | str | Path,
        tableau: Tableau | str | Path,
        learn_std: bool = False,
        log_density: Reduction = "sum",
        **kwargs: Any,
    ) -> None:
        self._sources = {"denoiser": denoiser, "tableau": tableau}
        self._options = {"learn_std": learn_std, "log_density": log_density}
        self.log_density = log_density
        self._parts = (
            denoiser if isinstance(denoiser, Denoiser) else Denoiser.load(denoiser),
            tableau if isinstance(tableau, Tableau) else Tableau.load(tableau),
        )
        _check_clock(self._parts[1], observation_space)
        kwargs["features_extractor_class"] = _PassThrough
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        shape = self.action_space.shape
        assert shape is not None
        self.chain = GaussianChain(*self._parts, learn_std=bool(self._options["learn_std"]))
        del self._parts
        self.baseline = make_baseline(shape, self.chain.steps)
        self.optimizer = self.optimizer_class(
            (parameter for parameter in self.parameters() if parameter.requires_grad),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return next samples (N, *shape), values (N, 1) and log-densities (N,)."""
        sample, step = self._state(obs)
        mean, std = self.chain.distribution(sample, step)
        action = mean if deterministic else torch.addcmul(mean, std, torch.randn_like(mean))
        log_density = gaussian_log_density(action, mean, std, self.log_density)
        return action, self.baseline(sample, step).unsqueeze(1), log_density

    def evaluate_actions(
        self, obs: PyTorchObs, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values (N, 1), log-densities (N,) and entropies (N,) of given next samples."""
        sample, step = self._state(obs)
        mean, std = self.chain.distribution(sample, step)
        log_density = gaussian_log_density(actions.view_as(sample), mean, std, self.log_density)
        entropy = (0.5 + 0.5 * np.log(2 * np.pi) + std.log()).expand_as(mean).flatten(1).sum(1)
        return self.baseline(sample, step).unsqueeze(1), log_density, entropy

    def get_distribution(self, obs: PyTorchObs) -> DiagGaussianDistribution:
        """Return the transition as Stable-Baselines3's distribution over flattened samples."""
        mean, std = self.chain.distribution(*self._state(obs))
        flat = mean.flatten(1)
        return DiagGaussianDistribution(flat.shape[1]).proba_distribution(
            flat, std.log().expand_as(mean).flatten(1)
        )

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Return V(x_t, t), shape (N, 1)."""
        return self.baseline(*self._state(obs)).unsqueeze(1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self(observation, deterministic)[0]

    def _state(self, obs: PyTorchObs) -> tuple[Tensor, Tensor]:
        """Return samples (N, *shape) and their steps (N,)."""
        assert isinstance(obs, Mapping)
        return obs["sample"], self.chain.steps_at(obs["timestep"])

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        for unused in ("net_arch", "features_extractor_class", "features_extractor_kwargs"):
            parameters.pop(unused, None)
        return {**parameters, **self._sources, **self._options}


def _check_clock(tableau: Tableau, observation_space: gym.Space) -> None:
    """Raise ValueError if a tableau is not made for an environment's process and times."""
    assert isinstance(observation_space, gym.spaces.Dict)
    clock = observation_space["timestep"]
    if not isinstance(clock, TimestepSpace):
        return  # a wrapper's; what the policy is asked about is checked in any case
    if clock.process != tableau.process:
        raise ValueError(
            f"'{tableau.name}' is made for {tableau.process!r}, the environment has "
            f"{clock.process!r}: build both on one process."
        )
    ours, theirs = tableau.times, np.array(clock.times)
    if len(ours) != len(theirs) or not np.allclose(ours, theirs, rtol=TIME_ROUNDING, atol=0):
        raise ValueError(
            f"'{tableau.name}' has {tableau.steps} steps at the times {ours.round(6).tolist()}, "
            f"the environment has {len(theirs) - 1} at {theirs.round(6).tolist()}: build the "
            "tableau on the environment's schedule."
        )


class SolverPolicy:
    """Any tableau as a policy; its past states and outputs are the recurrent state.

    `predict` speaks NumPy, as `DiffusionEnv` and `SB3VecEnv` do; for `DiffusionVectorEnv` turn its
    actions into tensors, and take autoreset_mode="SAME_STEP", since the default one spends a step
    between two episodes.

    Args:
        tableau: the sampler; the environment must have its steps: the same times, or as many where
            the tableau's repeat, as Heun's do, and no environment could show them.
        denoiser: the network.
        shape: of one sample, `env.single_observation_space["sample"].shape`, to tell a sample from
            a batch; None where the network says it (`Denoiser.shape`).

    Raises:
        ValueError: a denoiser of another noise process than the tableau's, or of another shape.
    """

    def __init__(
        self, tableau: Tableau, denoiser: Denoiser, shape: Sequence[int] | None = None
    ) -> None:
        tableau.check_process(denoiser)
        if shape is not None:
            denoiser.check_shape(shape)
        self.shape = denoiser.shape if shape is None else tuple(shape)
        self.tableau = tableau
        self.denoiser = denoiser

    @property
    def nfe(self) -> int:
        """Network evaluations a sample costs."""
        return self.tableau.nfe

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.denoiser.parameters()).device

    @torch.no_grad()
    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        state: State | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, State]:
        """Return the next samples and the state to pass back on the next call.

        Args:
            observation: {"sample": (N, *shape) or (*shape), "timestep"} as NumPy arrays.
            state: what the last call returned; None at the start of an episode.
            episode_start: (N,) flags; True drops the state, which must be that of an episode that
                is over. All samples start together.
            deterministic: accepted for Stable-Baselines3; the table decides whether noise is added.
            generator: source of that noise.

        Raises:
            ValueError: more or fewer calls in an episode than the tableau has steps, a timestep
                that is not that of the tableau's step, samples at different times, samples of
                another shape, or nothing tells whether they are one sample or a batch.
        """
        now = torch.as_tensor(observation["sample"], dtype=torch.float32, device=self.device)
        single = self._is_single(tuple(now.shape), np.shape(observation["timestep"]))
        now = now.unsqueeze(0) if single else now
        fresh = state is None or (episode_start is not None and bool(np.any(episode_start)))
        if fresh and state and len(state[0]) < self.tableau.steps:
            raise ValueError(
                f"The episode ended after {len(state[0])} of the {self.tableau.steps} steps of "
                f"'{self.tableau.name}', with unfinished samples: give the environment as many "
                "steps, or pass state=None to drop them."
            )
        history = (
            [] if fresh else [torch.as_tensor(part, device=self.device) for part in state or ()]
        )
        states, outputs = (list(part) for part in history) if history else ([], [])
        j = len(states)
        if j >= self.tableau.steps:
            raise ValueError(
                f"'{self.tableau.name}' has {self.tableau.steps} steps and the episode goes on: "
                "reset the state, or give the environment as many steps."
            )
        self._check_time(j, np.asarray(observation["timestep"]))
        states.append(now)
        output, std = self.tableau.evaluate_with_std(self.denoiser, now, j)
        outputs.append(output)
        action = self.tableau.advance(j, states, outputs, generator, std)
        memory = tuple(torch.stack(part).cpu().numpy() for part in (states, outputs))
        return (action[0] if single else action).cpu().numpy(), memory

    def _check_time(self, j: int, timesteps: np.ndarray) -> None:
        """Refuse an environment whose clock is not the tableau's."""
        shown, time = np.unique(timesteps), float(self.tableau.times[j])
        if len(shown) > 1:
            raise ValueError(
                f"The samples are at different times, {shown[0]:g} to {shown[-1]:g}; a sampler "
                "with memory takes a batch whose episodes start together."
            )
        # No schedule has the times of a table that asks twice at one time, as Heun's does: there
        # only the start and the number of steps can be compared.
        comparable = j == 0 or bool((np.diff(self.tableau.times) < 0).all())
        if comparable and not np.allclose(shown, time, rtol=TIME_ROUNDING, atol=0):
            raise ValueError(
                f"Step {j} of the {self.tableau.steps} of '{self.tableau.name}' is at time "
                f"{time:g}, the environment's sample at {shown[0]:g}: build the tableau on the "
                "environment's schedule."
            )

    def _is_single(self, sample: tuple[int, ...], timestep: tuple[int, ...]) -> bool:
        """Tell one sample from a batch: by the shape of a sample, or by the shape of the times.

        A batch of one has a time of shape (1,), as a sample of `DiffusionEnv` has.
        """
        if self.shape is not None:
            if sample != self.shape and sample[1:] != self.shape:
                raise ValueError(
                    f"The samples have shape {self.shape}, the observation's {sample}: that is "
                    "neither one sample nor a batch."
                )
            return sample == self.shape
        if len(sample) == 1 or len(timestep) != 1:
            return len(sample) == 1 or timestep == ()
        if timestep == sample[:1] == (1,):
            raise ValueError(
                f"An observation of shape {sample} may be one sample or a batch of one: give "
                "SolverPolicy the shape of a sample, shape=..."
            )
        return timestep != sample[:1]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        shape: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> Tensor:
        """Draw finished samples (n, *shape), or all states (K + 1, n, *shape), on the device.

        Give `noise` (n, *shape) to start from, or the `shape` of one sample.

        Raises:
            ValueError: neither noise nor shape.
        """
        shape = self.shape if shape is None else shape
        if noise is None and shape is None:
            raise ValueError("Give noise=(n, *shape) to start from, or the shape of one sample.")
        return sample(
            self.tableau,
            self.denoiser,
            n if noise is None else noise,
            shape=shape or (),
            generator=generator,
            return_trajectory=return_trajectory,
        )
