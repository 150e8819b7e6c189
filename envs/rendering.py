"""Pictures of samples, as `(H, W, 3)` uint8 frames for videos and TensorBoard.

`frame` draws vectors as a scatter of their first two coordinates over the real data, and images
as a grid. It paints pixels directly: a fraction of a millisecond a frame, where a plotting library
takes tens, which counts when a vector environment renders every sample at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..common.shapes import is_image, is_vector

BACKGROUND, REAL, GENERATED = (255, 255, 255), (205, 210, 220), (214, 69, 65)
MAX_REAL = 5_000
VIEW_MARGIN = 1.5


def frame(
    samples: Tensor, shape: Sequence[int], *, real: Tensor | None = None, size: int = 256
) -> np.ndarray:
    """Draw a batch in one picture.

    Args:
        samples: `(N, *shape)` on any device.
        shape: Shape of one sample: `(D,)`, or `(C, H, W)` in [-1, 1] with 1 or 3 channels.
        real: Real samples `(M, *shape)` to show faintly behind a scatter; they set its limits.
        size: Side of a scatter in pixels; the aim for the longer side of a grid.

    Returns:
        `(H, W, 3)` uint8.

    Raises:
        ValueError: Samples of this shape have no picture.
    """
    batch = _to_array(samples, shape)
    if is_vector(shape):
        return _scatter(batch, batch if real is None else _to_array(real[:MAX_REAL], shape), size)
    if is_image(shape) and shape[0] in (1, 3):
        return _grid(batch, size)
    raise ValueError(
        f"samples of shape {tuple(shape)} have no picture: vectors (D,) have, and images (C, H, W) "
        "of 1 or 3 channels"
    )


def _to_array(samples: Tensor, shape: Sequence[int]) -> np.ndarray:
    return samples.detach().float().cpu().numpy().reshape(-1, *shape)


def _scatter(samples: np.ndarray, real: np.ndarray, size: int) -> np.ndarray:
    canvas = np.full((size, size, 3), BACKGROUND, np.uint8)
    reach = VIEW_MARGIN * max(float(np.abs(real[:, :2]).max()), 1e-6)
    if real is not samples:
        _paint(canvas, real, reach, REAL, radius=0)
    # A few points are shown as dots, many as specks.
    _paint(canvas, samples, reach, GENERATED, radius=3 if len(samples) <= 64 else 1)
    return canvas


def _paint(
    canvas: np.ndarray, points: np.ndarray, reach: float, color: tuple[int, ...], radius: int
) -> None:
    """Paint discs of `radius` pixels; points beyond `reach` lie on the border."""
    size = len(canvas)
    xy = np.zeros((len(points), 2))
    xy[:, : points.shape[1]] = points[:, :2]  # one coordinate alone lies on the middle line
    columns, rows = np.rint((np.clip(xy / reach, -1, 1) * (1, -1) + 1) / 2 * (size - 1)).T
    span = np.arange(-radius, radius + 1)
    dy, dx = np.meshgrid(span, span, indexing="ij")
    disc = dx**2 + dy**2 <= radius**2 + 1
    y = np.clip(rows[:, None] + dy[disc], 0, size - 1).astype(int)
    x = np.clip(columns[:, None] + dx[disc], 0, size - 1).astype(int)
    canvas[y, x] = color


def _grid(images: np.ndarray, size: int) -> np.ndarray:
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.zeros((rows * columns, channels, height, width), np.uint8)
    tiles[:count] = np.clip(np.rint((images + 1) * 127.5), 0, 255)
    grid = tiles.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, channels)
    scale = max(1, size // max(grid.shape[:2]))
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    return grid.repeat(3 // channels, axis=2)
