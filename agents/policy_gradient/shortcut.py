"""ShortcutAgent: what SFT-PG, SFT-V and SFT share, a sampler fine-tuned against a critic.

Shortcut fine-tuning (Fan & Lee 2023) alternates: n_critic critic steps with the sampler fixed, then
n_generator steps of the sampler with the critic fixed, descending the integral probability metric
Phi(p_0^theta, q_0) (MATH.md S.1, S.7). The three agents differ in the gradient of the second
part only. Which average is returned is chosen on held-out noise (`Looks`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...common.optimisation import Averaged, adam, learning_rate, set_learning_rate
from ...common.shapes import is_image
from ...critics import IPMCritic, RewardCritic
from ...critics.metrics.features import FeatureExtractor, check_extractor, check_takes
from ...envs.mdp import DiffusionMDP, Reward
from ..base import MEASURED, Agent
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..report import Panel, Report
from ..samplers.gaussian import GaussianChain
from ..samplers.table_chain import TableChain
from ..samplers.tableau import Tableau
from .buffer import Trajectories
from .critic import CRITIC_TAGS, Critic, critic_of
from .execution import Execution, as_executed
from .held_out import HeldOut
from .looks import FOUND, Looks
from .replay import Replay
from .settings import (
    CriticAndBaselineSettings,
    SFTPGSettings,
    SFTSettings,
    SFTVSettings,
    ShortcutSettings,
)


class ShortcutAgent(Agent):
    """Base of SFT-PG, SFT-V and SFT.

    A learned critic is no measure of progress, as it moves along. So the averaged sampler is
    compared with data on noise that is not trained on, by the energy distance, ten times on the way
    (`held_out.looks`). In the end an earlier one is returned where the last is farther from the
    data, not by chance; or weights between those and the given ones, where they are nearer
    (`Looks`). Images are compared in features, if there are some: in pixels their brightness
    decides. Where a reward is maximised, the last is returned.

    Args:
        env: the environment, in which the agent acts: its own `initial`, `observe`, `transition`
            and `terminal_reward` are called. A reward that it was given is maximised; where it has
            the default one, or `no_reward`, a critic is learned instead.
        denoiser: the network theta, trained in place.
        settings: see the agent's `Settings`.
        critic: f and V, instead of both: a `Critic`, or a reward function (N, *shape) -> (N,),
            which is maximised as it is.
        features: what images are compared in, such as `ClassifierFeatures`; without any the last
            average of a sampler of images is returned.
        arguments: see `Agent`: single settings by name, seed, verbose, tensorboard_log.

    Raises:
        TypeError: features that are no extractor.
        ValueError: features for samples that are no images, or for images of another shape.

    Attributes:
        critic: f and V.
        returned: which sampler samples when training is over: the "last" average, an "earlier" one,
            or the one that was "given".
        way: how far its weights are on the way from the given ones to those, 0 to 1.
        errors: energy distances to real samples, on noise that was neither trained on nor chosen
            by: of the sampler as it was "given", of the "last" average and of what is "returned";
            empty where nothing was compared.
    """

    data_parallel = True
    takes_features = True
    # Whether theta's own steps act in the environment, too.
    theta_acts = False

    settings: SFTPGSettings | SFTVSettings | SFTSettings
    policy: GaussianChain | TableChain

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: ShortcutSettings | None = None,
        *,
        critic: Critic | Reward | None = None,
        features: FeatureExtractor | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, **arguments)
        if features is not None:
            check_extractor("features", features)
            if not is_image(self.mdp.shape):
                raise ValueError(
                    f"features are for images; samples of shape {tuple(self.mdp.shape)} are "
                    "compared as they are: give none."
                )
            check_takes(features, self.mdp.shape)
        self._features = features
        optimizer, execution = self.settings.optimizer, self.settings.execution
        self.policy = self._new_policy().to(self.device)
        self.optimizer = adam(self.policy.trained(), optimizer.betas)
        self.averaged = Averaged(self.policy, optimizer.ema)
        # Only what trains: the averaged network samples as any user of its file will.
        self.execution = Execution(self.denoiser, execution)
        self.critic = critic_of(
            self.mdp, critic, self.settings.critic, execution, self.seed, self.denoiser
        )
        # A critic of one's own comes with rates of its own.
        self._critic_optimizer: torch.optim.Optimizer | None
        self._critic_optimizer = getattr(self.critic, "optimizer", None)
        groups = self._critic_optimizer.param_groups if self._critic_optimizer else []
        self._critic_rates = [group["lr"] for group in groups]
        # The first is f's, unless f is a reward and only V learns.
        of_f = [] if isinstance(self.critic, RewardCritic) else ["critic.learning_rate"]
        names = [*of_f, "critic.baseline_learning_rate"][: len(groups)]
        self._critic_step_sizes = [] if self.critic is critic else names
        self.replay: Replay | None = None
        if self.settings.critic_replay:
            if self.settings.critic.regularizer == "baseline":
                raise ValueError(
                    "The baseline regularizer needs the states before each fake, which "
                    "critic_replay does not keep: take another regularizer, or no replay."
                )
            self.replay = Replay(self.settings.critic_replay * self.settings.batch_size)
        # The agent's own decision process pays what the critic says; the caller's stays as it is.
        self.mdp = self.mdp.with_reward(self.critic)
        agree = partial(self.processes.any, device=self.device)
        self._looks = Looks(self.averaged, self._distances, agree)
        self._held_out: dict[int, HeldOut] = {}

    def _new_policy(self) -> GaussianChain | TableChain:
        """Return what acts: theta and the table."""
        return GaussianChain(
            self.denoiser,
            self._tableau,
            self.settings.policy.learn_std,
            self.settings.execution.micro_batch_size,
        )

    @abstractmethod
    def improve(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Take a round's steps of theta, after the critic's; return what to log."""

    @as_executed
    def train_round(self) -> dict[str, Tensor]:
        """Do one round (MATH.md S.7): roll out, train the critic, then theta.

        Raises:
            ValueError: theta follows the reward's gradient, and the reward has none.
        """
        last, interval = self.last_round, self._interval()
        self.anneal()
        trajectories = self.collect()
        metrics = self.train_critic(trajectories)
        if self.rounds < self.settings.critic_rounds:  # the critic learns alone at first
            return metrics
        if interval and not self._looks.begun:
            self._looks.begin()
        metrics |= self.improve(trajectories)
        moved = self.rounds - self.settings.critic_rounds
        self.averaged.update(moved)
        if interval and (last or (moved + 1) % interval == 0):
            metrics[MEASURED] = self._look(last)
        return metrics

    def step_sizes(self) -> list[str]:
        """Return the learning rates of theta, and of the critic unless it brought its own."""
        return [*super().step_sizes(), *self._critic_step_sizes]

    @property
    def timesteps_per_round(self) -> int:
        """The calls of acting, those of all processes: batches of K steps, without the looks'."""
        settings = self.settings
        batches = settings.n_critic + (settings.n_generator if self.theta_acts else 0)
        return batches * settings.batch_size * self.policy.steps * self.processes.count

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module.denoiser

    @property
    def tableau(self) -> Tableau:
        """The sampler, with the learned standard deviations when they are learned."""
        policy = self.averaged.module
        if self.settings.policy.learn_std and isinstance(policy, GaussianChain):
            return policy.export()
        return self._tableau

    @torch.no_grad()
    def collect(self) -> Trajectories:
        """Act in the environment: n_critic batches of trajectories under the policy as it is."""
        settings, execution = self.settings, self.settings.execution
        trajectories = Trajectories(
            self.policy.steps,
            settings.batch_size,
            self.device,
            execution.buffer,
            execution.micro_batch_size,
            self.processes,
        )
        self.mdp.rollout(
            self.policy,
            settings.n_critic * settings.batch_size,
            self.generator,
            recorder=trajectories,
            processes=self.processes,
            groups=settings.n_critic,
            even=settings.even,
        )
        self.num_timesteps += self.timesteps_per_round
        return trajectories

    def train_critic(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Take `critic_passes` steps of critic and baseline on each batch of trajectories."""
        settings, states, steps = self.settings, None, None
        # On a GPU we do not wait for the answer: there it shows in the critic's metrics.
        if self.device.type == "cpu" and not trajectories.states[-1].isfinite().all():
            raise self.diverged("rollout/sample")
        batches = list(trajectories.batches())
        for number in range(settings.critic_passes * len(batches)):
            real, given = self._draw_real(number)
            if self.replay is not None and number >= len(batches):
                fake, condition = self.replay.draw(settings.batch_size, self.generator)
                states = steps = None
            else:
                episodes, batch = batches[number % len(batches)]
                fake, condition = trajectories.fetch(batch[-1]), episodes.condition
                if self.replay is not None:
                    self.replay.add(fake, condition)
                if isinstance(settings.critic, CriticAndBaselineSettings):
                    # Some of the K states of each trajectory, the same steps for all.
                    steps = torch.randperm(
                        self.policy.steps, generator=self.generator, device=self.device
                    )[: settings.critic.baseline_states]
                    states = trajectories.fetch(batch[steps.to(batch.device)])
            under: dict[str, Any] = {}
            real = self.processes.share(real)
            if condition is not None and given is not None:
                given = self.processes.share(given)
                fake, condition = self.with_mismatches(fake, condition, real, given)
                under["conditions"] = given, condition
            metrics = self.critic.update(real, fake, states, steps, **under)
        tagged = {CRITIC_TAGS.get(key, f"train/{key}"): value for key, value in metrics.items()}
        # The reward of an episode is f(x_0): the mean of f over the fakes, under the name SB3
        # gives it.
        return {"rollout/ep_rew_mean": metrics["critic_fake"], **tagged}

    def with_mismatches(
        self, fake: Tensor, condition: Tensor, real: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the critic is shown as fakes, and their conditions; here the fakes alone."""
        return fake, condition

    def _draw_real(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Draw the real samples of all processes, and their conditions, for a critic step."""
        settings, target = self.settings, self.mdp.target
        everyone = settings.batch_size * self.processes.count
        if not settings.even:
            return target.draw(everyone, self.generator, self.mdp.kind)
        steps = settings.n_critic * settings.critic_passes
        first = (self.rounds * steps + number) * everyone
        return target.draw_in_passes(everyone, first, self.seed, self.generator, self.mdp.kind)

    def draw(self, like: Tensor) -> Tensor:
        """Draw a step's noise for states (n, *shape)."""
        return self.processes.noise(like, self.generator, even=self.settings.even)

    @property
    def critic_network(self) -> nn.Module | None:
        """The critic, unless it is one of the caller's that is no network."""
        return self.critic if isinstance(self.critic, nn.Module) else None

    def value(self, episodes: DiffusionMDP, states: Tensor, step: int) -> Tensor:
        """Return V (n,) of the states (n, *shape) of episodes before a step, 0 to K - 1."""
        before = torch.full((1,), step, device=self.device)
        # One argument more in a conditional environment, see `Critic`.
        under = {} if episodes.condition is None else {"condition": episodes.condition}
        return self.critic.value(states[None], before, **under)[0]

    def differentiable_reward(self, episodes: DiffusionMDP, samples: Tensor) -> Tensor:
        """Return the reward (n,) of episodes' finished samples (n, *shape), with its gradient.

        Raises:
            ValueError: the reward has none with respect to the sample.
        """
        reward = episodes.terminal_reward(samples)
        if not reward.requires_grad:
            raise ValueError(
                f"{type(self).__name__} follows the gradient of the reward with respect to the "
                "sample, and this reward has none: train with SFTPG, which needs none."
            )
        return reward

    def descend(self) -> Tensor:
        """Take a clipped step of the sampler along its gradient; return the norm before."""
        parameters = self.optimizer.param_groups[0]["params"]
        self.processes.average_gradients(parameters)
        clip = self.settings.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        self.optimizer.step()
        return norm

    # -- which average is returned ---------------------------------------------------------------

    @property
    def returned(self) -> str:
        """Which sampler samples when training is over."""
        return self._looks.returned

    @property
    def way(self) -> float:
        """How far the weights that sample are on the way from the given ones to `returned`'s."""
        return self._looks.way

    @property
    def errors(self) -> dict[str, float]:
        """Energy distances to real samples on held-out noise."""
        return self._looks.errors

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why; empty where nothing was compared."""
        return self._looks.verdict

    @property
    def _compared(self) -> str:
        """What is compared with data."""
        return "samples" if self._features is None else self._features.name

    def _interval(self) -> int:
        """Return the rounds of theta between two looks; 0 if there are none."""
        looks, moving = self.settings.held_out.looks, self.planned - self.settings.critic_rounds
        # What follows a reward goes where that leads.
        compares = isinstance(self.critic, IPMCritic) and bool(looks) and moving < math.inf
        if not compares or (self._features is None and is_image(self.mdp.shape)):
            return 0
        return int(max(moving, 0)) // looks

    def _look(self, last: bool) -> Tensor:
        """Compare the averaged sampler with data; choose after the last round. Return D, 0-d."""
        shares = self._looks.look(self.rounds + 1)
        if last:
            self._looks.finish(shares, self.optimizer)
        return shares.mean()

    def _distances(self, part: int) -> Tensor:
        """Return the shares of the averaged sampler's energy distance to real samples.

        Args:
            part: which noise and which real samples.
        """
        if part not in self._held_out:
            settings, seed = self.settings, 2 * self.seed + part
            at_once = settings.n_critic * settings.batch_size  # as when it acts
            size = settings.held_out.size
            self._held_out[part] = HeldOut(self.mdp, size, at_once, seed, self._features)
        return self._held_out[part].shares(self.averaged.module)

    def report(self) -> Report:
        """Return the distances to data, and how they went."""
        if not self.errors:
            return Report()
        # Near the data the estimate may be below 0.
        panels = [Panel("energy distance to data", "round", logged={"average": MEASURED})]
        results = {"errors": self.errors, "returned": self.returned, "way": self.way}
        return Report(self.verdict, results, figures={"held_out.png": panels})

    # -- learning rates and checkpoints ----------------------------------------------------------

    def anneal(self) -> None:
        """Set this round's learning rates; theta's rises over the first rounds of a raw critic."""
        done, update = self.progress, self.rounds - self.settings.critic_rounds
        of_theta = self.settings.optimizer
        peak, schedule = of_theta.learning_rate, of_theta.lr_schedule
        rate = learning_rate(peak, schedule, done, update, self.settings.warmup)
        set_learning_rate(self.optimizer, rate)
        if self._critic_optimizer is not None:
            schedule = self.settings.critic.lr_schedule
            rates = (learning_rate(peak, schedule, done) for peak in self._critic_rates)
            set_learning_rate(self._critic_optimizer, *rates)

    def state(self) -> dict[str, Any]:
        """Return optimizer, critic, and the standard deviations."""
        kept = {} if self.replay is None else {"replay": self.replay.state()}
        return {
            **kept,
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict(),
            "looks": {**self._looks.state(), "compared": self._compared},
            "log_std": self._deviations(),
            "heads": [head.state_dict() for head in self._heads()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic.load_state_dict(state["critic"])
        with torch.no_grad():
            for parameter, value in zip(self._deviations(), state["log_std"], strict=True):
                parameter.copy_(value)
        if self.replay is not None:
            self.replay.load_state(state.get("replay", {}), self.device)
        # Older files have no looks.
        if (looks := state.get("looks")) is not None:
            # With a distance in other features there is nothing to compare.
            same = looks["compared"] == self._compared
            self._looks.load_state(looks if same else {**looks, **dict.fromkeys(FOUND)})
        # Files from before there were second heads have none.
        for head, weights in zip(self._heads(), state.get("heads", []), strict=True):
            head.load_state_dict(weights)

    def _deviations(self) -> list[Tensor]:
        """Return the standard deviations in training and the averaged ones, if it has any."""
        policies = (self.policy, self.averaged.module)
        return [policy.log_std for policy in policies if isinstance(policy, GaussianChain)]

    def _heads(self) -> list[torch.nn.Module]:
        """Return the second head in training and the averaged one, if the denoiser has any."""
        denoisers = (self.policy.denoiser, self.averaged.module.denoiser)
        return [denoiser.head for denoiser in denoisers if denoiser.head is not None]
