"""The tables of a family as vectors, and the tangent at one of them (MATH.md 5.6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...samplers.tableau import Tableau
from ..joint.family import FACTORS, SHIFTS, TIMES, WEIGHTS, Numbers, Parameters, TableFamily
from .settings import SpreadSettings

# Central differences of the base solver's numbers by its times, in the levels' parameters.
_STEP = 1e-4


class Tangent(NamedTuple):
    """A table's numbers, and their derivatives by the vector's entries.

    Attributes:
        mean: the numbers, without a graph.
        slopes: the same with a leading dimension (D, ...).
    """

    mean: Numbers
    slopes: Numbers

    def at(self, offsets: Tensor) -> Numbers:
        """Return the numbers (n, ...) of tables that lie offsets (n, D) from the mean."""
        found = [
            mean + torch.tensordot(offsets, slope, 1)
            for mean, slope in zip(self.mean, self.slopes, strict=True)
        ]
        return Numbers(*found)


class TableSpace:
    """The free numbers of a family's tables as vectors (D,), in standard deviations of the start.

    Args:
        family: the tables.
        start: the parameters at the origin.
        spread: the standard deviations.

    Attributes:
        size: D.
    """

    def __init__(self, family: TableFamily, start: Parameters, spread: SpreadSettings) -> None:
        self.family, self.start = family, start
        stds = {
            TIMES: spread.times,
            FACTORS: spread.coefficients,
            WEIGHTS: spread.coefficients,
            SHIFTS: spread.shifts,
        }
        self._free = {}
        for name, value in start.items():
            free = torch.ones_like(value, dtype=torch.bool)
            if name == WEIGHTS:
                free = free.tril()
            if name == SHIFTS:
                # The first call is told the level that the noise is drawn for.
                free[0] = False
            self._free[name] = free
        self._units = torch.cat(
            [
                torch.full((int(free.sum()),), stds[name], dtype=torch.float64)
                for name, free in self._free.items()
            ]
        )
        self.size = len(self._units)

    def parameters(self, vector: Tensor) -> Parameters:
        """Return the family's parameters at a vector (D,)."""
        moves = (vector * self._units).split([int(free.sum()) for free in self._free.values()])
        made = {}
        for (name, free), move in zip(self._free.items(), moves, strict=True):
            made[name] = self.start[name].clone()
            made[name][free] += move
        return made

    def table(self, vector: Tensor) -> Tableau:
        """Return the table at a vector (D,).

        Raises:
            ValueError: it has none: two of its levels are the same, or a number is not finite.
        """
        parameters = self.parameters(vector)
        self.family.cut_shifts(parameters)
        return self.family.table(parameters)

    def tangent(self, vector: Tensor) -> Tangent:
        """Return the tangent at a vector (D,); only in the times is the family no plane."""
        with torch.no_grad():
            base = self.family.base_numbers(self.parameters(vector))
        mean = self._numbers(vector, base)
        moved = int(self._free[TIMES].sum()) if TIMES in self._free else 0
        rows = []
        for index in range(self.size):
            away = torch.zeros_like(vector)
            if index < moved:
                away[index] = _STEP / float(self._units[index])
                ahead, behind = self._numbers(vector + away), self._numbers(vector - away)
                width = 2 * float(away[index])
            else:
                # The others add to the base solver's numbers.
                away[index] = width = 1.0
                ahead, behind = self._numbers(vector + away, base), mean
            # What does not move has no slope; the first level may be infinite where none moves.
            rows.append(
                [
                    torch.where(a == b, 0.0, (a - b) / width)
                    for a, b in zip(ahead, behind, strict=True)
                ]
            )
        return Tangent(mean, Numbers(*map(torch.stack, zip(*rows, strict=True))))

    def _numbers(self, vector: Tensor, base: Numbers | None = None) -> Numbers:
        with torch.no_grad():
            return self.family.numbers(self.parameters(vector), base)
