"""Checkpoints and pipelines of other libraries: in, and out.

Importing this costs no diffusers: that loads when a function needs it. `TableauScheduler` is in
`fewstep.agents.pretrained.scheduler`, which a script imports before it opens an exported pipeline.
"""

from .diffusers import from_pretrained
from .edm import EDMBody, from_edm
from .grids import PlainGrid, plain_grid
from .pipelines import export_pipeline, pipeline_tableau, save_pretrained

__all__ = [
    "EDMBody",
    "PlainGrid",
    "export_pipeline",
    "from_edm",
    "from_pretrained",
    "pipeline_tableau",
    "plain_grid",
    "save_pretrained",
]
