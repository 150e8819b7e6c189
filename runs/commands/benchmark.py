"""`fewstep benchmark NAME`: run a declared study, or measure speed and memory.

Finished cells are kept, so a study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ...common.arguments import at_least
from ...common.files import write_atomically
from ...common.names import unknown_name
from ..reports.console import console, print_report
from ..run.folder import check_output_folder, write_json
from ..run.threads import threads
from ..settings.benchmark import BenchmarkSettings
from ..settings.flags import parse_flags
from ..settings.train import check_seed
from ..speed import MEASUREMENTS
from ..studies import STUDIES
from ..studies.engine import run_study


def main(argv: Sequence[str]) -> None:
    """Run `fewstep benchmark` with these flags."""
    settings = parse_flags(BenchmarkSettings, argv, prog="fewstep benchmark")
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
    check_output_folder(settings.folder, "the log folder")
    if settings.study in STUDIES:
        try:
            text = run_study(STUDIES[settings.study], settings)
        except KeyboardInterrupt:
            console.out("\nFinished cells are kept: the same command goes on.")
            raise
    else:
        with threads(settings.threads):
            figures, text = MEASUREMENTS[settings.study].measure(settings.device)
        write_json(settings.folder / "results.json", figures)
        table = settings.folder / "table.md"
        write_atomically(table, lambda file: file.write_text(text + "\n"))
    print_report(text)
    console.out(f"Results: {settings.folder}")


def _check_numbers(settings: BenchmarkSettings) -> None:
    """Raise ValueError for a number that no cell can do anything with."""
    for name in ("threads", "rounds", "workers", "image_size"):
        at_least(1, **{f"--{name.replace('_', '-')}": getattr(settings, name)})
    at_least(2, **{"--evaluation-samples": settings.evaluation_samples})
    for name in ("seeds", "steps"):
        if getattr(settings, name) == ():
            raise ValueError(f"--{name} needs whole numbers.")
    for steps in settings.steps or ():
        at_least(1, **{"--steps": steps})
    for seed in settings.seeds or ():
        check_seed(seed, "--seeds")
