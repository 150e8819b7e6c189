"""Decision processes for agents and commands that need noise and a network, but no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...envs import DiffusionMDP, Schedule, Target
from ...envs.mdp import no_reward
from ..denoisers.denoiser import Denoiser

# Name of the target of a decision process that has none.
NO_DATA = "no data"


def mdp_without_data(
    denoiser: Denoiser, schedule: Schedule, shape: tuple[int, ...]
) -> DiffusionMDP:
    """Build a decision process for an agent that needs noise, but no data.

    Args:
        denoiser: a pretrained network; its device is where everything is done.
        schedule: the times to visit, on the denoiser's process.
        shape: of one sample.
    """
    nothing = no_data(shape, next(denoiser.parameters()).device)
    return DiffusionMDP(nothing, denoiser.process, schedule, no_reward)


def no_data(shape: Sequence[int], device: torch.device | str) -> Target:
    """Return a target that only says which shape its samples would have."""
    return Target.from_samples(torch.zeros(2, *shape, device=device), name=NO_DATA)
