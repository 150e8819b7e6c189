"""The flags of `fewstep distil`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...agents.pipelines.settings import DistilSettings
from ...common.settings import bounded


@dataclasses.dataclass(frozen=True)
class DistilFlags:
    """Learn a scheduler of few steps for a pipeline of diffusers, without any data."""

    pipeline: Annotated[str, tyro.conf.Positional]
    """A folder of diffusers, or a name on the hub such as
    stabilityai/stable-diffusion-xl-base-1.0."""
    prompts: Path | None = None
    """File of prompts to learn on, one a line; numbers of classes for a network of classes. If
    omitted the empty prompt, or class 0."""
    held_out: Path | None = None
    """File of prompts that results are measured on; if omitted a quarter of the others."""
    negative: str = ""
    """Prompt that guidance leads away from."""
    output: Path = Path("distilled")
    """Folder to write; what an interrupted run left there is gone on with."""
    dry_run: bool = False
    """Only say how many network calls it will take and, by one timed call, how long."""
    size: tuple[int, int] | None = None
    """Height and width of the pictures in pixels; those the network was made for if omitted."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type that the network runs in; that of its weights if omitted. Sums are float32."""
    variant: str | None = None
    """Which weights of the pipeline to read, such as fp16."""
    revision: str | None = None
    """Commit, branch or tag on the hub."""
    download: bool = False
    """Fetch what the local hub cache lacks."""
    checkpoint_seconds: float = bounded(60.0, least=0)
    """Seconds between two checkpoints; 0 writes one every round."""
    learning: Annotated[DistilSettings, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=DistilSettings
    )
