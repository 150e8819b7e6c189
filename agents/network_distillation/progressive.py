"""ProgressiveDistillation: the steps are halved again and again (MATH.md 6.2).

Salimans & Ho (2022). A student of n steps starts from its teacher of 2n DDIM steps, and learns to
go in one step where those go in two, from z_t by z_t' to z_t'':

    x~ = (z_t'' - (sigma''/sigma) z_t) / (alpha'' - alpha sigma''/sigma),
    loss = max(alpha^2 / sigma^2, 1) ||x~ - D_theta(z_t, t)||^2

Then it is the teacher of n/2 steps.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...common.checkpoint import CheckpointError
from ...envs import Schedule
from ...envs.schedules.spacings import refine_times
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..samplers.tableau import Tableau
from ..solver_learning.distillation.teacher import Teacher, make_teacher
from ..solvers import build_solver
from .held_out import Trajectories
from .pairs import Pair, PairDistillation, column, ddim_step
from .settings import PDSettings

SOLVERS = ("ddim", "euler")
DEFAULT_HALVINGS = 4


class ProgressiveDistillation(PairDistillation):
    """Halve the network's DDIM steps again and again (Salimans & Ho 2022).

    From N steps to the environment's K by log2(N / K) halvings of `rounds` rounds each. The states
    are on the teacher's own way from noise, so that no data is needed, unless states="data". A last
    step to time 0 that the schedule's spacing cannot split stays whole in all halvings.

    Args:
        env: the environment; its schedule is that of the last student.
        denoiser: the network, trained in place.
        settings: see `PDSettings`.
        arguments: single settings by name, and `Agent`'s remaining arguments.

    Raises:
        ValueError: N is not K times a power of two, or so many that the first halving has nothing
            to halve; another solver than DDIM, or data is wanted where there is none; see also
            `NetworkDistillation`.
    """

    name = "pd"

    settings: PDSettings
    Settings = PDSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: PDSettings | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, **arguments)
        self.halvings = halvings(self.mdp.steps, self.settings.teacher_steps)
        self._check_halvings()
        self._made: tuple[int, Tableau, Teacher] | None = None

    def _check_sampler(self) -> None:
        super()._check_sampler()
        if self.solver not in SOLVERS or self._tableau.nfe < self._tableau.steps:
            raise ValueError(
                f"Progressive distillation halves DDIM's steps: take solver='ddim' or 'euler' "
                f"without afs, not '{self._tableau.name}'."
            )
        self._check_states()

    def _check_halvings(self) -> None:
        """Raise ValueError where the first halving, or any after it, has nothing to halve."""
        counts = [len(self._grid(2**exponent)) for exponent in range(self.halvings + 1)]
        split = [finer > coarser for coarser, finer in pairwise(counts)]
        if all(split):
            return
        steps, possible = self.mdp.steps, split.index(False)
        whole = self.settings.fine.integer_times
        why = (
            f"fine.integer_times leaves no more than {counts[possible] - 1} steps there"
            if whole
            else "its spacing does not split a step to time 0"
        )
        advice = f"take {'fewer' if whole else 'more'} steps"
        if possible:
            advice = f"take teacher_steps={steps * 2**possible} or less"
        raise ValueError(
            f"A teacher of {steps * 2**self.halvings} steps on the times of the environment's "
            f"schedule has nothing to halve at first, since {why}: {advice}."
        )

    @property
    def budget(self) -> int:
        """Rounds of all halvings."""
        return self.settings.rounds * self.halvings

    @property
    def halving(self) -> int:
        """Which halving is being trained, 0 to `halvings` - 1."""
        return self._halving_after(self._updates, self.settings.rounds)

    def _halving_after(self, updates: int, rounds: int) -> int:
        return min(updates // rounds, self.halvings - 1)

    @property
    def _judging(self) -> bool:
        return self.halving == self.halvings - 1

    @property
    def _share_done(self) -> float:
        return self._updates % self.settings.rounds / self.settings.rounds

    @property
    def _solvers(self) -> tuple[Tableau, Teacher]:
        """The student's table in this halving, and its teacher's with twice the steps."""
        if self._made is None or self._made[0] != self.halving:
            schedule, fine = self.mdp.schedule, self.settings.fine
            times = self._grid(2 ** (self.halvings - 1 - self.halving))
            student = build_solver("ddim", Schedule(schedule.process, times))
            teacher = make_teacher(student, schedule, "ddim", scale=2, integer=fine.integer_times)
            self._made = self.halving, student, teacher
        return self._made[1:]

    def _grid(self, factor: int) -> Tensor:
        """Return the schedule's times, with so many steps for each of its own."""
        schedule = self.mdp.schedule
        rho = 7.0 if schedule.recipe is None else schedule.recipe[1].get("rho", 7.0)
        whole = self.settings.fine.integer_times
        return refine_times(
            schedule.process, schedule.times, factor, schedule.spacing, whole, rho=rho
        )

    @property
    def _times(self) -> Tensor:
        return torch.tensor(self._solvers[0].times)

    def _train(self) -> dict[str, Tensor]:
        """Take a round's gradient steps; before a new halving the student is the teacher."""
        if self._updates > 0 and self._updates % self.settings.rounds == 0:
            weights = self.averaged.module.body.state_dict()
            self.teacher.body.load_state_dict(weights)
            self.teacher.conditioning = self.denoiser.conditioning
            self.denoiser.body.load_state_dict(weights)
            self.optimizer.state.clear()
        return {**super()._train(), "halving": torch.tensor(float(self.halving))}

    def _restore(self, tree: dict[str, Any], origin: str) -> None:
        """Refuse rounds with which the training would be in another halving, of another teacher."""
        there, here = tree["settings"]["rounds"], self.settings.rounds
        then, now = (self._halving_after(tree["state"]["updates"], each) for each in (there, here))
        if then != now:
            raise CheckpointError(
                f"{origin} is in halving {then + 1} of {self.halvings}, of {there} rounds each; "
                f"with rounds={here} it would be in halving {now + 1}: take the file's rounds."
            )
        super()._restore(tree, origin)

    def _trajectories_on_grid(self) -> Trajectories:
        return self._trajectories(self._solvers[1], self.settings.batch_size, self.generator)

    def _move(
        self, states: Tensor, first: Tensor, last: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Take two DDIM steps of the teacher, or one where an interval stays whole."""
        table, targets = self._solvers[1].tableau, (0, *self._solvers[1].targets)
        landing = torch.tensor(targets, device=self.device)
        times = torch.tensor(table.times, device=self.device)
        teacher = self.teacher.under(condition)
        here, there = landing[first], landing[last]
        halfway = torch.minimum(here + 1, there)
        moved = ddim_step(teacher, states, times[here], times[halfway])
        # Of a whole interval the second step leads nowhere.
        again = ddim_step(teacher, moved, times[there - 1], times[there])
        return torch.where(column(halfway == there, states), moved, again)

    def losses(self, student: Denoiser, pair: Pair) -> Tensor:
        """Return the weighted squared errors (n,) of the clean sample, per coordinate."""
        alpha, sigma = self._levels(pair.first, pair.start)
        weight = (alpha / sigma).square().flatten()
        if self.settings.weights == "truncated-snr":
            weight = weight.clamp(min=1)
        missed = student.denoised(pair.start, self._at(pair.first)) - self.target(pair)
        return weight.to(missed) * missed.flatten(1).square().mean(1)

    def target(self, pair: Pair) -> Tensor:
        """Return x~ (n, *shape), from which one DDIM step leads where the teacher's two do."""
        alpha, sigma = self._levels(pair.first, pair.start)
        alpha_s, sigma_s = self._levels(pair.last, pair.start)
        kept = sigma_s / sigma
        reached = (alpha_s - alpha * kept).to(pair.start)
        return (pair.end - kept.to(pair.start) * pair.start) / reached


def halvings(steps: int, teacher_steps: int | None) -> int:
    """Return how many halvings lead from the teacher's steps to the student's.

    Raises:
        ValueError: the former are not the latter times a power of two.
    """
    if teacher_steps is None:
        return DEFAULT_HALVINGS
    ratio = teacher_steps / steps
    found = round(math.log2(ratio)) if ratio > 1 else 0
    if found < 1 or steps * 2**found != teacher_steps:
        raise ValueError(
            f"teacher_steps must be the student's {steps} steps times a power of two, such as "
            f"{steps * 2}, {steps * 4} or {steps * 16}; got {teacher_steps}."
        )
    return found
