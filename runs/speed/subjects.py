"""What the measurements measure: environments and networks for which training does not matter."""

from __future__ import annotations

from torch import nn

from ...agents import Denoiser
from ...agents.denoisers.networks import make_body
from ...common.optimisation import seeded
from ...envs import DiffusionMDP
from ...envs.mdp import no_reward
from ...envs.registration import make_mdp
from ..settings.train import resolve_device


def swiss_roll(steps: int, device: str) -> DiffusionMDP:
    """Build the swiss-roll environment with a free reward, for agents that bring a critic."""
    return make_mdp("SwissRoll", steps=steps, device=resolve_device(device), reward=no_reward)


def untrained(mdp: DiffusionMDP) -> Denoiser:
    """Build a denoiser with random weights: speed and memory do not depend on training."""
    with seeded(0):
        body: nn.Module = make_body(mdp.shape, int(mdp.process.t_max))
    return Denoiser(body, mdp.process).to(mdp.device)
