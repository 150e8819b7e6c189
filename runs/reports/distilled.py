"""What `fewstep distil` shows: pictures side by side, errors by step, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .console import console
from .plots import logarithmic, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def side_by_side(pictures: Mapping[str, Tensor], titles: Sequence[str]) -> Figure:
    """Draw pictures (N, 3, H, W) in [0, 1], a row for each sampler, a column for each prompt."""
    figure, axes = new_figure(len(pictures), len(titles), size=2.2)
    for row, (name, its) in zip(axes, pictures.items(), strict=True):
        for axis, picture in zip(row, its, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title if len(title) <= 30 else f"{title[:28]} ...", fontsize=7)
    return figure


def errors_by_step(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draw for each sampler the squared error of its states to the fine solver's."""
    figure, axes = new_figure(1, 1, size=4.5)
    axis = axes[0, 0]
    for name, (_, errors) in curves.items():
        axis.plot(range(1, len(errors) + 1), errors, marker="o", markersize=4, label=name)
    logarithmic(axis)
    axis.set_xlabel("step")
    axis.set_ylabel("mean squared error to the fine solver")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return figure


def print_summary(title: str, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Print each sampler's evaluations and its errors."""
    table = Table(title=title, title_justify="left")
    for name in ("sampler", "evaluations", "squared error", "of the variance"):
        table.add_column(name, justify="left" if name == "sampler" else "right")
    for name, its in summary.items():
        relative = its["relative_error"]
        table.add_row(
            escape(name),
            str(its["evaluations"]),
            f"{its['error']:.3g} ± {its['standard_error']:.1g}",
            "-" if relative is None else f"{100 * relative:.3g} %",
        )
    console.print(table)
