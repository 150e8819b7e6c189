"""Rows: a tableau put together row by row, and the nodes that its rows join."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...envs.processes import NoiseProcess
from ...envs.schedules import Schedule
from ..samplers.sparse import SparseRows
from ..samplers.tableau import Output, Tableau


class Node(NamedTuple):
    """A time of a noise process with its coefficients; the log-SNR is infinite at time 0."""

    time: float
    alpha: float
    sigma: float
    log_snr: float

    @property
    def rho(self) -> float:
        """The noise-to-signal ratio sigma / alpha, the noise level of EDM."""
        return self.sigma / self.alpha

    @classmethod
    def at(cls, process: NoiseProcess, time: float) -> Node:
        """Look up a time."""
        return cls(
            float(time),
            float(process.alpha(time)),
            float(process.sigma(time)),
            float(process.log_snr(time)),
        )

    @classmethod
    def at_log_snr(cls, process: NoiseProcess, log_snr: float) -> Node:
        """Look up a log-SNR."""
        return cls.at(process, float(process.time_of_log_snr(log_snr)))


def nodes_of(schedule: Schedule) -> list[Node]:
    """Return the K + 1 nodes of a schedule.

    Raises:
        ValueError: times so close that their log-SNRs are the same number.
    """
    log_snr = schedule.process.log_snr(schedule.times).numpy()
    same = np.flatnonzero(np.diff(log_snr) <= 0)
    if len(same):
        pair = schedule.times[same[0] : same[0] + 2].tolist()
        raise ValueError(f"The times {pair} are too close together to make a step.")
    columns = (schedule.times.numpy(), *schedule.levels(), log_snr)
    return [Node(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


class Rows:
    """The rows of a tableau so far. Row j is evaluated at `time` and leads to state j + 1."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._scale: list[float] = []
        self._weights: list[tuple[tuple[int, float], ...]] = []
        self._noise: list[float] = []
        self._anchors: list[int] = []
        self._current: list[float] = []

    def __len__(self) -> int:
        return len(self._times)

    def add(
        self,
        time: float,
        scale: float,
        weights: Mapping[int, float],
        *,
        anchor: int | None = None,
        current: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        """Append a row: the fields of `Tableau`, the weights by the index of their output."""
        self._times.append(time)
        self._scale.append(scale)
        self._weights.append(tuple(weights.items()))
        self._noise.append(noise)
        self._anchors.append(len(self) - 1 if anchor is None else anchor)
        self._current.append(current)

    def tableau(
        self, name: str, process: NoiseProcess, final_time: float, output: Output
    ) -> Tableau:
        """Finish the table; its samples have time `final_time`."""
        return Tableau(
            name,
            process,
            np.array([*self._times, final_time]),
            np.array(self._scale),
            SparseRows.from_pairs(self._weights),  # type: ignore[arg-type]  # kept sparse
            np.array(self._noise),
            np.array(self._anchors),
            output,
            np.array(self._current),
        )


def combine(*terms: tuple[float, Mapping[int, float]]) -> dict[int, float]:
    """Return the linear combination of sparse rows, given as (factor, row) pairs."""
    total: dict[int, float] = {}
    for factor, row in terms:
        for k, weight in row.items():
            total[k] = total.get(k, 0.0) + factor * weight
    return total


def difference(later: int, earlier: int) -> dict[int, float]:
    """Return the sparse row of O_later - O_earlier."""
    return {later: 1.0, earlier: -1.0}


def with_last_std(tableau: Tableau, last_std: float | None) -> Tableau:
    """Return the table with this standard deviation in its last step; None leaves it as it is.

    Raises:
        ValueError: it is negative or not finite.
    """
    if last_std is None:
        return tableau
    if not 0 <= last_std < np.inf:
        raise ValueError(f"last_std must be a finite number >= 0, got {last_std}.")
    changes = {}
    for name, value in (("noise", last_std), ("covariance", 0.0), ("cap", np.inf)):
        changes[name] = getattr(tableau, name).copy()
        changes[name][-1] = value
    return tableau.replace(**changes)


def check_order(order: int, allowed: Iterable[int], solver: str) -> None:
    """Raise ValueError for an order that the solver does not have."""
    allowed = list(allowed)
    if isinstance(order, bool) or order not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise ValueError(f"{solver} has the orders {choices}; got {order!r}.")


def check_budget(steps: int, needed: int, solver: str) -> None:
    """Raise ValueError for a schedule too short for a solver's order."""
    if steps < needed:
        raise ValueError(
            f"{solver} needs at least {needed} network calls on this schedule, which has {steps}: "
            "take a lower order or more steps."
        )


def one_step_tableau(
    name: str,
    process: NoiseProcess,
    times: Sequence[float] | np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray,
    noise: np.ndarray,
    output: Output = "epsilon",
    clipped: np.ndarray | None = None,
) -> Tableau:
    """Build a one-step method's tableau: each state follows from the one before and its output."""
    return Tableau(
        name,
        process,
        np.asarray(times),
        scale,
        SparseRows.from_diagonal(weight),  # type: ignore[arg-type]  # kept sparse
        noise,
        output=output,
        clipped=clipped,
    )
