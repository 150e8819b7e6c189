"""Report: what a run shows of an agent's learning, as plain data that any screen can draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what is drawn.
        x: label of the horizontal axis.
        curves: label -> x and y of the points of a line.
        logged: label -> name of a metric in the run's log, to be drawn over the rounds; those that
            the log lacks are left out.
        scale: of the vertical axis, a name of matplotlib's.
    """

    title: str
    x: str
    curves: Mapping[str, Curve] = field(default_factory=dict)
    logged: Mapping[str, str] = field(default_factory=dict)
    scale: str = "linear"


@dataclass(frozen=True)
class Report:
    """What an agent learned beside the weights of its network; nothing by default.

    Attributes:
        sentence: what is returned, and why.
        results: JSON values for the run's results, by name.
        tables: title -> column -> cells, numbers or texts, as many in each column.
        figures: name of a picture -> its panels.
    """

    sentence: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Sequence[float | str]]] = field(default_factory=dict)
    figures: Mapping[str, Sequence[Panel]] = field(default_factory=dict)
