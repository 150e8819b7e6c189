"""`fewstep export`: a denoiser and its sampler as a pipeline that diffusers opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ...agents.denoisers.networks import DiT
from ...agents.pretrained import export_pipeline
from ...envs.registration import resolve_environment
from ..reports.console import console
from ..run.folder import check_output_folder
from ..settings.flags import parse_flags
from ..settings.pretrained import PretrainedSettings, load, run_of


@dataclasses.dataclass(frozen=True)
class ExportSettings(PretrainedSettings):
    """Write a denoiser and its sampler as a diffusers pipeline."""

    output: Annotated[Path, tyro.conf.Positional] = Path("pipeline")
    """Folder to write."""


def main(argv: Sequence[str]) -> None:
    """Run `fewstep export` with these flags."""
    settings = parse_flags(ExportSettings, argv, prog="fewstep export")
    check_output_folder(settings.output, "a pipeline to")
    run = run_of(settings.denoiser) if settings.env is not None else None
    if run is not None and resolve_environment(str(settings.env)) != run.env:
        raise ValueError(f"{settings.denoiser} is a run in {run.env}: leave out --env.")
    _, denoiser, tableau = load(settings, needs_data=False, needs_conditions=False)
    export_pipeline(denoiser, settings.output, tableau)
    console.out(f"{tableau.name} in {tableau.nfe} network calls: {settings.output}")
    console.out("import fewstep.agents.pretrained.scheduler")
    folder, steps = str(settings.output), tableau.steps
    terms = denoiser.conditioning
    if denoiser.classes is None or terms is None:
        console.out(f"DDPMPipeline.from_pretrained({folder!r})(num_inference_steps={steps})")
    elif isinstance(denoiser.body, DiT):
        call = f"[0], guidance_scale={terms.guidance:g}, num_inference_steps={steps}"
        console.out(f"DiTPipeline.from_pretrained({folder!r}, vae=YOURS)({call})")
    else:
        console.out(f"pipeline = DDPMPipeline.from_pretrained({folder!r})")
        console.out("pipeline.unet and pipeline.scheduler sample classes: docs/conditions.md")
