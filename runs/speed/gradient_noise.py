"""How noisy the gradients of SFT-PG, SFT-V and SFT are, on the digits with one critic."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ...agents import SFT, SFTPG, SFTV, BehaviorCloning
from ...agents.denoisers.bodies import new_denoiser
from ...agents.denoisers.denoiser import Denoiser
from ...envs.mdp import no_reward
from ...envs.registration import make_mdp
from ..settings.train import resolve_device
from ..studies.tables import markdown

# Rounds in which critic and value learn, and independent batches of episodes after them.
LEARNED, BATCHES, EPISODES = 20, 24, 64
CHAIN: dict[str, Any] = {
    "batch_size": EPISODES,
    "n_generator": 1,
    "solver_options": {"variance": "small", "last_std": 0.05},
}


def gradient_noise(device: str) -> tuple[dict[str, Any], str]:
    """Measure the signal-to-noise ratio of one estimate of theta's gradient.

    It is the squared length of the mean over the variance, both unbiased, of independent batches of
    64 episodes. Theta stands still: a DDPM as it was cloned.
    """
    mdp = make_mdp("Digits", steps=10, device=resolve_device(device), reward=no_reward)
    cloning = BehaviorCloning.for_environment(mdp, new_denoiser(mdp))
    weights = cloning.learn().sampling_denoiser.body.state_dict()

    def denoiser() -> Denoiser:
        network = new_denoiser(mdp).to(mdp.device)
        network.body.load_state_dict(weights)
        return network

    first = SFTV.for_environment(mdp, denoiser(), n_critic=2, critic_rounds=LEARNED, **CHAIN)
    for _ in range(LEARNED):
        first.train_round()
    figures = {}
    for kind in (SFTPG, SFTV, SFT):
        # The score function sees each of the episodes' transitions once, as the others do.
        more: dict[str, Any] = {}
        if kind is SFTPG:
            more = {"minibatch_size": 10 * EPISODES, "log_density": "mean"}
        agent: Any = kind.for_environment(
            mdp,
            denoiser(),
            critic=_Still(first.critic),
            n_critic=1,
            critic_rounds=0,
            **CHAIN,
            **more,
        )
        gradients: list[Tensor] = []

        def note(agent: Any = agent, into: list[Tensor] = gradients) -> Tensor:
            """Keep the gradient instead of descending along it."""
            parts = [p.grad.flatten() for p in agent.policy.trained() if p.grad is not None]
            into.append(torch.cat(parts).double().cpu())
            return torch.zeros(())

        agent.descend = note
        for _ in range(BATCHES):
            agent.train_round()
        figures[agent.name] = {"ratio": _ratio(torch.stack(gradients))}
    shown = pd.DataFrame(figures).T.map("{:.3g}".format)
    return figures, markdown(shown, f"gradient, {EPISODES} episodes of the digits")


class _Still:
    """A critic that has stopped learning."""

    def __init__(self, critic: Any) -> None:
        self._critic = critic

    def __call__(self, sample: Tensor) -> Tensor:
        return self._critic(sample)

    def value(self, states: Tensor, steps: Tensor | None = None) -> Tensor:
        return self._critic.value(states, steps)

    def update(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {"critic_fake": torch.zeros(())}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is restored."""


def _ratio(gradients: Tensor) -> float:
    """Return ||E g||^2 / Var g of estimates (n, weights), without the mean's own noise."""
    mean, count = gradients.mean(0), len(gradients)
    variance = (gradients - mean).square().sum() / (count - 1)
    return float((mean.square().sum() - variance / count) / variance)
