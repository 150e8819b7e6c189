"""What a run takes over of an earlier one: the network, and its table or the table's times."""

from __future__ import annotations

from pathlib import Path

from ...agents import Tableau
from ..settings.train import TrainSettings, defaults
from .folder import tableau_file


def starting_table(run: TrainSettings, kept: Path | None = None) -> Tableau | None:
    """Return the finished table that a run starts from; None if it starts from none.

    Args:
        run: its settings.
        kept: the run's own copy, which wins: the earlier run may be gone by now.
    """
    if run.start_from is None or not _at_its_times(run):
        return None
    file = kept if kept is not None and kept.is_file() else tableau_file(run.start_from)
    return None if file is None else Tableau.load(file)


def _at_its_times(run: TrainSettings) -> bool:
    """Tell whether no other times are asked for."""
    usual = defaults(run.env, run.agent, run.preset).run
    return run.steps is None and run.schedule == usual.schedule
