"""What a run of solver learning shows: the learned numbers beside the base solver's."""

from __future__ import annotations

from typing import Any

import torch

from ....envs.processes import NoiseProcess
from ...report import Panel, Report
from ...samplers.tableau import Tableau
from ..scheduling.levels import level_of_time


def report_of(
    process: NoiseProcess, before: Tableau, after: Tableau, sentence: str, results: dict[str, Any]
) -> Report:
    """Return the learned levels, factors and weights beside the base solver's.

    Args:
        process: the noise process.
        before: the base solver's table.
        after: the learned one.
        sentence: on what is returned.
        results: for results.json.
    """
    told, given = (
        level_of_time(process, torch.tensor(table.evaluation_times)).tolist()
        for table in (after, before)
    )
    calls = [str(j + 1) for j in range(after.steps)]
    rows = [[f"{weight:.3g}" for weight in row[: j + 1]] for j, row in enumerate(after.weights)]
    table = {
        "call": calls,
        "level before": given,
        "level": level_of_time(process, torch.tensor(after.times[:-1])).tolist(),
        "level told": told,
        "factor": after.scale.tolist(),
        "weights": [", ".join(row) for row in rows],
    }
    index = list(range(after.steps))
    levels = {"learned": (index, told), before.name: (index, given)}
    sums = {
        "learned": (index, after.weights.sum(1).tolist()),
        before.name: (index, before.weights.sum(1).tolist()),
    }
    history = {"loss": "train/loss", "loss on held-out noise": "train/held_out_loss"}
    panels = [
        Panel("noise level told in each call", "network call", levels, scale="log"),
        Panel("sum of weights", "network call", sums, scale="symlog"),
        Panel("loss", "round", logged=history, scale="log"),
    ]
    tables = {f"What was learned of {before.name}": table}
    return Report(sentence, results, tables, {"solver.png": panels})
