"""A table written from the initial noise: every state from z_0 and the outputs (BNS, MATH.md 5.2).

The states of a deterministic table are linear in z_0 and the outputs, so

    z_{j+1} = A_j z_0 + sum_{k <= j} B_jk O_k

is the same sampler as its steps, with other numbers to learn.
"""

from __future__ import annotations

import numpy as np

from ...samplers.tableau import Tableau


def in_noise_form(table: Tableau) -> Tableau:
    """Return a deterministic table whose every row starts from z_0; the same sampler."""
    steps = table.steps
    on_noise, on_outputs = np.ones(steps + 1), np.zeros((steps + 1, steps))
    for j in range(steps):
        row = table.row(j)
        parts = [(row.scale, row.anchor), (row.current, j)]
        on_noise[j + 1] = sum(share * on_noise[i] for share, i in parts)
        on_outputs[j + 1] = sum(share * on_outputs[i] for share, i in parts)
        for k, weight in row.weights:
            on_outputs[j + 1, k] += weight
    return table.replace(
        scale=on_noise[1:],
        weights=on_outputs[1:],
        anchors=np.zeros(steps, dtype=np.int64),
        current=np.zeros(steps),
    )
