"""Rows: a tableau put together row by row, and the nodes that its rows join."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...envs.processes import NoiseProcess
from ...envs.schedules import Schedule
from ..samplers.sparse import SparseRows
from ..samplers.tableau import Output, Tableau
from .many import Many, Stack


class Node(NamedTuple):
    """A time of a noise process with its coefficients; each may be a `Many`.

    The log-SNR is infinite at time 0, and minus infinite where no signal is left.
    """

    time: float
    alpha: float
    sigma: float
    log_snr: float

    @property
    def rho(self) -> float:
        """The noise-to-signal ratio sigma / alpha, the noise level of EDM."""
        return self.sigma / self.alpha if self.alpha else np.inf

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


def nodes_of_many(process: NoiseProcess, times: Tensor) -> list[Node]:
    """Return the K + 1 nodes of M schedules, times (M, K + 1), whose fields are `Many`."""
    columns = (times, process.alpha(times), process.sigma(times), process.log_snr(times))
    return [Node(*map(Many.of, row)) for row in zip(*(c.numpy().T for c in columns), strict=True)]


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
        """Finish the table; its samples have time `final_time`.

        Where no signal is left at the first time, a table in noise prediction is rewritten in data
        prediction, see `without_signal`.
        """
        times = np.array([*self._times, final_time])
        if output == "epsilon" and process.levels(times[0])[0] == 0:
            levels = [process.levels(time) for time in times.tolist()]
            rows = without_signal(levels, self._scale, self._anchors, self._weights)
            self._scale, self._current, self._anchors, self._weights = rows
            output = "sample"
        return Tableau(
            name,
            process,
            times,
            np.array(self._scale),
            SparseRows.from_pairs(self._weights),  # type: ignore[arg-type]  # kept sparse
            np.array(self._noise),
            np.array(self._anchors),
            output,
            np.array(self._current),
        )

    def stack(self, levels: np.ndarray) -> Stack:
        """Return the numbers of the tables that rows of `Many` make, in one call a step.

        Args:
            levels: (M, K) logarithms of the noise levels of the steps.
        """
        count, steps = levels.shape
        found = Stack(
            levels,
            np.empty((count, steps)),
            np.zeros((count, steps, steps)),
            np.zeros((count, steps)),
        )
        for j in range(steps):
            found.scale[:, j] = self._scale[j]
            for k, weight in self._weights[j]:
                found.weights[:, j, k] = weight
        return found


def without_signal(
    levels: Sequence[tuple[float, float]],
    scale: Sequence[float],
    anchors: Sequence[int],
    weights: Sequence[Iterable[tuple[int, float]]],
) -> tuple[list[float], list[float], list[int], list[tuple[tuple[int, float], ...]]]:
    """Rewrite a noise-free table from noise into data prediction, exactly (MATH.md 1.16).

    The predicted noise is (z_k - alpha_k D_k) / sigma_k. Where alpha_0 = 0 it says nothing of the
    clean sample: step 0 becomes the limit, z_1 = (sigma_1 / sigma_0) z_0 + (alpha_1 - alpha_0
    sigma_1 / sigma_0) D_0. A row that now reads more states than its own and one other reads z_0
    instead of them: each is linear in z_0 and the outputs before it.

    Args:
        levels: alpha and sigma at the K + 1 times.
        scale: p of the K rows.
        anchors: a of the K rows.
        weights: of the K rows, on the predicted noise.

    Returns:
        The scales, the factors on z_j itself, the anchors and the weights of the new rows.
    """
    composed: list[tuple[float, dict[int, float]]] = [(1.0, {})]
    rows: tuple[list[float], list[float], list[int], list[tuple[tuple[int, float], ...]]]
    rows = [], [], [], []
    for j, (p, anchor, pairs) in enumerate(zip(scale, anchors, weights, strict=True)):
        if j == 0:
            ratio = levels[1][1] / levels[0][1]
            states = {0: ratio}
            outputs = {0: levels[1][0] - levels[0][0] * ratio}
        else:
            used = [(k, weight / levels[k][1], levels[k][0]) for k, weight in pairs if weight]
            states = combine((1.0, {anchor: p}), *((share, {k: 1.0}) for k, share, _ in used))
            outputs = {k: -share * alpha for k, share, alpha in used}
        others = [k for k in states if k != j]
        if len(others) > 1:
            terms = [(states[k], composed[k]) for k in others]
            outputs = combine((1.0, outputs), *((share, on) for share, (_, on) in terms))
            states = {0: sum(share * on for share, (on, _) in terms), j: states.get(j, 0.0)}
            others = [0]
        first = others[0] if others else j
        rows[0].append(states[first])
        rows[1].append(states.get(j, 0.0) if others else 0.0)
        rows[2].append(first)
        rows[3].append(tuple(outputs.items()))
        composed.append(
            (
                sum(share * composed[k][0] for k, share in states.items()),
                combine((1.0, outputs), *((share, composed[k][1]) for k, share in states.items())),
            )
        )
    return rows


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
