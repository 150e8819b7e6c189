"""Stable-Baselines3's own PPO trains a diffusion sampler.

The environment pays for looking like the data, the policy is a denoiser with its table. For the
figures in docs/rl-tools.md start from a cloned denoiser (see swiss_roll_sft_pg.py); this one is
untrained.
"""

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from fewstep.agents import Denoiser, DenoiserPolicy
from fewstep.agents.denoisers.networks import MLP
from fewstep.agents.solvers import make_solver
from fewstep.envs import SB3VecEnv

env = SB3VecEnv(gym.make_vec("fewstep/SwissRoll-v0", num_envs=128))
mdp = env.env.mdp
policy = {
    "denoiser": Denoiser(MLP(shape=(2,), levels=10), mdp.process),
    "tableau": make_solver("ancestral", mdp.schedule, variance="beta"),
}
settings = {"n_steps": 10, "batch_size": 256, "learning_rate": 1e-4, "gamma": 1.0}
model = PPO(DenoiserPolicy, env, gae_lambda=1.0, policy_kwargs=policy, **settings)
print("mean reward before:", evaluate_policy(model, env, n_eval_episodes=1280, warn=False)[0])
model.learn(100_000)
print("mean reward after:", evaluate_policy(model, env, n_eval_episodes=1280, warn=False)[0])
