"""An environment whose transition is another: the upper half of every picture is known.

After each step the known pixels are put back, noised as far as the state is; SFT-PG learns a
sampler that fills in the rest in five calls. `known=` fills in pictures of your own.
"""

from fewstep.agents import SFTPG, BehaviorCloning
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.envs import make_mdp

mdp = make_mdp("Digits", steps=5, inpaint="half")
denoiser = new_denoiser(mdp, seed=0)
cloning = BehaviorCloning(mdp, denoiser, batch_size=128, learning_rate=2e-3)
cloning.learn(500 * cloning.timesteps_per_round)

agent = SFTPG(mdp, denoiser, batch_size=64, learning_rate=3e-5, log_density="mean", noise_power=1.0)
agent.learn(20 * agent.timesteps_per_round)

pictures = mdp.target.sample_fresh(4)
filled = agent.sample(4, known=pictures)
print("known pixels kept:", bool((filled == pictures)[..., :4, :].all()))
print("mean error of the others:", float((filled - pictures)[..., 4:, :].abs().mean()))
