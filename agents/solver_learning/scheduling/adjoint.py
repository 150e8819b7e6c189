"""The exact gradient of a rollout's error by its noise levels, in memory independent of K.

A sampler is a table of numbers, and its samples depend on the levels through them: through the
levels at which the network is asked, and through p, q and W. So the gradient has two factors.
`backpropagate` finds the error's derivative by every number of the table: the states are stored,
and each network call is repeated with its graph when the adjoint passes it, so that one graph is
alive at a time (MATH.md 3.5; Huang 2024 calls it gradient rematerialisation). `by_log_level` then
follows the numbers back to the levels through the solver's builder, whichever it is.

The times of a discrete process bend at its whole noisings, and with them whatever reads times: a
network, the polynomials of DEIS. A derivative at such a level is the one towards more noise, in
both factors, and a level within rounding of a whole noising counts as it (`DiscreteVP`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....envs.processes import NoiseProcess
from ....envs.schedules import Schedule
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ...solvers.many import Stack
from .levels import level_of_time, noise_levels, schedule_at, time_of_level, times_at
from .rollout import chunk_size

# A builder is differentiated by five-point differences in the log of a level, this far apart
# (relative to the gap beside it): truncation and rounding leave 1e-12 to 1e-9. They lie around the
# level, or all on one side of it where the process bends too near on the other.
_DISTANCE = 1e-3
_CENTRED = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))
_ONE_SIDED = ((1, 4.0), (2, -3.0), (3, 4 / 3), (4, -1 / 4))  # and -25 / 12 at the level itself

# Of a process and the times (M, K + 1) of many schedules, all tables; None where that is not done.
Stacks = Callable[[NoiseProcess, Tensor], Stack | None]


@dataclass(frozen=True)
class Sensitivity:
    """Derivatives of an error by the numbers of a tableau of K steps; see `Tableau`.

    Attributes:
        levels: (K,) by the logarithm of the noise level at which each call is made.
        scale: (K,).
        weights: (K, K).
        current: (K,).
    """

    levels: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    current: np.ndarray

    @classmethod
    def zeros(cls, steps: int) -> Sensitivity:
        """Return one that is 0 everywhere."""
        shapes = (steps,), (steps,), (steps, steps), (steps,)
        return cls(*(np.zeros(shape) for shape in shapes))

    def plus(self, other: Sensitivity, share: float) -> Sensitivity:
        """Return the sum of this one and a share of another."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Sensitivity(*(own + share * others for own, others in pairs))

    def along(self, tableau: Tableau, other: Tableau) -> float:
        """Return the first-order change of the error from one tableau to another like it."""
        moved = log_levels(other) - log_levels(tableau)
        return float((self.levels * moved).sum()) + sum(
            float((getattr(self, name) * (getattr(other, name) - getattr(tableau, name))).sum())
            for name in ("scale", "weights", "current")
        )

    def along_stack(self, tables: Stack) -> list[float]:
        """Return the same from the last of M + 1 tables to each of the others, (M,)."""
        changes = 0.0
        for name in ("levels", "scale", "weights", "current"):
            found = getattr(tables, name)
            moved = (found[:-1] - found[-1]).reshape(len(found) - 1, -1)
            changes = changes + moved @ getattr(self, name).ravel()
        return np.asarray(changes).tolist()


def log_levels(tableau: Tableau) -> np.ndarray:
    """Return the logarithms of the noise levels (K,) at which the calls are made."""
    return -tableau.process.log_snr(torch.tensor(tableau.evaluation_times)).numpy()


# Of a rollout's ends (n, *shape), those of some rows of the batch: their share of the error, and
# the whole error's derivatives by them (n, *shape).
Pull = Callable[[Tensor, slice], tuple[float, Tensor]]


def backpropagate(
    tableau: Tableau,
    denoiser: Denoiser,
    noise: Tensor,
    target: Tensor,
    steps: int,
    parameters: Sequence[Tensor] = (),
) -> tuple[float, Tensor, Sensitivity]:
    """Return a rollout's squared error with its derivatives; see `pull_back` for the arguments.

    Args:
        tableau: a deterministic sampler.
        denoiser: the network; differentiable in its time.
        noise: (N, *shape) initial states z_0.
        target: (N, *shape) what the rollout should end at.
        steps: rows of the tableau to run.
        parameters: of the network.

    Returns:
        The mean over samples of ||z_steps - target||^2, z_steps (N, *shape), and the error's
        derivatives.
    """

    def pull(ends: Tensor, rows: slice) -> tuple[float, Tensor]:
        missed = ends - target[rows]
        return float(missed.double().square().sum()) / len(noise), missed * (2 / len(noise))

    pulled = pull_back(tableau, denoiser, noise, pull, steps, parameters)
    return pulled.error, pulled.ends, pulled.sensitivity


@dataclass(frozen=True)
class Pulled:
    """A rollout's error with its derivatives.

    Attributes:
        error: what was differentiated.
        ends: (N, *shape) where the rollouts end.
        sensitivity: the derivatives by the table's numbers.
        starts: (N, *shape) those by the initial states.
    """

    error: float
    ends: Tensor
    sensitivity: Sensitivity
    starts: Tensor


def pull_back(
    tableau: Tableau,
    denoiser: Denoiser,
    noise: Tensor,
    pull: Pull,
    steps: int,
    parameters: Sequence[Tensor] = (),
    by_level: bool = True,
) -> Pulled:
    """Differentiate any error of a rollout's ends.

    Args:
        tableau: a deterministic sampler.
        denoiser: the network.
        noise: (N, *shape) initial states z_0.
        pull: the error.
        steps: rows of the tableau to run.
        parameters: of the network; the error's derivatives are added to their `grad`.
        by_level: whether to differentiate by the levels at which the network is asked, which it
            then has to be differentiable in; without, they come out as 0.
    """
    sensitivity = Sensitivity.zeros(tableau.steps)
    size = chunk_size(2 * (steps + 1), noise)
    ends, starts, error = [], [], 0.0
    for first in range(0, len(noise), size):
        rows = slice(first, first + size)
        part = denoiser.at(rows)
        with torch.no_grad():
            states = list(islice(tableau.states(part, noise[rows]), steps + 1))
        share, cotangent = pull(states[-1], rows)
        error += share
        ends.append(states[-1])
        starts.append(_descend(tableau, part, states, cotangent, sensitivity, parameters, by_level))
    return Pulled(error, torch.cat(ends), sensitivity, torch.cat(starts))


def _descend(
    tableau: Tableau,
    denoiser: Denoiser,
    states: list[Tensor],
    cotangent: Tensor,
    total: Sensitivity,
    parameters: Sequence[Tensor],
    by_level: bool,
) -> Tensor:
    """Pass the adjoint from the last state to the first; add the derivatives to `total`.

    States are dropped from the list as they are passed.

    `cotangents[j]` is the error's derivative by z_{j+1}. An output's weights in later rows meet it
    when its own call is repeated, so no output is ever stored.

    Returns:
        The error's derivative by z_0.
    """
    steps = len(states) - 1
    cotangents: dict[int, Tensor] = {steps - 1: cotangent}
    by_state: list[Tensor | None] = [None] * (steps + 1)
    told = _told(tableau, cotangent.device) if by_level else None
    rows = [dict(tableau.row(j).weights) for j in range(tableau.steps)]
    first_output = [min(row, default=j) for j, row in enumerate(rows)]
    for j in reversed(range(steps)):
        if j < steps - 1:
            arrived = by_state[j + 1]
            assert arrived is not None
            cotangents[j] = arrived
            by_state[j + 1] = None
        row = tableau.row(j)
        now = cotangents[j]
        total.scale[j] += _dot(now, states[row.anchor])
        _add(by_state, row.anchor, row.scale * now)
        if row.current:
            total.current[j] += _dot(now, states[j])
            _add(by_state, j, row.current * now)
        readers = [i for i in range(j, steps) if first_output[i] <= j]
        state = states[j].detach().requires_grad_()
        time, asked = None, [state]
        if told is not None:
            time = told.times[j].detach().requires_grad_()
            asked.append(time)
        with torch.enable_grad():
            output = tableau.evaluate(denoiser, state, j, time)
        value = output.detach()
        pull = torch.zeros_like(value)
        for i in readers:
            total.weights[i, j] += _dot(cotangents[i], value)
            pull.add_(cotangents[i], alpha=rows[i].get(j, 0.0))
        torch.autograd.backward(output, pull, inputs=[*asked, *parameters])
        assert state.grad is not None
        if told is not None and time is not None and time.grad is not None:
            told.by_time[j] = time.grad
        _add(by_state, j, state.grad)
        del states[j + 1 :]
        for i in [i for i in cotangents if first_output[i] >= j]:
            del cotangents[i]
    if told is not None:
        total.levels[:] += told.by_level()
    start = by_state[0]
    assert start is not None
    return start


class _Told(NamedTuple):
    """The times that the network is told, as functions of the logarithms of their levels.

    Attributes:
        levels: (K,) those logarithms.
        times: (K,) with their graph.
        by_time: (K,) an error's derivatives.
    """

    levels: Tensor
    times: Tensor
    by_time: Tensor

    def by_level(self) -> np.ndarray:
        """Return the error's derivatives (K,) by the levels.

        By the levels, not by the times: a discrete process's times have kinks, its levels none.
        """
        (found,) = torch.autograd.grad(self.times, self.levels, self.by_time)
        return found.cpu().numpy()


def _told(tableau: Tableau, device: torch.device) -> _Told:
    """Return the times of all calls, with one graph for all of them."""
    levels = torch.from_numpy(log_levels(tableau)).to(device).requires_grad_()
    with torch.enable_grad():
        times = tableau.process.time_of_log_snr(-levels)
    return _Told(levels, times, torch.zeros_like(times))


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten().double(), b.flatten().double()))


def _add(sums: list[Tensor | None], index: int, value: Tensor) -> None:
    before = sums[index]
    sums[index] = value if before is None else before + value


def by_log_level(
    build: Callable[[Schedule], Tableau],
    schedule: Schedule,
    sensitivity: Sensitivity,
    stack: Stacks | None = None,
) -> Tensor:
    """Follow derivatives by a table's numbers back to the noise levels.

    Args:
        build: the solver's builder.
        schedule: where it was built.
        sensitivity: the derivatives at `build(schedule)`.
        stack: builds the same tables at once, where it can, for a tenth of the time.

    Returns:
        (T,) float64 derivatives by the logarithm of each level of the schedule, towards more noise
        where they jump; 0 for the first and the last one, which stay fixed.
    """
    logs = noise_levels(schedule).log()
    gradient = torch.zeros_like(logs)
    points = _points(schedule, logs)
    moved = logs.repeat(len(points) + 1, 1)
    for row, (i, shift, _) in zip(moved, points, strict=False):
        row[i] += shift
    tables = None if stack is None else stack(schedule.process, times_at(moved.exp(), schedule))
    if tables is not None:
        changes = sensitivity.along_stack(tables)
    else:
        here = build(schedule)
        changes = [
            sensitivity.along(here, build(schedule_at(row.exp(), schedule))) for row in moved[:-1]
        ]
    for (i, _, weight), change in zip(points, changes, strict=True):
        gradient[i] += weight * change
    return gradient


def _points(schedule: Schedule, logs: Tensor) -> list[tuple[int, float, float]]:
    """Return the points of the differences: which level moves, by how much, and the weight."""
    gaps = -logs.diff()
    points = []
    for i, (less, more) in enumerate(_smooth_rooms(schedule.process, logs), start=1):
        distance = _DISTANCE * min(1.0, float(gaps[i - 1 : i + 1].min()))
        stencil = _CENTRED
        if min(less, more) < 2 * distance:
            stencil = _ONE_SIDED
            distance = min(distance, max(less, more) / 4) * (1 if more >= less else -1)
        points += [(i, offset * distance, weight / distance) for offset, weight in stencil]
    return points


def _smooth_rooms(process: NoiseProcess, logs: Tensor) -> list[tuple[float, float]]:
    """Return how far each inner log level can fall, and rise, before the process bends.

    It is looked at between its neighbours.
    """
    times = time_of_level(process, logs.exp())
    kinks = process.kinks(float(times[-1]), float(times[0]))
    bends = level_of_time(process, kinks).log()
    after = torch.searchsorted(kinks, times, right=True).tolist()
    rooms = []
    for i in range(1, len(logs) - 1):
        low, high = logs[i + 1], logs[i - 1]
        if after[i] > after[i + 1]:
            low = bends[after[i] - 1]
        if after[i] < len(kinks) and kinks[after[i]] < times[i - 1]:
            high = bends[after[i]]
        rooms.append((float(logs[i] - low), float(high - logs[i])))
    return rooms
