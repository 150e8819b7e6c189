"""D-ODE: distil a many-step solver into a table of a few steps; the network stays as it is.

It needs noise and the network, but no data. The result is a table of numbers, a JSON file, that
samples with the same network.
"""

from fewstep.agents import DODE, Denoiser, SolverPolicy, Tableau
from fewstep.agents.denoisers.networks import SmallUNet
from fewstep.envs import DiscreteVP, Schedule

process = DiscreteVP.linear(1000)  # the noise process that the network was trained with
denoiser = Denoiser(SmallUNet((1, 8, 8)), process, prediction="epsilon")  # yours here
schedule = Schedule.trailing(process, 6)
few = {"batch_size": 20, "batches": 1}  # leave out for the real thing
agent = DODE.without_data(denoiser, schedule, (1, 8, 8), solver="ddim", **few)
agent.learn()
print("errors on held-out noise:", agent.errors, "returned:", agent.returned)
agent.save("six_steps.json")

policy = SolverPolicy(Tableau.load("six_steps.json"), denoiser)
print(policy.sample(4, shape=(1, 8, 8)).shape, "in", policy.nfe, "network calls")
