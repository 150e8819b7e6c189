"""The environment without our agents: Gymnasium's loop, whole batches on one device.

An observation is `{"sample", "timestep"}`, an action is the next sample. The reward comes with the
last step; by default its mean is minus the energy distance between finished samples and data.
"""

import gymnasium as gym
import torch

import fewstep.envs  # noqa: F401 - registers the environments

env = gym.make_vec("fewstep/SwissRoll-v0", num_envs=64, steps=5)  # device="cuda" where there is one
observation, _ = env.reset(seed=0)
for step in range(5):
    sample, timestep = observation["sample"], observation["timestep"]  # (64, 2), (64,)
    print(f"step {step}: time {timestep[0]:g}, standard deviation {sample.std():.2f}")
    action = 0.7 * sample + 0.1 * torch.randn(64, 2)  # your policy here
    observation, reward, terminated, truncated, _ = env.step(action)
print("mean reward:", reward.mean().item(), "all episodes over:", bool(terminated.all()))
