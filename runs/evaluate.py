"""`fewstep evaluate`: score a denoiser with any solver and number of steps, beside the floors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from ..agents.sampling import sampler_of
from .console import console, print_results
from .evaluation import Evaluation, combine
from .features import features_for
from .folder import write_json
from .pretrained import PretrainedSettings, load


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(PretrainedSettings):
    """Score a pretrained denoiser against fresh real samples."""

    samples: int = 200_000
    """Samples of the metrics against fresh data; of images at most 10,000."""
    inception_weights: Path | None = None
    """torch-fidelity's file of Inception weights, for FID on images of 32 pixels or more; if
    omitted where torch-fidelity keeps it, else a feature extractor of ours, which results name."""
    output: Path | None = None
    """Write the scores to this JSON file, too."""


def main(argv: Sequence[str]) -> None:
    """Run `fewstep evaluate` with these flags."""
    settings = tyro.cli(EvaluateSettings, args=list(argv), prog="fewstep evaluate")
    began = time.monotonic()
    mdp, denoiser, tableau = load(settings)
    features = features_for(
        mdp.target, inception_weights=settings.inception_weights, data_dir=settings.data_dir
    )
    evaluation = Evaluation(mdp.target, settings.samples, features)
    scores = evaluation(sampler_of(tableau, denoiser, mdp.shape), settings.seed)
    results = {
        "env": mdp.target.name,
        "agent": tableau.name,
        "nfe": tableau.nfe,
        "seed": settings.seed,
        "seconds": time.monotonic() - began,
        "metrics": combine(evaluation.floors, None, scores),
    }
    print_results(results)
    if settings.output is not None:
        write_json(settings.output, results)
        console.print(f"Written to {settings.output}")
