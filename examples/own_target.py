"""A target of your own: samples that you have, or a function that draws them.

The target, a noise process and a schedule make an environment, in which every agent can train.
"""

import torch

from fewstep.agents import SFTPG, BehaviorCloning, Denoiser
from fewstep.agents.denoisers.networks import MLP
from fewstep.critics import evaluate
from fewstep.envs import DiffusionMDP, DiscreteVP, Schedule, Target

angle = 2 * torch.pi * torch.rand(5000, generator=torch.Generator().manual_seed(0))
helix = torch.stack([angle.cos(), angle.sin(), angle / 3 - 1], dim=1)  # (5000, 3)
target = Target.from_samples(helix, name="Helix")
process = DiscreteVP.linear(100)  # 100 noisings, of which the schedule visits ten
mdp = DiffusionMDP(target, process, Schedule.uniform(process, steps=10))

denoiser = Denoiser(MLP(shape=(3,), levels=100), process)
cloning = BehaviorCloning(mdp, denoiser, batch_size=256)
cloning.learn(1000 * cloning.timesteps_per_round)
cloning.save("helix.safetensors")  # the averaged weights
agent = SFTPG(mdp, Denoiser.load("helix.safetensors"), batch_size=64)
agent.learn(100 * agent.timesteps_per_round)
print(evaluate(agent, target, n=2000))
