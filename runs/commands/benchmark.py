"""`fewstep benchmark NAME`: run a declared study, or measure speed and memory.

Finished cells are kept, so a study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from ...agents.checks import at_least
from ...envs.files import write_atomically
from ...envs.names import unknown_name
from ..console import console, print_report
from ..folder import write_json
from ..settings import check_seed
from ..speed import MEASUREMENTS
from ..studies import STUDIES
from ..studies.engine import Options, run_study
from ..threads import threads


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Options):
    """Run a declared study, or go on with it: finished cells are kept."""

    study: Annotated[str, tyro.conf.Positional]
    """Which study: see `fewstep benchmark list`."""
    log_dir: Path = Path("logs")
    """The study's folder is LOG_DIR/benchmark/STUDY."""
    workers: int = 1
    """Processes that share a study's cells, at least 1."""


def main(argv: Sequence[str]) -> None:
    """Run `fewstep benchmark` with these flags."""
    settings = tyro.cli(BenchmarkSettings, args=list(argv), prog="fewstep benchmark")
    titles = {name: study.title for name, study in STUDIES.items()}
    titles |= {name: measurement.title for name, measurement in MEASUREMENTS.items()}
    if settings.study == "list":
        listing = Table.grid(padding=(0, 2))
        listing.add_column(no_wrap=True)
        for row in titles.items():
            listing.add_row(*row)
        console.print(listing)
        return
    if settings.study not in titles:
        raise unknown_name("study", settings.study, titles)
    _check_numbers(settings)
    folder = settings.log_dir / "benchmark" / settings.study
    if settings.study in STUDIES:
        text = run_study(STUDIES[settings.study], settings, folder, settings.workers)
    else:
        with threads(settings.threads):
            figures, text = MEASUREMENTS[settings.study].measure(settings.device)
        write_json(folder / "results.json", figures)
        write_atomically(folder / "table.md", lambda file: file.write_text(text + "\n"))
    print_report(text)
    console.out(f"Results: {folder}")


def _check_numbers(settings: BenchmarkSettings) -> None:
    """Raise ValueError for a number that no cell can do anything with."""
    at_least(
        1,
        **{
            "--threads": settings.threads,
            "--rounds": settings.rounds,
            "--workers": settings.workers,
        },
    )
    at_least(2, **{"--evaluation-samples": settings.evaluation_samples})
    for steps in settings.steps or ():
        at_least(1, **{"--steps": steps})
    for seed in settings.seeds or ():
        check_seed(seed, "--seeds")
