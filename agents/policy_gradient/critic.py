"""The critic that an agent maximises: learned as the settings say, given, or the environment's own.

given                     it is obeyed: a `Critic` learns beside the policy, a plain function of
finished samples is maximised as it is
else the environment's    if `make_mdp` or `gym.make_vec` was given a reward
else an `IPMCritic`       shortcut fine-tuning (MATH.md S.7)
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...common.optimisation import seeded
from ...critics import IPMCritic, RewardCritic, make_baseline, make_critic
from ...envs.mdp import DiffusionMDP, Reward, check_reward
from ..denoisers.denoiser import Denoiser
from ..settings import ExecutionSettings
from .noised_critic import NoisedCritic
from .settings import CriticAndBaselineSettings, CriticSettings

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
    """What the shortcut agents ask of a critic (see `fewstep.critics`).

    In a conditional environment, and there only, `value` gets the conditions (N, ...) as
    `condition`, and `update` those of the real samples and of the fakes as `conditions`.
    """

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


def critic_of(
    mdp: DiffusionMDP,
    given: Critic | Reward | None,
    settings: CriticSettings,
    execution: ExecutionSettings,
    seed: int,
    denoiser: Denoiser,
) -> Critic:
    """Return the critic that an agent trains against.

    Args:
        mdp: the environment; what it holds is not changed.
        given: a critic or a reward of the caller's, moved to the environment's device if it is a
            module; None leaves it to the environment.
        settings: of a learned critic; a value baseline goes with every critic if they have one.
        execution: how its networks are run.
        seed: of the networks' weights.
        denoiser: one of which a critic may begin as a copy.
    """
    if given is not None:
        check_reward(given, "critic")
    reward = _own_reward(mdp) if given is None else given
    if isinstance(reward, Critic):
        return reward.to(mdp.device) if isinstance(reward, nn.Module) else reward
    with seeded(seed):
        if reward is None:
            return learned_critic(mdp, settings, denoiser, execution)
        baseline = _baseline(mdp, settings)
    rate = getattr(settings, "baseline_learning_rate", settings.learning_rate)
    return RewardCritic(reward, baseline, rate).to(mdp.device)


def _own_reward(mdp: DiffusionMDP) -> Reward | None:
    """Return the reward that the environment was given, None if it has the default one."""
    if not mdp.has_own_reward:
        return None
    reward = mdp.reward
    assert reward is not None
    if hasattr(reward, "judge"):  # it learns from what it judges: the agent's own one does
        return copy.deepcopy(reward)
    # A critic that was trained before is a reward like any other there: nothing trains it.
    return functools.partial(reward) if hasattr(reward, "update") else reward


def learned_critic(
    mdp: DiffusionMDP,
    settings: CriticSettings,
    denoiser: Denoiser,
    execution: ExecutionSettings | None = None,
) -> IPMCritic:
    """Return a new critic of an environment's samples, under their conditions if there are any.

    Args:
        mdp: the environment.
        settings: a value baseline goes with it if they have one.
        denoiser: what the critic begins as a copy of, if the settings say so.
        execution: how its networks are run.
    """
    execution = execution or ExecutionSettings()
    of_baseline: dict[str, Any] = {}
    shape = tuple(mdp.shape)
    network: nn.Module
    if settings.network == "denoiser":
        network = NoisedCritic(denoiser, shape, settings.levels)
    else:
        network = make_critic(shape, settings.width, settings.bandwidths, conditions=mdp.conditions)
    if isinstance(settings, CriticAndBaselineSettings):
        of_baseline = {
            "baseline": _baseline(mdp, settings),
            "residual_baseline": settings.residual_baseline,
            "scaled_baseline": settings.scaled_baseline,
            "baseline_learning_rate": settings.baseline_learning_rate,
        }
    critic = IPMCritic(
        network,
        settings.regularizer,
        objective=settings.objective,
        coefficient=settings.coefficient,
        learning_rate=settings.learning_rate,
        betas=settings.betas,
        precision=execution.precision,
        **of_baseline,
    )
    if execution.channels_last:
        critic.to(memory_format=torch.channels_last)
    return critic.to(mdp.device)


def _baseline(mdp: DiffusionMDP, settings: CriticSettings) -> nn.Module | None:
    if not isinstance(settings, CriticAndBaselineSettings):
        return None
    return make_baseline(
        tuple(mdp.shape),
        mdp.steps,
        settings.baseline_network,
        settings.width,
        settings.bandwidths,
        conditions=mdp.conditions,
    )
