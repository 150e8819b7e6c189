"""The pictures of a run: samples, trajectories, curves. Figures without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...agents.report import Curve, Panel
from ...common.files import write_atomically
from ...common.shapes import is_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from ...envs import DiffusionMDP

# Curves of no more points than this show each: a single point is invisible as a line.
FEW = 30

# Samples in a scatter: enough to show a density, few enough to draw; and images in a grid.
PICTURED, GRID = 4000, 64

DPI = 110

REAL, FAKE, PATH = "#9aa0a6", "#1a73e8", "#d93025"


def pictured(shape: Sequence[int]) -> int:
    """Return how many samples of this shape a picture shows."""
    return GRID if is_image(shape) else PICTURED


def conditions_shown(mdp: DiffusionMDP, count: int) -> dict[str, Tensor]:
    """Return the condition of `count` samples for a picture, an option of `Actor.sample`.

    It is each class in turn, or the captions or embeddings of the training samples that stand
    beside; without conditions there is none.
    """
    if mdp.kind is None:
        return {}
    each = torch.arange(count, device=mdp.device)
    if mdp.classes is not None:
        return {"condition": each % mdp.classes}
    known = mdp.target.known(mdp.kind).training
    return {"condition": known[each % len(known)]}


def new_figure(rows: int, columns: int, size: float = 3.2) -> tuple[Figure, np.ndarray]:
    """Return a figure and its (rows, columns) array of axes."""
    figure = empty_figure(size * columns, size * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def samples_figure(panels: Mapping[str, Tensor], real: Tensor) -> Figure:
    """Draw one panel a set of samples (N, *shape), all with the same limits."""
    figure, axes = new_figure(1, len(panels))
    for axis, (title, samples) in zip(axes[0], panels.items(), strict=True):
        draw_samples(axis, samples, real)
        axis.set_title(title)
    return figure


def trajectories_figure(rows: Mapping[str, tuple[Tensor, Sequence[float]]], real: Tensor) -> Figure:
    """Draw the chain of samples, one row a sampler, one column a step (six at most).

    Args:
        rows: title -> trajectory (K + 1, N, *shape), the noisiest state first, and the K + 1 times
            of its states.
        real: real samples (M, *shape), drawn faintly behind.
    """
    last = min(len(times) for _, times in rows.values()) - 1
    steps = sorted({round(last * i / 5) for i in range(6)})
    image = is_image(real.shape[1:])
    figure, axes = new_figure(len(rows), len(steps), size=2.2)
    for axes_row, (title, (trajectory, times)) in zip(axes, rows.items(), strict=True):
        for axis, step in zip(axes_row, steps, strict=True):
            if image:
                draw_samples(axis, trajectory[step][:16], real)
            else:
                draw_samples(axis, trajectory[step][:2000], real, limits=2.0)
                paths = trajectory[: step + 1, :24].cpu().numpy()
                axis.plot(paths[..., 0], paths[..., 1], color=PATH, linewidth=0.5, alpha=0.7)
            axis.set_title(f"{title}, t = {times[step]:.4g}", fontsize=8)
    return figure


def logarithmic(axis: Axes) -> None:
    """Make the y axis of an axis with its curves logarithmic, if a number on it is positive."""
    if any(np.nanmax(line.get_ydata(orig=False), initial=0) > 0 for line in axis.lines):
        axis.set_yscale("log")


def curve_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    floor: float | None = None,
) -> Figure:
    """Draw named curves (x values, y values), a metric on a logarithmic axis, with its floor."""
    figure, axes = new_figure(1, 1, size=4.5)
    axis = axes[0, 0]
    for label, (steps, values) in curves.items():
        axis.plot(steps, values, label=label, linewidth=1.5, marker=marker(values), markersize=4)
    if floor is not None:
        axis.axhline(floor, color=REAL, linestyle="--", linewidth=1, label="floor")
    logarithmic(axis)
    axis.ticklabel_format(axis="x", scilimits=(-3, 4))
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return figure


# Title and meaning of y -> curves by label, and levels to reach by label.
Panels = dict[tuple[str, str], tuple[dict[str, Any], dict[str, float]]]


def timelines_figure(panels: Panels, x: str) -> Figure:
    """Draw metrics against seconds, on logarithmic axes; seconds below 1 on a plain one."""
    figure, axes = new_figure(1, len(panels), size=5.0)
    for axis, ((title, y), (curves, levels)) in zip(axes[0], panels.items(), strict=True):
        for number, (label, (seconds, values)) in enumerate(curves.items()):
            style = ("-", "--", ":")[number // 10 % 3]
            # What begins alike lies on the same line: the shorter chain's shows.
            look = {"marker": ".", "markersize": 4, "linewidth": 1.2, "zorder": 3 - number / 100}
            axis.plot(seconds, values, style, label=label, **look)
        for label, level in levels.items():
            axis.axhline(level, color=REAL, linestyle="--", linewidth=0.8)
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axis.annotate(label, (0.99, level), fontsize=7, color=REAL, **place)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=0)
        logarithmic(axis)
        axis.set_title(title)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3, which="both")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    return figure


def panels_figure(panels: Sequence[tuple[Panel, Mapping[str, Curve]]]) -> Figure:
    """Draw an agent's panels beside each other, each with its curves by label."""
    figure, axes = new_figure(1, max(len(panels), 1), size=4.2)
    for axis, (panel, curves) in zip(axes[0], panels, strict=False):
        for name, (x, y) in curves.items():
            axis.plot(x, y, marker=marker(y), markersize=4, label=name)
        axis.set_title(panel.title)
        axis.set_xlabel(panel.x)
        axis.xaxis.set_major_locator(whole_numbers())
        if panel.scale == "symlog":
            axis.axhline(0, color=REAL, linestyle="--", linewidth=1)
            # Small numbers are read best on a plain axis.
            if max((abs(value) for _, y in curves.values() for value in y), default=0.0) > 5:
                axis.set_yscale("symlog", linthresh=2)
        elif panel.scale == "log":
            logarithmic(axis)
        else:
            axis.set_yscale(panel.scale)
        axis.grid(alpha=0.3)
        if len(curves) > 5:  # they would hide the curves
            figure.legend(fontsize=8, loc="outside right upper")
        elif len(curves) > 1:
            axis.legend(fontsize=8)
    return figure


def correlation_figure(times: np.ndarray, similarity: Mapping[str, np.ndarray]) -> Figure:
    """Draw how alike a network's outputs are at different times (Kim et al. 2024, Fig. 2).

    Args:
        times: (M + 1,) the first M belong to the rows and columns.
        similarity: output -> mean cosine similarity (M, M).
    """
    figure, axes = new_figure(1, len(similarity), size=4.2)
    count = len(times) - 1
    ticks = np.unique(np.linspace(0, count - 1, 6).round().astype(int))
    labels = [f"{times[tick]:.4g}" for tick in ticks]
    for axis, (output, matrix) in zip(axes[0], similarity.items(), strict=True):
        picture = axis.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", origin="lower")
        axis.set_title({"epsilon": "predicted noise", "sample": "predicted sample"}[output])
        axis.set_xticks(ticks, labels)
        axis.set_yticks(ticks, labels)
        axis.set_xlabel("time")
    axes[0, 0].set_ylabel("time")
    figure.colorbar(picture, ax=list(axes[0]), label="cosine similarity")
    return figure


def paths_figure(
    paths: Mapping[str, tuple[np.ndarray, Tensor]], coordinates: Sequence[int]
) -> Figure:
    """Draw the mean norm of the states and coordinates of one sample (Kim et al. 2024, Fig. 5).

    Args:
        paths: name -> times (M,) and states (M, N, *shape); the first is the reference.
        coordinates: which of the flattened first sample's to draw.
    """
    figure, axes = new_figure(1, 1 + len(coordinates), size=4.0)
    for name, (times, states) in paths.items():
        flat = states.flatten(2).cpu()
        style = {"color": REAL, "linewidth": 3} if name == "reference" else {"marker": "o"}
        curves = [flat.norm(dim=2).mean(1), *(flat[:, 0, index] for index in coordinates)]
        for axis, curve in zip(axes[0], curves, strict=True):
            axis.plot(times, curve, label=name, markersize=3, **style)
    titles = ["mean norm of the state", *(f"coordinate {index}" for index in coordinates)]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("time")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    return figure


def dots_figure(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], x: str, line: float | None = None
) -> Figure:
    """Draw positive numbers as dots on a logarithmic axis, with a line to compare them to.

    Args:
        panels: title -> series (a legend's entry) -> row -> number.
        x: what the numbers are.
        line: where the line is; None without one.
    """
    rows = list(
        dict.fromkeys(row for series in panels.values() for s in series.values() for row in s)
    )
    figure = empty_figure(2 + 3 * len(panels), 1.2 + 0.28 * len(rows))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (environment, series) in zip(axes, panels.items(), strict=True):
        for label, factors in series.items():
            axis.plot(
                list(factors.values()),
                [rows.index(row) for row in factors],
                "o",
                markersize=5,
                alpha=0.8,
                label=label,
            )
        if line is not None:
            axis.axvline(line, color=REAL, linestyle="--", linewidth=1)
        axis.set_xscale("log")
        sparse_ticks(axis)
        axis.set_title(environment)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=8)
    figure.supxlabel(x, fontsize=10)
    return figure


def whole_numbers() -> MaxNLocator:
    """Return ticks at whole numbers only, be it one."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)


def sparse_ticks(axis: Axes) -> None:
    """Label a logarithmic x axis with few plain numbers, which then do not overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_xlim()
    narrow, wide = high < 4 * low, high > 100 * low
    axis.xaxis.set_major_locator(
        MaxNLocator(4)
        if narrow
        else LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=5)
    )
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def marker(values: Sequence[float]) -> str | None:
    """Return the marker of a curve: dots where it has few points."""
    return "o" if len(values) <= FEW else None


def draw_samples(axis: Axes, samples: Tensor, real: Tensor, limits: float = 1.15) -> None:
    """Draw 2-D samples as a scatter over the real ones, images as a grid."""
    axis.set_xticks([])
    axis.set_yticks([])
    if is_image(samples.shape[1:]):
        axis.imshow(image_grid(samples), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        return
    centre = real.mean(0).tolist()
    reach = limits * float((real - real.mean(0)).abs().max())
    points, behind = samples[:PICTURED].cpu().numpy(), real[:PICTURED].cpu().numpy()
    axis.scatter(behind[:, 0], behind[:, 1], s=1, color=REAL, alpha=0.25, linewidths=0)
    axis.scatter(points[:, 0], points[:, 1], s=1.5, color=FAKE, alpha=0.6, linewidths=0)
    axis.set_xlim(centre[0] - reach, centre[0] + reach)
    axis.set_ylim(centre[1] - reach, centre[1] + reach)
    axis.set_aspect("equal")


def image_grid(samples: Tensor, columns: int | None = None, most: int = GRID) -> np.ndarray:
    """Tile images (N, C, H, W) in [-1, 1], grey lines around, to one (H', W'[, 3]) in [0, 1]."""
    images = ((samples[:most].detach().cpu().clamp(-1, 1) + 1) / 2).numpy()
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    n, channels, height, width = images.shape
    tiles = np.full((rows * columns, channels, height + 1, width + 1), 0.5, images.dtype)
    tiles[:n, :, :height, :width] = images
    tiles = tiles.reshape(rows, columns, channels, height + 1, width + 1)
    grid = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), -1)
    grid = np.pad(grid, ((1, 0), (1, 0), (0, 0)), constant_values=0.5)
    return grid[..., 0] if channels == 1 else grid
