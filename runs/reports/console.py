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

from ...agents.solver_learning.distillation.fit import StepFit

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


def print_fit(
    name: str, times: Sequence[float], fits: Sequence[StepFit], errors: Mapping[str, float]
) -> None:
    """Print what each step's D-ODE parameters did to the error against the teacher."""
    table = Table(title=f"What distillation did to {name}", title_justify="left")
    for column in ("call", "from", "to", "lambda", "squared error", "with lambda", "removed"):
        table.add_column(column, justify="right")
    for j, fit in enumerate(fits):
        lambdas = ", ".join(f"{value:.3f}" for value in fit.lambdas) or "-"
        table.add_row(
            str(j + 1),
            f"{times[j]:.4g}",
            f"{times[j + 1]:.4g}",
            lambdas,
            figure(fit.before),
            figure(fit.after),
            f"{100 * fit.removed:.1f} %",
        )
    console.print(table)
    _print_errors(errors)


def print_levels(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float],
    errors: Mapping[str, float],
) -> None:
    """Print a learned schedule beside the one before, and what learning did to the error."""
    table = Table(title="What schedule learning did", title_justify="left")
    for column in ("call", "level before", "level learned", "lambda"):
        table.add_column(column, justify="right")
    for j, (old, new) in enumerate(zip(before, after, strict=True)):
        weight = figure(weights[j]) if j < len(weights) else "-"
        table.add_row(str(j + 1), f"{old:.4g}", f"{new:.4g}", weight)
    console.print(table)
    _print_errors(errors)


def _print_errors(errors: Mapping[str, float]) -> None:
    """Print what an agent reports of finished samples, in the unit that all of them share."""
    finished = ", ".join(f"{key} {figure(value)}" for key, value in errors.items())
    console.print(f"Mean squared errors per coordinate, noise of their own: {finished}")
