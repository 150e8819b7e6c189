"""The weights of a tableau, of which only those that are not zero are kept.

Step j of most solvers reads one to four outputs, whatever the number K of steps: a matrix of K x K
numbers would be 75 GB for 100,000 steps, its non-zero ones are 1.6 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real

import numpy as np

NOT_LOWER = "Tableau.weights must be lower-triangular: a step uses outputs already computed."


def read_only(values: object, dtype: type[np.generic]) -> np.ndarray:
    """Return a read-only copy, which shares its memory with nothing."""
    copy = np.array(values, dtype=dtype)
    copy.setflags(write=False)
    return copy


class SparseRows:
    """K rows of weights in the compressed sparse row format; read-only.

    The non-zero weights of row j are `values[starts[j]:starts[j + 1]]`, those on the outputs
    `columns[starts[j]:starts[j + 1]]`, in ascending order.

    Attributes:
        starts: (K + 1,) int64.
        columns: (n,) int64, the k of each W_jk.
        values: (n,) float64, none of them 0.
    """

    def __init__(self, counts: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Keep weights in the order of their rows and columns; `counts` (K,) is how many a row."""
        self.starts = read_only(np.concatenate([[0], np.cumsum(counts)]), np.int64)
        self.columns = read_only(columns, np.int64)
        self.values = read_only(values, np.float64)

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> SparseRows:
        """Keep the non-zero weights of a matrix (K, K)."""
        rows, columns = np.nonzero(matrix)
        return cls(np.bincount(rows, minlength=len(matrix)), columns, matrix[rows, columns])

    @classmethod
    def from_diagonal(cls, weights: np.ndarray) -> SparseRows:
        """Let each row read its own output only, with a weight of `weights` (K,)."""
        kept = np.asarray(weights) != 0
        return cls(kept.astype(np.int64), np.flatnonzero(kept), np.asarray(weights)[kept])

    @classmethod
    def from_pairs(cls, rows: Iterable[Iterable[Sequence[float]]]) -> SparseRows:
        """Read K rows of pairs (k, W_jk), in any order; weights of 0 are left out.

        Raises:
            ValueError: row j holds something else than pairs of an index up to j and a number, or
                an index twice.
        """
        counts: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for j, row in enumerate(rows):
            pairs = _sorted_pairs(row, j)
            counts.append(len(pairs))
            columns.extend(k for k, _ in pairs)
            values.extend(weight for _, weight in pairs)
        return cls(np.array(counts), np.array(columns), np.array(values))

    def __eq__(self, other: object) -> bool:
        """Tell whether the same weights stand in the same places."""
        if not isinstance(other, SparseRows):
            return NotImplemented
        names = ("starts", "columns", "values")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, int]:
        """(K, K)."""
        return len(self.starts) - 1, len(self.starts) - 1

    @property
    def rows(self) -> np.ndarray:
        """(n,) int64, the row j of each weight."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def diagonal(self) -> np.ndarray:
        """(K,) float64, the weight of each row on its own output."""
        own = self.rows == self.columns
        diagonal = np.zeros(len(self.starts) - 1)
        diagonal[self.columns[own]] = self.values[own]
        return diagonal

    def matrix(self) -> np.ndarray:
        """Lay the weights out as a matrix (K, K) float64, read-only."""
        matrix = np.zeros(self.shape)
        matrix[self.rows, self.columns] = self.values
        matrix.setflags(write=False)
        return matrix

    def pairs(self) -> list[tuple[tuple[int, float], ...]]:
        """Return K rows of pairs (k, W_jk) as plain numbers."""
        columns, values, starts = self.columns.tolist(), self.values.tolist(), self.starts.tolist()
        entries = list(zip(columns, values, strict=True))
        return [tuple(entries[a:b]) for a, b in pairwise(starts)]


def _sorted_pairs(row: Iterable[Sequence[float]], j: int) -> list[tuple[int, float]]:
    """Check a row's pairs, and sort those that are not 0 by their index."""
    found: dict[int, float] = {}
    try:
        for k, weight in row:
            number = isinstance(weight, Real) and not isinstance(weight, bool)
            if not isinstance(k, Integral) or isinstance(k, bool) or not number:
                raise TypeError
            if not 0 <= k <= j:
                raise ValueError(NOT_LOWER)
            if k in found:
                raise ValueError(f"Tableau.weights names output {k} twice in row {j}.")
            found[int(k)] = float(weight)
    except TypeError:
        raise ValueError(
            f"Row {j} of Tableau.weights must hold pairs (k, weight) of an output's index and a "
            "number."
        ) from None
    except OverflowError:
        raise ValueError(f"Row {j} of Tableau.weights holds a number beyond float64.") from None
    return sorted((k, weight) for k, weight in found.items() if weight != 0)
