"""`fewstep sample`: draw samples to a file, as an array or as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...agents.samplers.sampling import evaluations_of
from ...common.files import write_atomically
from ..reports.console import console
from ..reports.plots import pictured, samples_figure, save_figure
from ..run.folder import check_output
from ..settings.flags import parse_flags
from ..settings.pretrained import PretrainedSettings, finite_sampler, load


@dataclasses.dataclass(frozen=True)
class SampleSettings(PretrainedSettings):
    """Draw samples from a pretrained denoiser."""

    n: int = 1000
    """How many samples."""
    output: Path = Path("samples.npy")
    """File to write: .npy holds the array (n, *shape) float32, .png a picture."""


def main(argv: Sequence[str]) -> None:
    """Run `fewstep sample` with these flags."""
    settings = parse_flags(SampleSettings, argv, prog="fewstep sample")
    if settings.output.suffix not in (".npy", ".png"):
        raise ValueError(f"Cannot write {settings.output}: give a .npy or .png file.")
    if settings.n < 1:
        raise ValueError(f"n must be at least 1, got {settings.n}.")
    check_output(settings.output)
    mdp, denoiser, tableau = load(settings, needs_data=False)
    generator = torch.Generator(mdp.device).manual_seed(settings.seed)
    draw = finite_sampler(settings, mdp, denoiser, tableau)
    samples = draw(settings.n, generator).cpu()
    if settings.output.suffix == ".png":
        real = mdp.target.take(pictured(mdp.shape)).cpu()
        save_figure(samples_figure({tableau.name: samples}, real), settings.output)
    else:

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, samples.numpy())

        write_atomically(settings.output, write)
    calls = evaluations_of(tableau, denoiser)
    console.out(f"{settings.n} samples, {calls} network calls each: {settings.output}")
