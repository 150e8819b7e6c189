"""End-to-end refinement: all weights of a tableau tuned on the error of the finished sample.

The greedy fit minimises the error after each step, which is not the error at the end: a step
changes what the network says later. Here the error at the end is differentiated through the whole
chain with respect to every weight W_jk, from the greedy fit on (MATH.md 2.7, last remark).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ....common.optimisation import frozen
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from .fit import Batch

# Steps of L-BFGS in one round of the refinement.
ITERATIONS = 10


class Refinement(nn.Module):
    """A tableau with trainable weights.

    Each row's change is measured in units of the base solver's largest weight there, so that all
    rows have about the same scale.

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
        self.register_buffer("base", torch.tensor(tableau.weights, device=device))
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
        return self.tableau.replace(weights=np.tril(weights))


class Refiner:
    """The training of a `Refinement` by L-BFGS with a line search, on all batches at once.

    There are few weights and a right answer for each sample, which is a task for a second-order
    method: a sample near a boundary of the data has a gradient a thousand times the others', and
    Adam's steps of fixed size, tried first, left such solvers worse than they found them.

    Args:
        start: the table to start from.
        unit: (K, K) weights of the base solver.
        device: where the outputs will be.
    """

    def __init__(self, start: Tableau, unit: np.ndarray, device: torch.device) -> None:
        self.module = Refinement(start, unit, device)

    def step(self, denoiser: Denoiser, batches: Sequence[Batch]) -> float:
        """Take up to `ITERATIONS` steps of L-BFGS; return the error before them.

        Each call starts L-BFGS anew, so that a resumed training needs the weights alone.
        """
        optimizer = torch.optim.LBFGS(
            self.module.parameters(),
            max_iter=ITERATIONS,
            history_size=ITERATIONS,
            line_search_fn="strong_wolfe",
        )

        def error() -> float:
            optimizer.zero_grad()
            total = 0.0
            for batch in batches:
                ends = self.module(denoiser.under(batch.condition), batch.noise)
                missed = ends - batch.targets[-1].to(ends.device)
                loss = missed.square().mean() / len(batches)
                loss.backward()
                total += float(loss.detach())
            return total

        before = self.module.change.detach().clone()
        with frozen(denoiser):
            loss = float(optimizer.step(error))
        if not self.module.change.isfinite().all():
            # The line search left the domain where the network is finite.
            self.module.change.data.copy_(before)
        return loss

    def state(self) -> list[list[float]] | None:
        """Return what training changed, as JSON values; None if it changed nothing."""
        return self.module.change.tolist() if self.module.change.any() else None

    def load_state(self, state: list[list[float]] | None) -> None:
        """Restore what `state` returned."""
        if state is not None:
            self.module.change.data.copy_(torch.tensor(state, dtype=torch.float64))
