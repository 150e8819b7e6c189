"""The greedy fit: each step's lambdas by least squares, one step after the other (MATH.md 2.7).

With b the state's motion along a direction, the best lambda of a step is one dot product divided by
another, `<b, y - base> / <b, b>` (MATH.md 2.2). The student's own states are carried forward,
not the teacher's, so a step also repairs what the steps before it left.

Several directions of a step are often nearly parallel. The least squares problem is therefore
solved from a QR factorisation in float64, never from dot products, whose rounding grows with the
square of the problem's condition number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ...selection import coordinate_errors
from .forms import distilled

# Constants tried for the forms with one lambda for all steps.
GRID = np.linspace(-1.0, 2.0, 61)

# A direction shorter than this share of the state is no direction, and a mixture of directions of
# unit length that is shorter than this share of the longest one is none: the rounding of a network
# in float32 is about as long.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Batch:
    """Initial noise (N, *shape) and the states (K, N, *shape) that the steps should lead to.

    The states may be on the CPU where the noise is not. In a conditional environment the conditions
    (N, ...) as well.
    """

    noise: Tensor
    targets: Tensor
    condition: Tensor | None = None


@dataclass(frozen=True)
class StepFit:
    """What the fit of one step did; errors are mean squares over samples and dimensions.

    Attributes:
        lambdas: (n_j,) the step's lambdas.
        before: error of the step without them.
        after: error with them.
    """

    lambdas: np.ndarray
    before: float
    after: float

    @property
    def removed(self) -> float:
        """Share of the step's error that its lambdas removed."""
        return 1 - self.after / self.before if self.before > 0 else 0.0


@torch.no_grad()
def fit(
    tableau: Tableau,
    rows: Sequence[np.ndarray],
    denoiser: Denoiser,
    batches: Sequence[Batch],
    ridge: float = 0.0,
    constant: float | None = None,
) -> list[StepFit]:
    """Fit the lambdas of every step.

    All batches advance together and share one least squares problem, so many small batches give the
    step of one large one, up to rounding. Where the directions of a step are nearly parallel, the
    step is what the samples determine; its lambdas are determined only up to rounding times the
    condition number of the directions, scaled to unit length. That number is at most 1e6:
    directions closer to parallel count as one, with the smallest lambdas that make the step.

    Args:
        tableau: the base solver.
        rows: its `directions`.
        denoiser: the network.
        batches: noise and targets.
        ridge: pulls the lambdas to 0, as a share of the step's squared error r^2: the fit minimises
            ||y - base - sum lambda b||^2 + ridge r^2 sum lambda^2. It bounds |lambda| by
            1 / (2 sqrt(ridge)) and hardly touches a direction as long as the error it repairs.
        constant: take this for every lambda instead of fitting.
    """
    unread = _unread(tableau, rows)
    students = [_Student(tableau, denoiser, batch, unread) for batch in batches]
    count = sum(batch.noise.numel() for batch in batches)
    fits = []
    for j, row in enumerate(rows):
        factor = _triangle([student.propose(j, row) for student in students])
        lambdas = _solve(factor, ridge) if constant is None else np.full(len(row), constant)
        residual = factor[:, -2]
        missed = residual - factor[:, :-2] @ lambdas
        fits.append(
            StepFit(lambdas, float(residual @ residual) / count, float(missed @ missed) / count)
        )
        for student in students:
            student.move(lambdas)
    return fits


def best_constant(
    tableau: Tableau, rows: Sequence[np.ndarray], denoiser: Denoiser, batches: Sequence[Batch]
) -> float:
    """Choose one lambda for all steps by grid search on the error of the finished sample."""

    def error(value: float) -> float:
        lambdas = [np.full(len(row), value) for row in rows]
        return final_error(distilled(tableau, rows, lambdas), denoiser, batches)

    return float(min(GRID, key=error))


@torch.no_grad()
def noise_errors(tableau: Tableau, denoiser: Denoiser, batches: Sequence[Batch]) -> Tensor:
    """Return the finished samples' errors from the teacher's, (N,): a coordinate's mean squares."""
    return torch.cat(
        [
            coordinate_errors(
                tableau.sample(denoiser.under(batch.condition), batch.noise), batch.targets[-1]
            )
            for batch in batches
        ]
    )


def final_error(tableau: Tableau, denoiser: Denoiser, batches: Sequence[Batch]) -> float:
    """Return the mean of `noise_errors`."""
    return float(noise_errors(tableau, denoiser, batches).mean())


def _unread(tableau: Tableau, rows: Sequence[np.ndarray]) -> list[list[int]]:
    """Return for each step the outputs that neither the table nor a direction reads after it."""
    last = {k: j for j, outputs in enumerate(tableau.unread[1]) for k in outputs}
    for j, row in enumerate(rows):
        for k in np.flatnonzero(np.any(row[:, :-1] != 0, axis=0)).tolist():
            last[k] = max(last[k], j)
    return [[k for k, step in last.items() if step == j] for j in range(tableau.steps)]


class _Student:
    """One batch on its way through the student's steps; what no later step reads is dropped."""

    def __init__(
        self, tableau: Tableau, denoiser: Denoiser, batch: Batch, unread: list[list[int]]
    ) -> None:
        self.tableau, self.batch, self._unread = tableau, batch, unread
        self.denoiser = denoiser.under(batch.condition)
        self.states: list[Any] = [batch.noise]
        self.outputs: list[Any] = []
        self._base = batch.noise
        self._columns: list[Tensor] = []

    def propose(self, j: int, row: np.ndarray) -> np.ndarray:
        """Evaluate step j without its lambdas.

        Returns:
            The triangular factor R (m, n + 2) float64, m <= n + 2, of a QR factorisation whose
            columns are the n directions, the residual y - base and the base itself. It has their
            lengths and angles: all that the fit needs to know of this batch.
        """
        self.outputs.append(self.tableau.evaluate(self.denoiser, self.states[j], j))
        self._base = self.tableau.advance(j, self.states, self.outputs)
        self._columns = [self._along(direction) for direction in row]
        residual = self.batch.targets[j].to(self._base.device) - self._base
        vectors = torch.stack([part.flatten() for part in (*self._columns, residual, self._base)])
        return torch.linalg.qr(vectors.double().T, mode="r").R.cpu().numpy()

    def move(self, lambdas: np.ndarray) -> None:
        """Finish the step with its lambdas."""
        state = self._base
        for value, column in zip(lambdas.tolist(), self._columns, strict=True):
            state = torch.add(state, column, alpha=value)
        j = len(self.states) - 1
        self.states.append(state)
        for i in self.tableau.unread[0][j]:
            self.states[i] = None
        for k in self._unread[j]:
            self.outputs[k] = None

    def _along(self, direction: np.ndarray) -> Tensor:
        motion = float(direction[-1]) * self.batch.noise
        for k in np.flatnonzero(direction[:-1]).tolist():
            motion = torch.add(motion, self.outputs[k], alpha=float(direction[k]))
        return motion


def _triangle(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the factor R of all batches together from that of each, (n + 2) columns; float64."""
    return np.asarray(np.linalg.qr(np.concatenate(factors), mode="r"))


def _solve(factor: np.ndarray, ridge: float) -> np.ndarray:
    """Return the lambdas (n,) that minimise the penalised error; see `fit` and `propose`."""
    columns, residual, base = factor[:, :-2], factor[:, -2], factor[:, -1]
    lambdas = np.zeros(columns.shape[1])
    moves = np.linalg.norm(columns, axis=0) > _NEGLIGIBLE * np.linalg.norm(base)
    if moves.any():
        # The penalty is a row for each lambda that asks it to be 0.
        penalty = np.sqrt(ridge) * np.linalg.norm(residual) * np.eye(int(moves.sum()))
        matrix = np.concatenate([columns[:, moves], penalty])
        wanted = np.concatenate([residual, np.zeros(len(penalty))])
        # Equal lengths, so that the cut-off means the same for every direction.
        length = np.linalg.norm(matrix, axis=0)
        lambdas[moves] = np.linalg.lstsq(matrix / length, wanted, rcond=_NEGLIGIBLE)[0] / length
    return lambdas
