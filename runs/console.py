"""The screen: one console, and tables of results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


def print_results(results: Mapping[str, Any]) -> None:
    """Print a run's metrics: before, after, floor."""
    table = Table(
        title=f"{results['env']}, {results['agent']}, {results['nfe']} network calls a sample, "
        f"seed {results['seed']}, {results['seconds']:.0f} s",
        title_justify="left",
    )
    table.add_column("metric")
    for column in ("before", "after", "floor"):
        table.add_column(column, justify="right")
    for name, scores in results["metrics"].items():
        table.add_row(name, *(figure(scores.get(c)) for c in ("before", "after", "floor")))
    console.print(table)


def figure(value: float | None) -> str:
    """Format a score."""
    return "-" if value is None else f"{value:.2e}"
