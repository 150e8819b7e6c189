"""A DDPM of diffusers as a denoiser, and a few-step sampler back as a pipeline of diffusers.

Needs `pip install -e ".[images]"`. Any unconditional DDPM will do, from a folder or from the hub.
"""

from diffusers import DDPMPipeline

import fewstep.agents.pretrained.scheduler  # so that diffusers knows our scheduler  # noqa: F401
from fewstep.agents import Denoiser, UNet2D
from fewstep.agents.solvers import make_solver
from fewstep.envs import DiscreteVP, Schedule

# Yours: Denoiser.from_pretrained("google/ddpm-cifar10-32", download=True)
Denoiser(UNet2D((1, 8, 8), preset="tiny"), DiscreteVP.linear(1000)).save_pretrained("ddpm")
denoiser = Denoiser.from_pretrained("ddpm")

tableau = make_solver("dpm-solver++-2m", Schedule.uniform(denoiser.process, 10, end=1))
denoiser.export_pipeline("ddpm-in-ten", tableau)  # or that of an agent: agent.tableau
pipeline = DDPMPipeline.from_pretrained("ddpm-in-ten")
print(pipeline(batch_size=4, num_inference_steps=10).images[0].size)
