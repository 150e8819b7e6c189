"""SFT: shortcut fine-tuning with the pathwise gradient, like a WGAN generator (MATH.md S.3).

    grad Phi = -E[ grad_theta f(x_0(theta, noise)) ]      by back-propagation through the chain

It needs a critic whose gradient means something, hence the gradient penalty, and its memory grows
with K. It needs no density: any solver may sample, a deterministic one of several steps, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.optimisation import frozen
from ...envs.mdp import DiffusionMDP, Draw, Observation, Policy, Reward
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..finished_table import TakesTable, on_clock_of
from ..samplers.gaussian import GaussianChain
from ..samplers.table_chain import TableChain
from .buffer import Begun, Trajectories
from .critic import Critic
from .settings import SFTSettings
from .shortcut import ShortcutAgent


class SFT(TakesTable, ShortcutAgent):
    """Fine-tune a sampler by back-propagating a critic through it (Fan & Lee 2023, Eq. 14).

    A round: n_critic rollouts and critic steps, then n_generator steps of theta, each through fresh
    rollouts of `batch_size`; with `gradient_steps` through that many last steps, from states of the
    critic's rollouts with fresh noise, or of fresh rollouts where a step reads what came before.
    The gradient goes through the environment's transitions, too.

    Its arguments are `ShortcutAgent`'s and `tableau` (see `TakesTable`; its times replace the
    environment's), its settings `SFTSettings`.

    Raises:
        ValueError: settings out of their bounds, `non_saturating` with another objective than the
            logistic one, `mismatched` without conditions, `learn_std` for a sampler with memory or
            steps without noise, or a sampler that asks twice at one time.
    """

    name = "sft"
    theta_acts = True

    settings: SFTSettings
    Settings = SFTSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: SFTSettings | None = None,
        *,
        critic: Critic | Reward | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, critic=critic, **arguments)
        self.mdp = on_clock_of(self.mdp, self._tableau)
        if self.settings.policy.non_saturating and self.settings.critic.objective != "logistic":
            raise ValueError("non_saturating is for a critic with the logistic objective.")
        if self.settings.mismatched and self.mdp.conditions is None:
            raise ValueError(
                "mismatched is for a conditional environment, where a sample can be right and not "
                "what was asked for: give conditional=True, or leave it out."
            )
        # A reward of the caller's is climbed as it is.
        logistic = getattr(self.critic, "objective", None) == "logistic"
        self._non_saturating = self.settings.policy.non_saturating and logistic
        # The number of the state from which the gradient flows.
        last = self.settings.policy.gradient_steps or self.policy.steps
        self._cut = max(self.policy.steps - last, 0)

    def _new_policy(self) -> GaussianChain | TableChain:
        """Return what acts: a Gaussian policy where the table is one, or the table itself."""
        table, policy = self._tableau, self.settings.policy
        size = self.settings.execution.micro_batch_size
        noisy = bool((table.base_std > 0).all()) and table.one_step and table.nfe == table.steps
        if noisy or policy.learn_std:
            return GaussianChain(
                self.denoiser, table, policy.learn_std, size, policy.gradient_checkpointing
            )
        return TableChain(self.denoiser, table, size, policy.gradient_checkpointing)

    @property
    def _replays(self) -> bool:
        """Whether theta's steps go on from states of the critic's rollouts."""
        return self.settings.policy.gradient_steps is not None and self._tableau.one_step

    @property
    def timesteps_per_round(self) -> int:
        """The calls of acting, those of all processes; theta's steps may act in a part of K."""
        settings = self.settings
        asked = [self._tableau.row(step).asked for step in range(self.policy.steps)]
        played = asked[self._cut :] if self._replays else asked
        calls = settings.n_critic * sum(asked) + settings.n_generator * sum(played)
        return calls * settings.batch_size * self.processes.count

    def improve(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Take n_generator steps along the critic's gradient through the chain.

        Raises:
            ValueError: the reward has no gradient with respect to the sample.
        """
        batches = list(trajectories.batches())
        for number in range(self.settings.n_generator):
            with frozen(self.critic_network):
                if self._replays:
                    episodes, states = batches[number % len(batches)]
                    samples = self._finish(episodes, trajectories.fetch(states[self._cut]))
                else:
                    episodes, samples = self._play()
                reward = self.differentiable_reward(episodes, samples)
                if self._non_saturating:
                    reward = F.logsigmoid(reward)
                loss = -reward.mean()
                self.optimizer.zero_grad()
                loss.backward()
            grad_norm = self.descend()
        return {"train/policy_loss": loss.detach(), "train/grad_norm": grad_norm}

    def with_mismatches(
        self, fake: Tensor, condition: Tensor, real: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put real samples under the conditions of others in the place of some fakes.

        What is right but not what was asked for counts as a fake then (Reed et al. 2016, GAN-CLS):
        else a critic learns conditions only as far as the sampler mistakes them.
        """
        count = int(self.settings.mismatched * len(fake))
        if not count:
            return fake, condition
        others = given.roll(1, 0)
        rows = (given != others).reshape(len(given), -1).any(1).nonzero().flatten()[:count]
        kept = slice(len(rows), None)
        return torch.cat([real[rows], fake[kept]]), torch.cat([others[rows], condition[kept]])

    def _play(self) -> tuple[DiffusionMDP, Tensor]:
        """Play new episodes from their start; return them and their finished samples."""
        begun = Begun()
        samples = self.mdp.rollout(
            LastSteps(self.policy, self._cut),
            self.settings.batch_size,
            self.generator,
            recorder=begun,
            processes=self.processes,
            even=self.settings.even,
        )
        return begun.episodes, samples

    def _finish(self, episodes: DiffusionMDP, states: Tensor) -> Tensor:
        """Play the last steps of episodes anew, from states (n, *shape) before them."""
        for step in range(self._cut, self.policy.steps):
            action = self.policy.act(episodes.observe(states, step), step, self.draw)
            states = episodes.transition(states, action, step, self.draw)
        return states

    def state(self) -> dict[str, Any]:
        """See `ShortcutAgent.state`; and the table that it was given."""
        return {**super().state(), "tableau": self.table_state()}

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        return (
            f"Give gradient_checkpointing=True, or a batch_size below {self.settings.batch_size}."
        )


class LastSteps:
    """A policy whose gradient goes through its last steps only.

    Args:
        policy: acts.
        cut: the first step with a gradient.
    """

    def __init__(self, policy: Policy, cut: int) -> None:
        self.policy, self.cut = policy, cut

    def act(self, observation: Observation, step: int, draw: Draw) -> Tensor:
        """See `fewstep.envs.mdp.Policy`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= self.cut):
            return self.policy.act(observation, step, draw)
