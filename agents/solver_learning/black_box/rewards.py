"""What tables earn: finished samples of the environment's own episodes, judged by its reward."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ....critics.checks import check_rewards
from ....envs import DiffusionMDP
from ....envs.mdp import Policy, Reward, no_reward
from ...policy_gradient.buffer import Begun


def judged_by(mdp: DiffusionMDP, reward: Reward | None) -> DiffusionMDP:
    """Return the decision process with the reward to maximise, of its own where that learns.

    Args:
        mdp: the environment; where it pays nothing and has data, the default reward is taken.
        reward: another one than the environment's.

    Raises:
        ValueError: there is none.
    """
    chosen: Any = mdp.reward if reward is None else reward
    if chosen is no_reward and mdp.target.has_samples:
        return dataclasses.replace(mdp, reward=None)
    if chosen is no_reward:
        raise ValueError(
            "RDPO maximises a reward of finished samples, and there is none here: give the "
            "environment a reward, or the agent a critic=, a function (N, *shape) -> (N,)."
        )
    # One that remembers what it judged is not to change behind its owner's back.
    own = copy.deepcopy(chosen) if hasattr(chosen, "judge") else chosen
    return mdp.with_reward(own)


# Squared distances between samples of a greater norm overflow float32.
_FARTHEST = 1e18


@torch.no_grad()
def earned(mdp: DiffusionMDP, policy: Policy, n: int, generator: torch.Generator) -> Tensor:
    """Play episodes; return their rewards (n,), float64 on the CPU.

    A sample that is not finite, or so far away that distances to it overflow, earns the least
    that another one did; where all are such, they earn NaN. A reward that remembers what it
    judged, as the default does, begins anew.

    Args:
        mdp: on the policy's times.
        policy: acts.
        n: how many episodes.
        generator: source of their noise and conditions.

    Raises:
        ValueError: the reward is not finite for a sample that is.
    """
    begun = Begun()
    samples = mdp.rollout(policy, n, generator, recorder=begun)
    # The norm of one that is not finite is not either, nor below any bound.
    sound = samples.flatten(1).norm(dim=1) <= _FARTHEST
    if not bool(sound.any()):
        return torch.full((n,), math.nan, dtype=torch.float64)
    if hasattr(mdp.reward, "forget"):
        mdp.reward.forget()  # type: ignore[union-attr]
    # One such sample would spoil what a distance of distributions says of all.
    bad = ~sound
    judged = torch.where(sound.view(-1, *[1] * (samples.ndim - 1)), samples, 0.0)
    rewards = begun.episodes.terminal_reward(judged)
    check_rewards(mdp.reward, rewards, judged)
    rewards = rewards.double()
    rewards[bad] = rewards[sound].min()
    return rewards.cpu()
