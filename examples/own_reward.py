"""A reward of your own: SFT-PG maximises any function of the finished samples.

The function takes a batch (N, *shape) and returns one number a sample, (N,). It needs no gradient.
SFT-PG learns a value baseline beside it. With nothing but such a reward the samples leave the data:
this one pulls them to the point (0.5, 0.5).
"""

import torch

from fewstep.agents import SFTPG, Denoiser
from fewstep.agents.denoisers.networks import MLP
from fewstep.envs import make_mdp


def reward(sample: torch.Tensor) -> torch.Tensor:
    """Return minus the squared distance from (0.5, 0.5)."""
    return -(sample - 0.5).square().sum(1)


mdp = make_mdp("SwissRoll", steps=5)
denoiser = Denoiser(MLP(shape=(2,), levels=5, input_gain=1), mdp.process)
agent = SFTPG(mdp, denoiser, critic=reward, batch_size=32)
print("mean of the samples before:", agent.sample(1000).mean(0))
agent.learn(200 * agent.timesteps_per_round)
print("mean of the samples after:", agent.sample(1000).mean(0))
