"""A study's records as one table and one picture.

Records are grouped by their coordinates; what is left of a group are its seeds. A score NAME may
have beside it "NAME before", of what the contender was given, and "NAME floor", of real samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..plots import curve_figure, dots_figure

BEFORE, FLOOR, FACTOR = " before", " floor", "factor "
# What tells records apart beside the seed; those with one value all over are left out of a table.
COORDINATES = ("env", "process", "solver", "contender", "calls")
ALWAYS = ("env", "contender", "calls")


def report(
    title: str,
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str] = (),
    yardstick: str | None = None,
) -> str:
    """Return a study's title, table and notes in Markdown.

    Args:
        title: of the study.
        records: of its finished cells.
        columns: see `summary`.
        yardstick: label of the contender that the others are to beat, if there is one.
    """
    frame = pd.DataFrame(records)
    columns = columns or default_columns(frame)
    notes = [
        "Scores: before → after (floor), where there are such; mean ± standard deviation over "
        f"{frame['seed'].nunique()} seeds. A factor is before / after. Seconds: of what was learned "
        "on top of the cloned denoiser."
    ]
    for column in columns:
        if column.startswith(FACTOR):
            names = _where(frame, lambda rows, name=column: (_values(rows, name) <= 1).any())
            notes.append(f"{column.capitalize()} not above 1 for every seed: {names}.")
    if "collapsed" in frame:
        names = _where(frame, lambda rows: (rows["collapsed"] == True).any())  # noqa: E712 - NaN
        notes.append(f"Stopped because the samples' variance fell, for some seed: {names}.")
    if yardstick is not None:
        notes.append(_better_than(frame, yardstick, headline(columns)))
    return "\n\n".join([f"**{title}**", markdown(summary(frame, columns)), *notes])


def summary(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return the table, one row a group of records that differ in the seed only.

    Args:
        frame: the records.
        columns: names of scores; "factor NAME" is NAME before / after; anything that is not a
            number is counted.
    """
    shown = [c for c in coordinates(frame) if c in ALWAYS or frame[c].nunique() > 1]
    rows = []
    for _, group in groups(frame):
        first = group.iloc[0]
        rows.append({c: str(first[c]) for c in shown} | {c: _entry(group, c) for c in columns})
    higher = {name for names in frame.get("higher_is_better", ()) for name in names}
    arrows = {c: f"{c} {'↑' if c in higher else '↓'}" for c in columns if c + FLOOR in frame}
    return pd.DataFrame(rows).rename(columns=arrows)


def groups(frame: pd.DataFrame) -> Any:
    """Group records by all coordinates but the seed, in the order in which they come."""
    return frame.groupby(coordinates(frame), sort=False, dropna=False)


def coordinates(frame: pd.DataFrame) -> list[str]:
    """Return the coordinates that records have, but for the seed."""
    return [name for name in COORDINATES if name in frame]


def default_columns(frame: pd.DataFrame) -> tuple[str, ...]:
    """Return all metrics that have a floor, and the seconds."""
    metrics = [name.removesuffix(FLOOR) for name in frame if name.endswith(FLOOR)]
    return (*metrics, "seconds")


def headline(columns: Sequence[str]) -> str:
    """Return the column to judge by: a Frechet distance, if there is one."""
    frechet = [name for name in columns if name.startswith(("fid", "frechet"))]
    return (frechet or list(columns))[0]


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
    """Draw a study: factors if its table has some, else learning curves, else the first score.

    A learning curve is the record's "curve", [calls, values of the live metric], of the first seed.
    """
    frame = pd.DataFrame(records)
    columns = columns or default_columns(frame)
    factors = [column for column in columns if column.startswith(FACTOR)]
    if not factors and "curve" in frame and frame["curve"].notna().any():
        return _curves(frame[frame["curve"].notna()])
    column = factors[0] if factors else headline(columns)
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for _, group in groups(frame):
        first = group.iloc[0]
        row = " ".join(str(first[c]) for c in ("solver", "contender") if first.get(c))
        panel = panels.setdefault(str(first["env"]), {})
        panel.setdefault(f"{first['calls']} calls", {})[row] = float(_values(group, column).mean())
    if factors:
        name = column.removeprefix(FACTOR)
        return dots_figure(panels, f"{name} before / after (right of the line is better)", line=1.0)
    floor = float(frame[column + FLOOR].iloc[0])
    return dots_figure(panels, f"{column}\n(lower is better; dashed: real samples)", line=floor)


def _curves(frame: pd.DataFrame) -> Figure:
    curves, several = {}, frame["calls"].nunique() > 1
    for _, group in groups(frame):
        first = group.iloc[0]
        name = f"{first['contender']}, {first['calls']} calls" if several else first["contender"]
        curves[name] = first["curve"]
    floors = frame["sliced_wasserstein" + FLOOR].unique()
    return curve_figure(
        curves,
        x="denoiser calls",
        y="sliced 2-Wasserstein",
        floor=float(floors[0]) if len(floors) == 1 else None,
    )


def _entry(group: pd.DataFrame, column: str) -> str:
    """Format one score of a group."""
    values = _values(group, column)
    if values.dropna().empty:
        return "-"
    if not pd.api.types.is_numeric_dtype(values) or values.dtype == bool:
        return ", ".join(f"{value} x{n}" for value, n in Counter(values.dropna()).items())
    if column.startswith(FACTOR) or column == "seconds":
        return spread(values, "{:.2f}" if column.startswith(FACTOR) else "{:.0f}")
    text = spread(values)
    if column + BEFORE in group and group[column + BEFORE].notna().any():
        text = f"{spread(group[column + BEFORE])} → {text}"
    return f"{text} ({spread(group[column + FLOOR])})" if column + FLOOR in group else text


def _values(group: pd.DataFrame, column: str) -> pd.Series:
    name = column.removeprefix(FACTOR)
    if name == column:
        return group[column] if column in group else pd.Series(dtype=float)
    return group[name + BEFORE] / group[name]


def _where(frame: pd.DataFrame, holds: Any) -> str:
    """Name the groups that something holds for."""
    names = [
        ", ".join(str(rows.iloc[0][c]) for c in coordinates(frame) if c != "process")
        for _, rows in groups(frame)
        if holds(rows)
    ]
    return "; ".join(names) or "none"


def _better_than(frame: pd.DataFrame, yardstick: str, metric: str) -> str:
    """Name the groups whose metric is below the yardstick's for every seed."""
    yard = frame[frame["contender"] == yardstick].set_index("seed")[metric]
    names = _where(frame, lambda rows: (rows[metric] < rows["seed"].map(yard).fillna(0.0)).all())
    return f"Better than '{yardstick}' in {metric} for every seed: {names}."
