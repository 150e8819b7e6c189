"""ConsistencyDistillation: from anywhere on a fine solver's trajectory to its end.

Song et al. (2023), "Consistency Models" (MATH.md 6.3). The consistency function f(x, t) is the
denoiser's predicted clean sample, and the identity at the last time of the grid: its boundary
condition. From pairs of states on one trajectory of the teacher's, at times t > r,

    loss = sqrt(d^2 + c^2) - c,    d^2 = mean || f_theta(y_t, t) - sg f_theta(y_r, r) ||^2

so what is known at the end spreads to all times. It is sampled by the solver `consistency`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..samplers.tableau import Tableau
from ..selection import coordinate_errors
from ..solver_learning.distillation.teacher import Teacher
from ..solvers import build_solver
from .held_out import Trajectories, pieces
from .pairs import Pair, PairDistillation, column, ddim_step
from .settings import CDSettings


class ConsistencyDistillation(PairDistillation):
    """Teach the network to jump to where its fine solver ends (Song et al. 2023).

    The pairs are on the fine solver's own trajectories from noise, so that no data is needed,
    unless states="data". The sampler adds noise, so that its samples are not those of the fine
    solver from the same noise: `errors` are those of the consistency function, at the states that
    the fine solver's trajectories have at the sampler's times, from where those end.

    Args:
        env: the environment; its schedule is the sampler's.
        denoiser: the network, trained in place; its predicted clean sample becomes the consistency
            function.
        settings: see `CDSettings`.
        arguments: single settings by name, and `Agent`'s remaining arguments.

    Raises:
        ValueError: another solver, or data is wanted where there is none; see also
            `NetworkDistillation`.
    """

    name = "cd"

    settings: CDSettings
    Settings = CDSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: CDSettings | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, **arguments)
        table = self.fine.tableau
        self._grid = np.unique(table.times)[::-1].copy()
        # The last state at a time: stages of the solver come before it.
        landings = [int(np.flatnonzero(table.times == time)[-1]) for time in self._grid[1:]]
        self._every = Teacher(table, tuple(landings))

    def _check_sampler(self) -> None:
        if self.solver != "consistency":
            raise ValueError(
                f"A consistency function is sampled by solver='consistency', not '{self.solver}'."
            )
        self._check_states()

    @property
    def _rival(self) -> Tableau:
        return build_solver("ddim", self.mdp.schedule)

    @property
    def _times(self) -> Tensor:
        return torch.tensor(self._grid)

    @property
    def _gap(self) -> int:
        # As many as halve the whole grid down to one step; half of it on data, where one step of
        # the teacher to the end is what the network says already.
        whole = (len(self._grid) - 2).bit_length()
        stages = self.settings.stages or max(whole + (self.settings.states == "teacher"), 1)
        stage = min(self._updates * stages // self.settings.rounds, stages - 1)
        return 2 ** (stages - 1 - stage)

    def _trajectories_on_grid(self) -> Trajectories:
        return self._trajectories(self._every, self.settings.batch_size, self.generator)

    def _move(
        self, states: Tensor, first: Tensor, last: Tensor, condition: Tensor | None
    ) -> Tensor:
        teacher = self.teacher.under(condition)
        return ddim_step(teacher, states, self._at(first), self._at(last))

    def losses(self, student: Denoiser, pair: Pair) -> Tensor:
        """Return the weighted distances (n,) of the function's values at the two states."""
        with torch.no_grad():
            goal = self.function(student, pair.end, pair.last)
        missed = self.function(student, pair.start, pair.first) - goal
        c = self.settings.huber
        distance = (missed.flatten(1).square().mean(1) + c**2).sqrt() - c
        return distance * self._weights(pair)

    def function(self, denoiser: Denoiser, states: Tensor, index: Tensor) -> Tensor:
        """Return f (n, *shape) at states (n, *shape), whose times have these indices (n,)."""
        end = len(self._grid) - 1
        asked = denoiser.denoised(states, self._at(index.clamp(max=end - 1)))
        return torch.where(column(index == end, states), states, asked)

    def _weights(self, pair: Pair) -> Tensor | float:
        if self.settings.weights == "even":
            return 1.0
        level = self.mdp.process.log_snr(self._times).neg().exp().to(self.device)
        gaps = level[pair.first] - level[pair.last]
        # Of a first level without end the gap is infinite, and its weight 0.
        mean = (level[:-1] - level[1:]).reciprocal().mean()
        return (gaps.reciprocal() / mean).to(pair.start)

    def _errors_of(self, denoiser: Denoiser, held_out: Trajectories) -> Tensor:
        """Return the function's errors (N,) on the fine solver's way, at the sampler's times."""
        student = denoiser.under(held_out.condition)
        times = self._tableau.times[:-1].tolist()
        states, goal = held_out.states[: len(times)], held_out.states[-1]
        errors = []
        for rows in pieces(len(goal), self.settings.execution.micro_batch_size):
            asked = student.at(rows)
            found = [asked.denoised(state[rows], t) for state, t in zip(states, times, strict=True)]
            errors.append(torch.stack([coordinate_errors(each, goal[rows]) for each in found]))
        return torch.cat(errors, dim=1).mean(0)
