"""Any pipeline of diffusers in, a learned scheduler out.

`open_pipeline` makes a denoiser of a pipeline's network, in its latents and under its prompts. All
solvers and agents take it as any other; what they learn is a table of numbers, which
`TableauScheduler` runs in the pipeline.
"""

from .families import FAMILIES, Family
from .open import OpenedPipeline, open_pipeline

__all__ = ["FAMILIES", "Family", "OpenedPipeline", "open_pipeline"]
