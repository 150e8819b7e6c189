"""Quality against time: what a training has reached after so many seconds and network calls.

A training is scored now and then, on the way; seconds and calls are those of its rounds alone, not
of the scoring or of writing checkpoints. A chain's stages follow one another on one clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback

from ...agents.base import Agent
from ..reports.plots import Panels, timelines_figure
from ..run.folder import read_record, write_json
from .tables import COORDINATES, headline, markdown, with_seeing

Point = dict[str, float]

# The seconds after which a training is scored grow by this factor.
GROWTH, FIRST = 1.3, 0.3


class Timeline(BaseCallback):
    """Scores an agent on the way, before its first round and after its last.

    Seconds are of CPU time where the agent computes on a CPU, so that a busy machine counts as a
    quiet one, and else of wall time.

    Args:
        file: where the points are kept; `save` goes with each checkpoint.
        score: of the agent as it is.

    Attributes:
        points: what was scored, with "seconds" and "training calls".
        seconds: of all rounds.
    """

    model: Agent  # type: ignore[assignment]

    def __init__(self, file: Path, score: Callable[[Agent], dict[str, float]]) -> None:
        super().__init__()
        self.points: list[Point] = []
        self.seconds = 0.0
        self._file, self._score = file, score
        self._began = 0.0
        if file.is_file():
            kept = read_record(file, "points", "seconds")
            self.points, self.seconds = kept["points"], kept["seconds"]

    def save(self) -> None:
        """Write what there is."""
        write_json(self._file, {"points": self.points, "seconds": self.seconds})

    def _on_training_start(self) -> None:
        self.points = [p for p in self.points if p["training calls"] <= self.model.num_timesteps]
        if not self.points:
            self._note()

    def _on_rollout_start(self) -> None:
        self._began = self._now()

    def _on_step(self) -> bool:
        self.seconds += self._now() - self._began
        if self.seconds >= self.points[-1]["seconds"] * GROWTH + FIRST:
            self._note()
        return True

    def _on_training_end(self) -> None:
        if self.points[-1]["training calls"] < self.model.num_timesteps:
            self._note()

    def _now(self) -> float:
        return time.process_time() if self.model.device.type == "cpu" else time.monotonic()

    def _note(self) -> None:
        calls = {"seconds": self.seconds, "training calls": self.model.num_timesteps}
        self.points.append({**calls, **self._score(self.model)})


def joined(before: Sequence[Point], points: Sequence[Point]) -> list[Point]:
    """Return the points of a chain so far, and those of its next stage on the same clock."""
    if not before:
        return list(points)
    last, clock = before[-1], ("seconds", "training calls")
    later = [{**point, **{name: last[name] + point[name] for name in clock}} for point in points]
    # The first is the last of the stage before, with the next one's table.
    return [*before, *later]


def present(
    title: str,
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    yardstick: str | None = None,
) -> tuple[str, Figure]:
    """Return the table of when each contender is as good as the yardstick, and the curves.

    The yardstick is not trained; it is in the records with several numbers of calls, and the table
    has a column for each. For the arguments see `engine.Study`.
    """
    frame = pd.DataFrame(records)
    yard = frame[frame["contender"] == yardstick]
    trained = frame[(frame["contender"] != yardstick) & frame["timeline"].notna()]
    metric, rows = headline(columns), []
    for _, group in trained.groupby(COORDINATES, sort=False):
        row = {name: str(group[name].iloc[0]) for name in ("env", "contender", "calls")}
        shown = with_seeing(frame, columns)
        row |= {name: f"{group[name].median():.2e}" for name in shown if name in group}
        levels = yard[yard["env"] == row["env"]].groupby("calls")[metric].median()
        reached = {f"as {yardstick}-{calls}": level for calls, level in levels.items()}
        row |= {name: _first(group["timeline"], metric, level) for name, level in reached.items()}
        end = [points[-1] for points in group["timeline"]]
        row["all"] = _cost(end)
        rows.append(row)
    note = (
        "Seconds of training and network calls on single samples until a sampler is, in "
        f"{metric}, as good as {yardstick} with so many calls of the network as it was given; "
        f"medians of {frame['seed'].nunique()} seed(s), - where one never is."
    )
    table = markdown(pd.DataFrame(rows).fillna("-"))
    text = "\n\n".join([f"**{title}**", table, note])
    return text, timelines_figure(_panels(trained, yard, columns), "seconds of training")


def _panels(trained: pd.DataFrame, yard: pd.DataFrame, columns: Sequence[str]) -> Panels:
    """Return curves and levels by environment and score; of each contender its first seed's."""
    panels: Panels = {}
    for env, group in trained.groupby("env", sort=False):
        here = yard[yard["env"] == env]
        for column in columns:
            curves = {
                row["contender"]: ([p["seconds"] for p in points], [p[column] for p in points])
                for _, row in group.drop_duplicates("contender").iterrows()
                if (points := row["timeline"])
            }
            medians = here.groupby(["contender", "calls"])[column].median()
            levels = {f"{who}, {n} calls": float(level) for (who, n), level in medians.items()}
            panels[f"{env}", column] = curves, levels
    return panels


def _first(timelines: Sequence[Sequence[Point]], metric: str, level: float) -> str:
    """Return when a metric first was at most a level, in all seeds."""
    found = [next((p for p in points if p[metric] <= level), None) for points in timelines]
    known = [point for point in found if point is not None]
    return _cost(known) if len(known) == len(found) else "-"


def _cost(points: Sequence[Point]) -> str:
    frame = pd.DataFrame(points)
    calls = frame["training calls"].median()
    return f"{frame['seconds'].median():.3g} s, {calls:.1e}" if calls else "0"
