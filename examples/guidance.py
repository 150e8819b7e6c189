"""Classes and guidance: a conditional network of the digits, asked for threes in five calls.

With guidance a call costs two network evaluations. The nearest class mean of the data stands in for
a classifier: how often is what was drawn nearest to the mean three?
"""

import torch

from fewstep.agents import BehaviorCloning
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.samplers.sampling import evaluations_of, sample
from fewstep.agents.solvers import solver_within
from fewstep.envs import make_mdp

mdp = make_mdp("Digits", conditional=True)
cloning = BehaviorCloning.for_environment(mdp, new_denoiser(mdp))
cloning.learn(600 * cloning.timesteps_per_round)

denoiser = cloning.sampling_denoiser
table = solver_within("unipc-2", 5, denoiser=denoiser)
real, labels = mdp.target.samples, mdp.target.labels
means = torch.stack([real[labels == label].mean(0) for label in range(10)]).flatten(1)
for guidance in (1.0, 2.0, 4.0):
    threes = denoiser.given(3, guidance)
    with torch.no_grad():
        drawn = sample(table, threes, 200, shape=tuple(mdp.shape))
    found = (torch.cdist(drawn.flatten(1), means).argmin(1) == 3).float().mean()
    cost = evaluations_of(table, threes)
    print(f"guidance {guidance:g}: {cost} evaluations, nearest to a three in {float(found):.0%}")
