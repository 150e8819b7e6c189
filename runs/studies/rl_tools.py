"""The yardstick of RL tooling: PPO of Stable-Baselines3, same environment, policy and budget."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from ...agents import Denoiser, DenoiserPolicy
from ...agents.presets import preset
from ...common.optimisation import seeded
from ...critics import IPMCritic, make_baseline, make_critic
from ...envs import DiffusionMDP, DiffusionVectorEnv, SB3VecEnv
from ..run.folder import read_record, write_json
from .contenders import Contender, Grid
from .engine import Study, locked
from .stages import DONE, Clone, Learn, Sample, Sampler, fine_tune
from .world import World

# Episodes at once, and rollouts after which the quality is measured.
EPISODES, MEASURED = 256, 20
PPO_SETTINGS = {
    "batch_size": 2560,
    "n_epochs": 4,
    "learning_rate": 1e-4,
    "gamma": 1.0,
    "gae_lambda": 1.0,
}


@dataclass(frozen=True)
class StableBaselines(Learn):
    """PPO of Stable-Baselines3 on `DenoiserPolicy`, as a stage of a chain.

    Its budget is that of SFT-PG's preset, in calls of the policy. Settings are PPO's and win over
    `PPO_SETTINGS`. A training that was stopped begins again.

    Attributes:
        learned_critic: the reward is an `IPMCritic` that a callback updates after each rollout, as
            SFT-PG does; False leaves it to the environment's default reward.
    """

    learned_critic: bool = False

    def __call__(self, sampler: Sampler, world: World, folder: Path) -> Sampler:
        """Train in a folder, or find it trained there."""
        assert sampler.tableau is not None, "A solver is chosen before PPO trains it."
        network, done = folder / "denoiser.safetensors", folder / DONE
        with locked(folder / "lock"):
            if not done.is_file():
                facts, denoiser = self._train(sampler, world)
                denoiser.save(network)
                write_json(done, facts)
        return replace(
            sampler,
            denoiser=Denoiser.load(network, world.target.device),
            before=(sampler.tableau, sampler.denoiser),
            facts=sampler.facts | read_record(done),
        )

    def _train(self, sampler: Sampler, world: World) -> tuple[dict[str, object], Denoiser]:
        """Train; return what the record says of it, and the network."""
        mdp = world.mdp(sampler.denoiser.process, sampler.schedule)
        critic = _critic(mdp, world.seed) if self.learned_critic else None
        mdp = replace(mdp, reward=critic)
        denoiser = copy.deepcopy(sampler.denoiser).requires_grad_(True)
        set_random_seed(world.seed)
        model = PPO(
            DenoiserPolicy,
            SB3VecEnv(DiffusionVectorEnv(mdp, EPISODES)),
            n_steps=mdp.steps,
            policy_kwargs={"denoiser": denoiser, "tableau": sampler.tableau},
            seed=world.seed,
            device=mdp.device,
            **{**PPO_SETTINGS, **self.settings},
        )
        rounds = world.settings.rounds or preset(world.env, "sft-pg").agent.get("rounds", 400)
        budget = rounds * 5 * EPISODES * mdp.steps
        watch = _Watch(world, mdp, critic)
        began = time.monotonic()
        model.learn(budget, callback=watch)
        seconds = time.monotonic() - began
        facts = {"seconds": seconds, "training calls": budget, "curve": watch.curve}
        policy = model.policy
        assert isinstance(policy, DenoiserPolicy)
        return {**facts, "calls a second": budget / seconds}, policy.chain.denoiser


class _Watch(BaseCallback):
    """Teaches the critic after each rollout, and notes the quality now and then."""

    def __init__(self, world: World, mdp: DiffusionMDP, critic: IPMCritic | None) -> None:
        super().__init__()
        self.world, self.mdp, self.critic = world, mdp, critic
        self.generator = torch.Generator(world.target.device).manual_seed(world.seed)
        self.curve: tuple[list[int], list[float]] = ([], [])
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, PPO)
        buffer, target = self.model.rollout_buffer, self.world.target
        assert isinstance(buffer, DictRolloutBuffer)
        if self.critic is not None:
            # A rollout is one episode of each environment: its last actions are finished samples.
            states = torch.as_tensor(buffer.observations["sample"], device=target.device)
            fake = torch.as_tensor(buffer.actions[-1], device=target.device).view(states.shape[1:])
            self.critic.update(target.sample(len(fake), self.generator), fake, states)
        self._rollouts += 1
        if self._rollouts % MEASURED == 0:
            self._measure()

    def _measure(self) -> None:
        policy = self.model.policy
        assert isinstance(policy, DenoiserPolicy)
        with torch.no_grad():
            quality = self.world.evaluation.quick(
                lambda n, generator: self.mdp.rollout(policy.chain, n, generator)
            )
        self.curve[0].append(self.num_timesteps)
        self.curve[1].append(quality["sliced_wasserstein"])


def _critic(mdp: DiffusionMDP, seed: int) -> IPMCritic:
    """Build SFT-PG's critic, with the coefficient of its preset."""
    shape = tuple(mdp.shape)
    with seeded(seed):
        critic = IPMCritic(
            make_critic(shape),
            baseline=make_baseline(shape, mdp.steps),
            coefficient=1.0,
        )
    return critic.to(mdp.device)


def _chain(label: str, stage: Learn) -> Contender:
    return Contender(label, (Clone(seed=0), Sample("ancestral", {"variance": "beta"}), stage))


STUDIES = {
    "ppo": Study(
        "PPO of Stable-Baselines3 against SFT-PG and SFT-V: one environment, policy and budget",
        Grid(
            ("SwissRoll",),
            (
                _chain("PPO, default reward", StableBaselines("ppo")),
                _chain("PPO, learned critic", StableBaselines("ppo", learned_critic=True)),
                _chain("SFT-PG (B)", fine_tune("sft-pg")),
                _chain("SFT-V", fine_tune("sft-v")),
            ),
        ),
        ("sliced_wasserstein_fresh", "training calls", "calls a second", "seconds"),
    )
}
