"""End-to-end refinement: all weights of a tableau tuned on the error of the finished sample.

The greedy fit minimises the error after each step, which is not the error at the end: a step
changes what the network says later. Here the error at the end is differentiated through the whole
chain with respect to every weight W_jk, from the greedy fit on (MATH.md 2.7, last remark).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..tableau import Tableau


class Refinement(nn.Module):
    """A tableau with trainable weights.

    Each row's change is measured in units of the base solver's largest weight there, so that one
    learning rate suits all rows.

    Args:
        tableau: where to start.
        unit: (K, K) weights of the base solver.
        device: where the outputs will be.
    """

    base: Tensor
    unit: Tensor

    def __init__(self, tableau: Tableau, unit: np.ndarray, device: torch.device) -> None:
        super().__init__()
        self.tableau = tableau
        self.register_buffer("base", torch.from_numpy(tableau.weights).to(device))
        largest = np.abs(unit).max(axis=1, keepdims=True) * np.tri(tableau.steps)
        self.register_buffer("unit", torch.from_numpy(largest).to(device))
        self.change = nn.Parameter(torch.zeros_like(self.base))

    def forward(self, denoiser: Denoiser, noise: Tensor) -> Tensor:
        """Return finished samples (N, *shape) from `noise`, differentiable in the weights."""
        weights = (self.base + self.unit * self.change).to(noise.dtype)
        states, outputs = [noise], []
        for j in range(self.tableau.steps):
            outputs.append(self.tableau.evaluate(denoiser, states[j], j))
            mixed = torch.tensordot(weights[j, : j + 1], torch.stack(outputs), dims=1)
            states.append(self.tableau.carried(j, states) + mixed)
        return states[-1]

    def export(self) -> Tableau:
        """Return the table with the weights as they are now."""
        weights = (self.base + self.unit * self.change).detach().cpu().numpy()
        return dataclasses.replace(self.tableau, weights=np.tril(weights))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keep a module's parameters out of the gradient for a while."""
    training = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
