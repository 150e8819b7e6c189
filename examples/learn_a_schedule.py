"""Schedule learning: at which noise levels should a network be asked, if it may be asked six times?

The teacher is a fine solver with the same network, so no data is needed. Stage one moves the noise
levels, stage two tunes the network on them. Any solver, environment and agent takes the schedule
that results; here D-ODE distils a solver on it.
"""

from fewstep.agents import DODE, Denoiser, ScheduleLearning
from fewstep.agents.denoisers.networks import ResidualMLP
from fewstep.envs import VE, Schedule

process = VE(0.002, 80)  # EDM's noise levels; a DiscreteVP does as well
denoiser = Denoiser(ResidualMLP((1, 8, 8), time_range=(-1.6, 1.1)), process, "edm")  # yours here
start = Schedule.karras(process, 6)
few = {"schedule_rounds": 10, "tuning_rounds": 5, "batch_size": 20}  # leave out for the real thing
agent = ScheduleLearning.without_data(denoiser, start, (1, 8, 8), solver="euler", **few)
agent.learn()
agent.schedule.save("schedule.json")
print(agent.sample(4).shape, "at the levels", agent.levels.tolist())

schedule = Schedule.load("schedule.json")
distilled = DODE.without_data(agent.sampling_denoiser, schedule, (1, 8, 8), batch_size=20)
distilled.learn()
print("errors on held-out noise:", distilled.errors)
