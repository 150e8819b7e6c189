"""A table that begins in the middle: what image-to-image and inpainting run.

The rows after the beginning read states and outputs from before it, which there are none of. Such a
row becomes a first-order step with its own output, as the multistep schedulers of diffusers begin,
to the same time and with the same fresh noise.
"""

from __future__ import annotations

import math

import numpy as np

from .sparse import SparseRows
from .tableau import Row, Tableau


def begun_at(table: Tableau, begin: int) -> Tableau:
    """Return the table whose rows from `begin` on need nothing from before state z_begin.

    Args:
        table: any.
        begin: 0 to K - 1. The rows before stay as they are.

    Raises:
        ValueError: there is no such row.
    """
    if not 0 <= begin < table.steps:
        raise ValueError(
            f"'{table.name}' has {table.steps} steps, of which one from 0 to {table.steps - 1} is "
            f"the first; got {begin}."
        )
    rows = [table.row(j) for j in range(table.steps)]
    for j in range(begin, table.steps):
        if rows[j].anchor < begin or any(k < begin for k, _ in rows[j].weights):
            rows[j] = _first_order(table, j)
    return table.replace(
        scale=np.array([row.scale for row in rows]),
        weights=SparseRows.from_pairs([row.weights for row in rows]),
        noise=np.array([row.noise for row in rows]),
        anchors=np.array([row.anchor for row in rows]),
        current=np.array([row.current for row in rows]),
        clipped=np.array([row.clipped for row in rows]),
    )


def _first_order(table: Tableau, j: int) -> Row:
    """Return DDIM's step from times[j] to the next, with the noise of row j (MATH.md 1.1)."""
    row, process = table.row(j), table.process
    alpha, sigma = process.levels(float(table.times[j]))
    next_alpha, next_sigma = process.levels(float(table.times[j + 1]))
    noise = min(row.noise, next_sigma)
    kept = math.sqrt(next_sigma**2 - noise**2)
    clipped = 0.0
    if table.output == "epsilon":
        scale = next_alpha / alpha
        weight = kept - sigma * scale
    else:
        scale = kept / sigma
        weight = next_alpha - alpha * scale
        if row.clipped:
            # Of D as the network says it only the noise is made.
            weight, clipped = -alpha * scale, next_alpha
    return row._replace(
        anchor=j,
        scale=scale,
        current=0.0,
        weights=((j, weight),),
        noise=noise,
        clipped=clipped,
    )
