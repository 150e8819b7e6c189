"""Shortcut fine-tuning, `fewstep train --agent sft-pg`, from Python.

A small network is cloned from data as a DDPM with ten noisings. SFT-PG then fine-tunes its ten-step
sampler against a learned critic. Both take the settings of the command line; the whole takes about
three minutes on one CPU core.
"""

from fewstep.agents import SFTPG, BehaviorCloning, Denoiser
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.critics import evaluate
from fewstep.envs import make_mdp

mdp = make_mdp("SwissRoll", steps=10)
cloning = BehaviorCloning.for_environment(mdp, new_denoiser(mdp, seed=0))
cloning.learn()
cloning.save("denoiser.safetensors")  # the averaged weights
print("before", evaluate(cloning, mdp.target, n=20_000), sep="\n")

agent = SFTPG.for_environment(mdp, Denoiser.load("denoiser.safetensors"))
agent.learn()
agent.save("agent.safetensors")
print("after", evaluate(agent, mdp.target, n=20_000), sep="\n")
print(agent.sample(1000).shape, "in", agent.nfe, "network calls")
