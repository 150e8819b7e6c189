"""SFT-V: shortcut fine-tuning with a one-step value gradient (MATH.md S.9).

    grad = E[ sum_j grad_theta V(x_s, t_{j+1}) ],   x_s = mean_theta(x_t, t_j) + s_j z,   V(x_0) = f

Each step of the sampler climbs the value of the state that it leads to, through one network call.
The score-function gradient of SFT-PG needs no gradient of f and V, and pays for it with a variance
that grows with the dimension; this one is as noisy as V is rough, and biased where V is wrong. No
gradient flows through the chain, so memory does not grow with K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.optimisation import frozen
from ...envs.mdp import DiffusionMDP
from .buffer import Trajectories
from .settings import SFTVSettings
from .shortcut import ShortcutAgent


class SFTV(ShortcutAgent):
    """Fine-tune a sampler step by step along the gradient of a learned value.

    What deterministic policy gradients (Silver et al. 2014) and stochastic value gradients of one
    step (Heess et al. 2015) do, with the value baseline of SFT-PG as the value. A round: roll out
    n_critic batches; one Adam step of critic and value on each; then n_generator steps of theta,
    each on the states of one of these batches at all K steps, with fresh noise.

    Its arguments are `ShortcutAgent`'s, its settings `SFTVSettings`.

    Raises:
        ValueError: a chain without noise, or settings out of their bounds.
    """

    name = "sft-v"
    theta_acts = True

    settings: SFTVSettings
    Settings = SFTVSettings

    def improve(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Take n_generator steps, each up the values of the states of one batch.

        Raises:
            ValueError: the reward has no gradient with respect to the sample.
        """
        share = 1 / (self.settings.batch_size * self.policy.steps)
        for number in range(self.settings.n_generator):
            self.optimizer.zero_grad()
            loss = torch.zeros((), device=self.device)
            with frozen(self.critic_network):
                for step, episodes, states in trajectories.starts(number):
                    part = -share * self.value_after(episodes, states, step).sum()
                    part.backward()
                    loss += part.detach()
            grad_norm = self.descend()
        return {"train/policy_loss": loss, "train/grad_norm": grad_norm}

    def value_after(self, episodes: DiffusionMDP, states: Tensor, step: int) -> Tensor:
        """Act once, reparametrised; return the value (n,) of where that leads.

        Args:
            episodes: the decision process of these episodes.
            states: (n, *shape), before the step.
            step: 0 to K - 1.
        """
        action = self.policy.act(episodes.observe(states, step), step, self.draw)
        moved = episodes.transition(states, action, step, self.draw)
        if step + 1 < self.policy.steps:
            return self.value(episodes, moved, step + 1)
        return self.differentiable_reward(episodes, moved)

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        half = max((self.settings.execution.micro_batch_size or self.settings.batch_size) // 2, 1)
        return f"Give micro_batch_size={half}, which changes no result but for the noise."
