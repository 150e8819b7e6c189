"""Stable-Baselines3's PPO on the default reward ends at the data, and not at a point."""

import statistics

import pytest
import torch
from stable_baselines3 import PPO

from fewstep.agents import BehaviorCloning, Denoiser, DenoiserPolicy
from fewstep.agents.denoisers.networks import MLP
from fewstep.critics.metrics.distances import SlicedWasserstein
from fewstep.envs import SB3VecEnv

SEEDS, EPISODES, ROLLOUTS = (0, 1, 2), 128, 32  # 40,960 steps; docs/rl-tools.md has 100,000


def judged(model, mdp, distance, spread):
    """Return sliced W2 to fresh data, and the deviations as fractions of theirs."""
    with torch.no_grad():
        samples = mdp.rollout(model.policy.chain, 20_000, torch.Generator().manual_seed(9))
    return distance(samples), samples.std(0) / spread


@pytest.mark.slow
def test_ppo_of_sb3_finds_the_data_and_stays():
    before, late, ratios = [], [], []
    for seed in SEEDS:
        env = SB3VecEnv("fewstep/SwissRoll-v0", EPISODES)
        mdp = env.env.mdp
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            denoiser = Denoiser(MLP(shape=(2,), levels=10), mdp.process)
        cloning = BehaviorCloning(mdp, denoiser, seed=seed)
        cloning.learn(2000 * cloning.timesteps_per_round)
        cloned = cloning.sampling_denoiser.requires_grad_(True)  # an average, which is frozen
        model = PPO(
            DenoiserPolicy,
            env,
            learning_rate=1e-4,
            n_steps=10,
            batch_size=256,
            gamma=1.0,
            gae_lambda=1.0,
            policy_kwargs={"denoiser": cloned, "tableau": cloning.tableau},
            seed=seed,
            device="cpu",
        )
        real = mdp.target.sample_fresh(20_000, seed=123)
        distance, spread = SlicedWasserstein(real), real.std(0)
        before.append(judged(model, mdp, distance, spread)[0])
        seen = []
        for _ in range(4):
            model.learn(ROLLOUTS * EPISODES * 10 // 4, reset_num_timesteps=False)
            seen.append(judged(model, mdp, distance, spread))
        late.append(max(found for found, _ in seen[2:]))
        ratios.append(float((seen[-1][1] - 1).abs().max()))
    assert statistics.median(before) > 0.07
    assert statistics.median(late) < 0.05
    assert statistics.median(ratios) < 0.15
