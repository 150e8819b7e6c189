"""End-to-end refinement: all weights of a tableau tuned on the error of the finished sample.

The greedy fit minimises the error after each step, which is not the error at the end: a step
changes what the network says later. Here the error at the end is differentiated through the whole
chain with respect to every weight W_jk, from the greedy fit on (MATH.md 2.7, last remark).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..tableau import Tableau
from ..training import adam, learning_rate_schedule, set_learning_rate
from .fit import Batch


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


class Refiner:
    """The training of a `Refinement`: Adam on the finished samples' error, cosine learning rate.

    Args:
        start: the table to start from.
        unit: (K, K) weights of the base solver.
        device: where the outputs will be.
        steps: how many gradient steps the learning rate is spread over.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        start: Tableau,
        unit: np.ndarray,
        device: torch.device,
        steps: int,
        learning_rate: float,
    ) -> None:
        self.module = Refinement(start, unit, device)
        self.steps, self.learning_rate = steps, learning_rate
        self._optimizer = adam(self.module.parameters())
        self._factor = learning_rate_schedule("cosine")

    def step(self, denoiser: Denoiser, batch: Batch, done: int) -> float:
        """Take one gradient step after `done` others; return the error before it."""
        with frozen(denoiser):
            loss = (self.module(denoiser, batch.noise) - batch.targets[-1]).square().mean()
            self._optimizer.zero_grad()
            loss.backward()
        factor = self._factor(min(done / self.steps, 1.0))
        set_learning_rate(self._optimizer, self.learning_rate * factor)
        self._optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Any] | None:
        """Return what training changed, as JSON values; None before the first step."""
        moments = self._optimizer.state_dict()["state"]
        if not moments:
            return None
        return {
            "change": self.module.change.tolist(),
            "adam": {key: value.tolist() for key, value in moments[0].items()},
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore what `state` returned."""
        if state is None:
            return
        with torch.no_grad():
            self.module.change.copy_(torch.tensor(state["change"], dtype=torch.float64))
        moments = {
            key: torch.tensor(value, dtype=torch.float32 if key == "step" else torch.float64)
            for key, value in state["adam"].items()
        }
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": {0: moments}})


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
