"""The screen: one console, and tables of results.

Lines that hold a path or a command go through `console.out`, which breaks and interprets nothing,
so that they can be copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False)


def print_results(results: Mapping[str, Any]) -> None:
    """Print a run's metrics: before, after, floor; or score, floor if there was nothing before."""
    table = Table(
        title=f"{results['env']}, {results['agent']}, {results['nfe']} network calls a sample, "
        f"seed {results['seed']}, {results['seconds']:.0f} s",
        title_justify="left",
    )
    titles = {"before": "before", "after": "after", "floor": "floor"}
    metrics = results["metrics"]
    if all(scores["before"] is None for scores in metrics.values()):
        titles = {"after": "score", "floor": "floor"}
    table.add_column("metric", overflow="fold")
    for title in titles.values():
        table.add_column(title, justify="right")
    for name, scores in metrics.items():
        table.add_row(escape(name), *(figure(scores[column]) for column in titles))
    console.print(table)


def print_report(text: str) -> None:
    """Print Markdown; where a table's words do not fit they go on in the next line, uncut."""
    console.print(_Report(text))


class _FoldingTable(TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _Report(Markdown):
    elements: ClassVar = {**Markdown.elements, "table_open": _FoldingTable}


def figure(value: float | None) -> str:
    """Format a score."""
    return "-" if value is None else f"{value:.2e}"


def print_table(title: str, columns: Mapping[str, Sequence[float | str]]) -> None:
    """Print a table of columns of equal length, numbers with four digits."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row))
    console.print(table)
