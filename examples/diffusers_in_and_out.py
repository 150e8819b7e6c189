"""A DDPM of diffusers as a denoiser, and a few-step sampler back as a pipeline of diffusers.

Needs `pip install -e ".[images]"`. Any unconditional DDPM will do, from a folder or from the hub.
"""

from diffusers import DDPMPipeline

import fewstep.agents.pretrained.scheduler  # so that diffusers knows our scheduler  # noqa: F401
from fewstep.agents import Denoiser, UNet2D
from fewstep.agents.pretrained import export_pipeline, from_pretrained, save_pretrained
from fewstep.agents.solvers import make_solver
from fewstep.envs import DiscreteVP, Schedule

# Yours: from_pretrained("google/ddpm-cifar10-32", download=True)
save_pretrained(Denoiser(UNet2D((1, 8, 8), preset="tiny"), DiscreteVP.linear(1000)), "ddpm")
denoiser = from_pretrained("ddpm")

tableau = make_solver("dpm-solver++-2m", Schedule.uniform(denoiser.process, 10, end=1))
export_pipeline(denoiser, "ddpm-in-ten", tableau)  # or that of an agent: agent.tableau
pipeline = DDPMPipeline.from_pretrained("ddpm-in-ten")
print(pipeline(batch_size=4, num_inference_steps=10).images[0].size)
