"""The teacher: a solver of many steps, and which of its states each step of the student should hit.

By default the teacher's times refine the student's, so that both are compared at the same noise
level. The official code of D-ODE compares states by their index instead, and for most variants at
different noise levels (MATH.md 2.6): `align="index"`, for reproduction.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ....common.names import unknown_name
from ....envs.schedules import Schedule
from ....envs.schedules.ends import EmptyStartWarning
from ....envs.schedules.spacings import SUBSETS, refine_times
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ...solvers import SOLVERS, make_solver
from .fit import Batch, final_error

Align = Literal["time", "index"]

# A teacher is judged against this solver in this many times its steps (two calls each), on about
# so many numbers, but no fewer samples than this. It is of another kind than the default teacher:
# on a network that is rough in time, a finer run of the same solver would share its errors.
FINER_SOLVER, FINER_SCALE = "heun", 2
CHECKED_NUMBERS, CHECKED_SAMPLES = 25_000, 25

# Times that differ by less than this share are one: the states there differ by no more.
SAME_TIME = 1e-6


@dataclass(frozen=True)
class Teacher:
    """A many-step sampler with the indices (K,) of the states that the student's K rows lead to."""

    tableau: Tableau
    targets: tuple[int, ...]

    @torch.no_grad()
    def states(
        self, denoiser: Denoiser, noise: Tensor, device: torch.device | str | None = None
    ) -> Tensor:
        """Return the states (K, N, *shape) that the student's rows should lead to from `noise`.

        They are kept on another device than the noise's where one is named.
        """
        found = self.passed(denoiser, noise, device)
        return torch.stack([found[index] for index in self.targets])

    @torch.no_grad()
    def passed(
        self, denoiser: Denoiser, noise: Tensor, device: torch.device | str | None = None
    ) -> dict[int, Tensor]:
        """Return each of those states (N, *shape) once, by its index."""
        wanted = set(self.targets)
        states = enumerate(self.tableau.states(denoiser, noise))
        return {index: state.to(device) for index, state in states if index in wanted}

    @property
    def memoryless(self) -> bool:
        """Whether no step reads an output from before the state that it starts from.

        Then its steps may be as uneven as those that pass the times of many tables.
        """
        weights = self.tableau.sparse_weights
        starts = np.array([self.tableau.anchor(j) for j in range(self.tableau.steps)])
        return bool((weights.columns >= starts[weights.rows]).all())


def make_teacher(
    student: Tableau,
    schedule: Schedule,
    solver: str,
    options: dict[str, Any] | None = None,
    scale: int = 10,
    align: Align = "time",
    integer: bool = False,
    times: Sequence[float] | None = None,
    others: Sequence[Tableau] = (),
) -> Teacher:
    """Build a teacher for a student's tableau.

    Args:
        student: the base solver.
        schedule: the schedule it was built on, for its spacing.
        solver: the teacher's solver, a key of `SOLVERS`; deterministic.
        options: of that solver.
        scale: C, the teacher's steps for each step of the student.
        align: "time" or "index". With "index" the student's j-th state is compared with the
            teacher's C j-th, on a schedule of the same recipe with C times the student's calls, or
            as many as there are noisings.
        integer: round the teacher's times to whole noisings, for networks that know no others.
        times: of the teacher, with "time", in place of those that refine the student's: where the
            student's are very uneven, a refinement is crude between two that lie far apart. The
            nearest of them are moved onto the student's.
        others: tables between the same ends that it is to teach on the same way, with "time": the
            nearest of its times are moved onto theirs, and its targets are the student's rows, then
            those of each of them. For a teacher that is `memoryless`; `orders` of its blocks are
            those of the solver's name.

    Raises:
        ValueError: an unknown name, a scale below 1, a stochastic teacher, or index alignment on a
            schedule without a recipe, with a teacher of more than one call a step, or with others.
    """
    if align not in get_args(Align):
        raise unknown_name("align", align, get_args(Align))
    if scale < 1:
        raise ValueError(f"scale, the teacher's steps a student's step, must be >= 1; got {scale}.")
    if align == "time":
        nodes = np.unique(student.times)[::-1].copy()
        rho = schedule.recipe[1].get("rho", 7.0) if schedule.recipe else 7.0
        fine: Any = times
        if times is None:
            fine = refine_times(
                schedule.process, nodes.tolist(), scale, schedule.spacing, integer, rho=rho
            )
        taught = (student, *others)
        options = {**(options or {})}
        if others:
            options.pop("orders", None)
        if times is not None or others:
            fine = _moved_onto(_distinct([table.times for table in taught]), np.asarray(fine))
        tableau = _on_every_time(solver, Schedule(schedule.process, fine), options)
        targets = [_landing(tableau, time) for table in taught for time in table.times[1:]]
    else:
        if others:
            raise ValueError("align='index' compares with one student: give no others.")
        if schedule.recipe is not None and schedule.recipe[0] in SUBSETS:
            # Whole noisings: there are no more of them than there are.
            scale = min(scale, int(schedule.process.t_max) // student.steps)
        fine = schedule.respaced(scale * student.steps)
        tableau = _on_every_time(solver, fine, options or {})
        if tableau.steps != fine.steps:
            raise ValueError("align='index' needs a teacher with one network call a step.")
        targets = [scale * (j + 1) for j in range(student.steps)]
    if not tableau.linear:
        raise ValueError(
            f"The teacher '{tableau.name}' adds noise or clamps its predictions; take a "
            "deterministic one without clip."
        )
    return Teacher(tableau, tuple(targets))


@torch.no_grad()
def errors_against_finer(
    teacher: Teacher,
    student: Tableau,
    schedule: Schedule,
    scale: int,
    denoiser: Denoiser,
    noise: Tensor,
    integer: bool = False,
    condition: Tensor | None = None,
    micro_batch_size: int | None = None,
) -> tuple[float, float]:
    """Measure a teacher and the student's base solver against a much finer solver.

    Args:
        teacher: the teacher.
        student: the base solver.
        schedule: the schedule it was built on.
        scale: the teacher's steps for each of the student's.
        denoiser: the network.
        noise: (N, *shape) of which no more is used than needed.
        integer: round the finer solver's times to whole noisings.
        condition: the conditions (N, ...) of a conditional environment.
        micro_batch_size: most samples that the network sees at once.

    Returns:
        The mean squared errors per coordinate of the finished samples of teacher and student.
    """
    rows = slice(max(CHECKED_NUMBERS // noise[0].numel(), CHECKED_SAMPLES))
    checked = noise[rows]
    with warnings.catch_warnings():
        # It has to start where the student does, and in very many steps it may.
        warnings.simplefilter("ignore", EmptyStartWarning)
        finer = make_teacher(
            student, schedule, FINER_SOLVER, scale=FINER_SCALE * scale, integer=integer
        )
    truth = []
    for first in range(0, len(checked), micro_batch_size or len(checked)):
        piece = slice(first, first + (micro_batch_size or len(checked)))
        under = None if condition is None else condition[rows][piece]
        ends = finer.states(denoiser.under(under), checked[piece])[-1]
        truth.append(Batch(checked[piece], ends.unsqueeze(0), under))
    return (
        final_error(teacher.tableau, denoiser, truth),
        final_error(student, denoiser, truth),
    )


def judge_teacher(
    teacher: Teacher,
    student: Tableau,
    schedule: Schedule,
    scale: int,
    denoiser: Denoiser,
    noise: Tensor,
    integer: bool = False,
    condition: Tensor | None = None,
    micro_batch_size: int | None = None,
) -> float:
    """Return the teacher's error of `errors_against_finer`; warn unless the student's is larger."""
    error, base = errors_against_finer(
        teacher, student, schedule, scale, denoiser, noise, integer, condition, micro_batch_size
    )
    if error >= base > 0:
        warnings.warn(
            f"The teacher {teacher.tableau.name} of {teacher.tableau.nfe} calls is no better than "
            f"{student.name} of {student.nfe}: their mean squared errors are {error:.2e} and "
            f"{base:.2e}. Take a larger scale or a teacher of higher order, such as dpm-solver-3m "
            "or heun.",
            stacklevel=3,
        )
    return error


def _on_every_time(solver: str, schedule: Schedule, options: dict[str, Any]) -> Tableau:
    """Build a solver whose states land on every time of the schedule.

    A singlestep solver would group the times into blocks, with cruder stages between their ends:
    here each step is a block of its own.
    """
    if solver in SOLVERS and SOLVERS[solver].singlestep and "orders" not in options:
        orders = [SOLVERS[solver].fixed["order"]] * schedule.steps
        if schedule.times[-1] == 0:
            orders[-1] = 1
        options = {**options, "orders": orders}
    return make_solver(solver, schedule, **options)


def _distinct(times: Sequence[np.ndarray]) -> np.ndarray:
    """Return all times, descending, without those that differ from another by rounding only."""
    found = np.unique(np.concatenate(times))[::-1]
    # The last one stays, and an earlier one that it would hide goes.
    apart = found[:-1] - found[1:] > SAME_TIME * found[:-1]
    return found[np.append(apart, True)]


def _moved_onto(nodes: np.ndarray, times: np.ndarray) -> list[float]:
    """Return the nodes, and descending times between them but for those nearest to a node."""
    inner = times[(times < nodes[0]) & (times > nodes[-1])]
    nearest = {int(np.abs(inner - node).argmin()) for node in nodes[1:-1]} if len(inner) else set()
    kept = [time for i, time in enumerate(inner.tolist()) if i not in nearest]
    return sorted({*kept, *nodes.tolist()}, reverse=True)


def _landing(tableau: Tableau, time: float) -> int:
    """Return the state that a step ends with at this time: the last one, stages come before it.

    Raises:
        ValueError: no step ends there.
    """
    distance = np.abs(tableau.times - time)
    if distance.min() > SAME_TIME * time:
        raise ValueError(f"The teacher '{tableau.name}' does not pass the time {time:g}.")
    return int(np.flatnonzero(distance == distance.min())[-1])
