"""What a run shows and writes of an agent: its report, its files, and scores before and after."""

from __future__ import annotations

from collections.abc import Mapping

from ...agents.base import Agent
from ...agents.report import Report
from ..run.folder import RunFolder
from ..run.logs import read_metric
from .console import console, print_table
from .plots import panels_figure, save_figure


def show_report(report: Report, folder: RunFolder) -> None:
    """Print an agent's tables and its sentence, draw its figures, and add to results.json."""
    print_report_tables(report)
    for name, panels in report.figures.items():
        drawn = []
        for panel in panels:
            logged = {
                label: read_metric(folder.path / "progress.csv", column, "time/iterations")
                for label, column in panel.logged.items()
            }
            curves = {label: curve for label, curve in logged.items() if curve is not None}
            if panel.curves or curves:
                drawn.append((panel, {**panel.curves, **curves}))
        save_figure(panels_figure(drawn), folder.path / name)
    if report.results:
        folder.update_results(**report.results)


def print_report_tables(report: Report) -> None:
    """Print an agent's tables, its errors and its sentence; nothing where it reports nothing."""
    for title, columns in report.tables.items():
        print_table(title, columns)
    if errors := report.results.get("errors"):
        finished = ", ".join(f"{key} {value:.2e}" for key, value in errors.items())
        console.print(f"Errors on noise or samples of their own: {finished}")
    if report.sentence:
        console.print(report.sentence)


def save_files(agent: Agent, folder: RunFolder) -> None:
    """Write what goes with an agent's checkpoint, so that every command finds its sampler."""
    for name, value in agent.files().items():
        # A table of a thousand steps is large: written at every checkpoint only if it is learned.
        if agent.learns_tableau or not (folder.path / name).is_file():
            value.save(folder.path / name)


def combine(
    floors: Mapping[str, float],
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
) -> dict[str, dict[str, float | None]]:
    """Arrange scores as results.json holds them: metric -> before, after, floor."""
    return {
        name: {
            "before": before[name] if before else None,
            "after": after[name] if after else None,
            "floor": floor,
        }
        for name, floor in floors.items()
    }
