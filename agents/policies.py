"""A denoiser as a Stable-Baselines3 actor-critic, which SB3's own algorithms train."""

from __future__ import annotations

from collections.abc import Mapping
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
from ..common.conditions import Conditions
from ..critics import make_baseline
from ..envs.clock import TimestepSpace
from ..envs.conditions import conditions_of
from .denoisers.denoiser import Denoiser
from .samplers.gaussian import TIME_ROUNDING, GaussianChain, Reduction, gaussian_log_density
from .samplers.tableau import Tableau


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
        observation_space: a Dict of "sample" (*shape) and "timestep", and of a conditional
            environment "condition" (`condition_space`).
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
        assert isinstance(self.observation_space, gym.spaces.Dict)
        self.conditions = conditions_of(self.observation_space.spaces.get("condition"))
        _check_conditions(self.chain.denoiser, self.conditions)
        self.baseline = make_baseline(shape, self.chain.steps, conditions=self.conditions)
        self.optimizer = self.optimizer_class(
            (parameter for parameter in self.parameters() if parameter.requires_grad),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return next samples (N, *shape), values (N, 1) and log-densities (N,)."""
        sample, step, condition = self._state(obs)
        mean, std = self.chain.distribution(sample, step, condition)
        action = mean if deterministic else torch.addcmul(mean, std, torch.randn_like(mean))
        log_density = gaussian_log_density(action, mean, std, self.log_density)
        return action, self.baseline(sample, step, condition).unsqueeze(1), log_density

    def evaluate_actions(
        self, obs: PyTorchObs, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values (N, 1), log-densities (N,) and entropies (N,) of given next samples."""
        sample, step, condition = self._state(obs)
        mean, std = self.chain.distribution(sample, step, condition)
        log_density = gaussian_log_density(actions.view_as(sample), mean, std, self.log_density)
        entropy = (0.5 + 0.5 * np.log(2 * np.pi) + std.log()).expand_as(mean).flatten(1).sum(1)
        return self.baseline(sample, step, condition).unsqueeze(1), log_density, entropy

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

    def _state(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return samples (N, *shape), their steps (N,), and their conditions (N, ...)."""
        assert isinstance(obs, Mapping)
        condition = None
        if self.conditions is not None:
            condition = self.conditions.shown(obs["condition"], obs["condition"].device)
        return obs["sample"], self.chain.steps_at(obs["timestep"]), condition

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        for unused in ("net_arch", "features_extractor_class", "features_extractor_kwargs"):
            parameters.pop(unused, None)
        return {**parameters, **self._sources, **self._options}


def _check_conditions(denoiser: Denoiser, shown: Conditions | None) -> None:
    """Raise ValueError if a denoiser and an environment do not agree about conditions."""
    expected = denoiser.conditions if denoiser.is_open else None
    if shown != expected:
        wanted = True if denoiser.classes is not None else denoiser.waits_for
        raise ValueError(
            f"The environment shows {shown or 'no conditions'}, the denoiser waits for "
            f"{expected or 'none'}: make the environment with conditional={wanted!r}, or say "
            "under which condition the denoiser is asked, denoiser.given(condition)."
        )


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
