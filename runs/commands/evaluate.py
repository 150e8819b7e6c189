"""`fewstep evaluate`: score a denoiser with any solver and number of steps, beside the floors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ...agents.samplers.sampling import evaluations_of
from ...common.arguments import at_least
from ...critics.metrics.report import evaluate
from ..reports.console import console, print_results
from ..reports.features import features_for, real_distances
from ..run.folder import check_output, write_json
from ..settings.flags import parse_flags
from ..settings.pretrained import PretrainedSettings, finite_sampler, load


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(PretrainedSettings):
    """Score a pretrained denoiser against fresh real samples."""

    evaluation_samples: Annotated[int, tyro.conf.arg(aliases=["--samples"])] = 200_000
    """Most samples of each metric, at least 2; of images never more than 10,000."""
    inception_weights: Path | None = None
    """torch-fidelity's file of Inception weights, for FID on images of 32 pixels or more; if
    omitted where torch-fidelity keeps it, else a feature extractor of ours, which results name."""
    output: Path | None = None
    """Write the scores to this JSON file, too."""


def main(argv: Sequence[str]) -> None:
    """Run `fewstep evaluate` with these flags."""
    settings = parse_flags(EvaluateSettings, argv, prog="fewstep evaluate")
    at_least(2, **{"--evaluation-samples": settings.evaluation_samples})
    if settings.output is not None:
        check_output(settings.output)
    began = time.monotonic()
    mdp, denoiser, tableau = load(settings)
    features = features_for(
        mdp.target, inception_weights=settings.inception_weights, data_dir=settings.data_dir
    )
    report = evaluate(
        finite_sampler(settings, mdp, denoiser, tableau),
        mdp.target,
        settings.evaluation_samples,
        features=features,
        seed=settings.seed,
        nfe=evaluations_of(tableau, denoiser),
        distances=real_distances,
        conditional=mdp.conditional,
    )
    results = {
        "env": mdp.target.name,
        "agent": tableau.name,
        "nfe": report.nfe,
        "seed": settings.seed,
        "seconds": time.monotonic() - began,
        "metrics": {
            name: {"before": None, "after": score.value, "floor": score.floor}
            for name, score in report.items()
        },
    }
    print_results(results)
    if settings.output is not None:
        write_json(settings.output, results)
        console.out(f"Written to {settings.output}")
