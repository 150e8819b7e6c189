"""The pictures of a run: samples, trajectories, curves. Figures without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..agents.checkpoint import write_atomically

REAL, FAKE, PATH = "#9aa0a6", "#1a73e8", "#d93025"


def new_figure(rows: int, columns: int, size: float = 3.2) -> tuple[Figure, np.ndarray]:
    """Return a figure and its (rows, columns) array of axes."""
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


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


def trajectories_figure(rows: Mapping[str, Tensor], real: Tensor, times: Sequence[float]) -> Figure:
    """Draw the chain of samples, one row a sampler, one column a step (six at most).

    Args:
        rows: title -> trajectories (K + 1, N, *shape), the noisiest state first.
        real: real samples (M, *shape), drawn faintly behind.
        times: the K + 1 times of the states.
    """
    last = len(times) - 1
    steps = sorted({round(last * i / 5) for i in range(6)})
    image = real.ndim == 4
    figure, axes = new_figure(len(rows), len(steps), size=2.2)
    for axes_row, (title, trajectory) in zip(axes, rows.items(), strict=True):
        for axis, step in zip(axes_row, steps, strict=True):
            if image:
                draw_samples(axis, trajectory[step][:16], real)
            else:
                draw_samples(axis, trajectory[step][:2000], real, limits=2.0)
                paths = trajectory[: step + 1, :24].cpu().numpy()
                axis.plot(paths[..., 0], paths[..., 1], color=PATH, linewidth=0.5, alpha=0.7)
            axis.set_title(f"{title}, t = {times[step]:g}", fontsize=8)
    return figure


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
        axis.plot(steps, values, label=label, linewidth=1.5)
    if floor is not None:
        axis.axhline(floor, color=REAL, linestyle="--", linewidth=1, label="floor")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return figure


def draw_samples(axis: Axes, samples: Tensor, real: Tensor, limits: float = 1.15) -> None:
    """Draw 2-D samples as a scatter over the real ones, images as a grid."""
    axis.set_xticks([])
    axis.set_yticks([])
    if samples.ndim == 4:
        axis.imshow(image_grid(samples), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        return
    centre = real.mean(0).tolist()
    reach = limits * float((real - real.mean(0)).abs().max())
    points, behind = samples[:4000].cpu().numpy(), real[:4000].cpu().numpy()
    axis.scatter(behind[:, 0], behind[:, 1], s=1, color=REAL, alpha=0.25, linewidths=0)
    axis.scatter(points[:, 0], points[:, 1], s=1.5, color=FAKE, alpha=0.6, linewidths=0)
    axis.set_xlim(centre[0] - reach, centre[0] + reach)
    axis.set_ylim(centre[1] - reach, centre[1] + reach)
    axis.set_aspect("equal")


def image_grid(samples: Tensor, columns: int | None = None, most: int = 64) -> np.ndarray:
    """Tile images (N, C, H, W) in [-1, 1], grey lines between, to one (H', W'[, 3]) in [0, 1]."""
    images = ((samples[:most].detach().cpu().clamp(-1, 1) + 1) / 2).numpy()
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    n, channels, height, width = images.shape
    tiles = np.full((rows * columns, channels, height + 1, width + 1), 0.5, images.dtype)
    tiles[:n, :, :height, :width] = images
    tiles = tiles.reshape(rows, columns, channels, height + 1, width + 1)
    grid = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), -1)
    return grid[..., 0] if channels == 1 else grid
