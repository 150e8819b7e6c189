"""A study's records as one table and one picture.

Records are grouped by their coordinates; a group's records differ in the seed. A score NAME may
have beside it "NAME before", of what the contender was given, and "NAME floor", of real samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..reports.plots import curve_figure, dots_figure

BEFORE, FLOOR, FACTOR = " before", " floor", "factor "
# Metrics that see what an eye sees: a table has them wherever its records do.
SEEING = ("c2st", "off_manifold")
COORDINATES = ["env", "solver", "contender", "calls"]
FORMATS = {"seconds": "{:.0f}", "training calls": "{:.2e}"}


def present(
    title: str,
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str] = (),
    yardstick: str | None = None,
) -> tuple[str, Figure]:
    """Return a study's table with notes, and its picture."""
    return report(title, records, columns, yardstick), figure(records, columns)


def report(
    title: str,
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str] = (),
    yardstick: str | None = None,
) -> str:
    """Return a study's title, table and notes in Markdown; for the arguments see `engine.Study`."""
    frame = pd.DataFrame(records)
    columns = with_seeing(frame, columns) if columns else all_columns(frame)
    seeds = frame["seed"].nunique()
    notes = [
        "Scores: before → after (floor), where there are such; mean ± standard deviation over "
        f"{seeds} seed{'s' if seeds > 1 else ''}. Factors: before / after. Seconds: of what was "
        "learned on top of the cloned denoiser."
    ]
    for column in columns:
        if column.startswith(FACTOR):
            worse = [rows for rows in groups(frame) if (_values(rows, column) <= 1).any()]
            notes.append(f"{column.capitalize()} not above 1 for every seed: {_listed(worse)}.")
    if "collapsed" in frame:
        fell = [rows for rows in groups(frame) if rows["collapsed"].eq(True).any()]
        notes.append(f"Stopped because the samples' variance fell, in a seed: {_listed(fell)}.")
    if yardstick is not None:
        metric = headline(columns)
        yard = frame[frame["contender"] == yardstick].set_index("seed")[metric]
        better = [r for r in groups(frame) if (r[metric] < r["seed"].map(yard)).all()]
        notes.append(f"Better than '{yardstick}' in {metric} for every seed: {_listed(better)}.")
    return "\n\n".join([f"**{title}**", markdown(summary(frame, columns)), *notes])


def summary(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return the table as strings, one row a group, with the solver only where it varies.

    Args:
        frame: the records.
        columns: names of scores; "factor NAME" is before / after; what is no number is counted.
    """
    shown = [name for name in COORDINATES if name != "solver" or frame[name].nunique() > 1]
    rows = [
        {name: str(rows[name].iloc[0]) for name in shown} | {c: _entry(rows, c) for c in columns}
        for rows in groups(frame)
    ]
    higher = {name for names in frame.get("higher_is_better", ()) for name in names}
    arrows = {c: f"{c} {'↑' if c in higher else '↓'}" for c in columns if c + FLOOR in frame}
    return pd.DataFrame(rows).rename(columns=arrows)


def groups(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Group records by all coordinates but the seed, in the order in which they come."""
    return [rows for _, rows in frame.groupby(COORDINATES, sort=False)]


def all_columns(frame: pd.DataFrame) -> list[str]:
    """Return all metrics that have a floor, and the seconds."""
    return [*(name.removesuffix(FLOOR) for name in frame if name.endswith(FLOOR)), "seconds"]


def with_seeing(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Return columns with the metrics of `SEEING` that the records have, before the seconds."""
    metrics = [name for name in all_columns(frame) if name.startswith(SEEING)]
    missing = [name for name in metrics if name not in columns]
    at = list(columns).index("seconds") if "seconds" in columns else len(columns)
    return [*columns[:at], *missing, *columns[at:]]


def headline(columns: Sequence[str]) -> str:
    """Return the column to judge by: a Frechet distance, if there is one."""
    return next((name for name in columns if name.startswith(("fid", "frechet"))), columns[0])


def markdown(frame: pd.DataFrame, index: str = "") -> str:
    """Return a table of strings in Markdown; with the index as a first column, if it is named."""
    if index:
        frame = frame.rename_axis(index).reset_index()
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values: pd.Series, form: str = "{:.2e}") -> str:
    """Format mean ± standard deviation; the mean alone where all agree, "-" where there is none."""
    known = values.dropna()
    if known.empty:
        return "-"
    mean = form.format(known.mean())
    return mean if known.nunique() == 1 else f"{mean} ± {form.format(known.std())}"


def figure(records: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> Figure:
    """Draw factors if the table has some, else learning curves if there are, else a score.

    A record's "curve" is [denoiser calls, live metric]; those of the first seed are drawn.
    """
    frame = pd.DataFrame(records)
    columns = columns or all_columns(frame)
    column = next((name for name in columns if name.startswith(FACTOR)), None)
    if column is None and "curve" in frame:
        learned = groups(frame[frame["curve"].notna()])
        curves = {", ".join(_names(rows)[1:]): rows["curve"].iloc[0] for rows in learned}
        floors = set(frame["sliced_wasserstein" + FLOOR])
        floor = floors.pop() if len(floors) == 1 else None
        return curve_figure(curves, x="denoiser calls", y="sliced 2-Wasserstein", floor=floor)
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for rows in groups(frame):
        env, *row, calls = _names(rows)
        panel = panels.setdefault(env, {}).setdefault(f"{calls} calls", {})
        panel[", ".join(row)] = float(_values(rows, column or headline(columns)).mean())
    if column is not None:
        meaning = f"{column.removeprefix(FACTOR)} before / after (right of the line is better)"
        return dots_figure(panels, meaning, line=1.0)
    meaning, floor = headline(columns), frame.get(headline(columns) + FLOOR)
    if floor is None:
        return dots_figure(panels, f"{meaning}\n(lower is better)")
    meaning += "\n(lower is better; dashed: real samples)"
    return dots_figure(panels, meaning, line=float(floor.iloc[0]))


def _entry(rows: pd.DataFrame, column: str) -> str:
    """Format one score of a group."""
    values = _values(rows, column).dropna()
    if values.empty:
        return "-"
    if not pd.api.types.is_numeric_dtype(values) or values.dtype == bool:
        return ", ".join(f"{value} x{count}" for value, count in Counter(values).items())
    if column.startswith(FACTOR):
        return spread(values, "{:.2f}")
    text = spread(values, FORMATS.get(column, "{:.2e}"))
    if column + BEFORE in rows and rows[column + BEFORE].notna().any():
        text = f"{spread(rows[column + BEFORE])} → {text}"
    return f"{text} ({spread(rows[column + FLOOR])})" if column + FLOOR in rows else text


def _values(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return a score of each record."""
    name = column.removeprefix(FACTOR)
    if name == column:
        return rows.get(column, pd.Series(dtype=float))
    return rows[name + BEFORE] / rows[name]


def _names(rows: pd.DataFrame) -> list[str]:
    """Return what a group is called: its coordinates, as far as they say something."""
    return [str(value) for value in rows.iloc[0][COORDINATES] if value != ""]


def _listed(some: Sequence[pd.DataFrame]) -> str:
    """Name groups in one line."""
    return "; ".join(", ".join(_names(rows)) for rows in some) or "none"
