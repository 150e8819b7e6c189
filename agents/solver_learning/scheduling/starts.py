"""Where the levels start: a named grid, the environment's own, or what a programme finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ....envs import Schedule
from ....envs.schedules.dmn import optimal_log_snrs
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ...solvers import make_solver
from .aligned import aligned_programme
from .amplification import amplified_programmes
from .levels import LevelMap, check_levels, even_schedule, noise_levels, schedule_at
from .pool import Pool
from .programmes import chord_programme, trajectory_programme

Programme = Literal["diffusion-dp", "trajectory-dp", "gits", "ays"]
ENVIRONMENT, DMN = "environment", "dmn"

# The dynamic programmes choose from a grid of so many levels, those that see the end from a coarser
# one: there may be a cost for each triple of them.
GRID, COARSE_GRID = 200, 100


def starting_schedule(here: Schedule, start: str, integer_times: bool) -> Schedule:
    """Return the schedule to start from, or for the programmes the one that gives the ends.

    Args:
        here: the environment's.
        start: a programme, a grid's name, "dmn", or "environment".
        integer_times: keep the environment's, whose times are whole.

    Raises:
        ValueError: fewer than three noise levels, or times that should be whole and are not.
    """
    check_levels(noise_levels(here))
    if integer_times:
        if not torch.equal(here.times, here.times.round()):
            raise ValueError(
                "integer_times needs an environment whose schedule has whole times, such as "
                "'trailing' or 'uniform'."
            )
        return here
    if start == ENVIRONMENT:
        return here
    if start == DMN:
        return optimal_schedule(here)
    return even_schedule(here, "karras" if start in get_args(Programme) else start)


def optimal_schedule(like: Schedule) -> Schedule:
    """Return DMN's times (Xue et al. 2024) between the ends of another schedule, as many."""
    levels = noise_levels(like)
    even = torch.linspace(0, 1, len(levels), dtype=levels.dtype)
    start = torch.lerp(-levels[0].log(), -levels[-1].log(), even)
    return schedule_at((-optimal_log_snrs(start)).exp(), like)


@dataclass(frozen=True)
class LevelProgramme:
    """Levels that a dynamic programme finds: those of the least errors along trajectories.

    Attributes:
        like: a schedule of as many levels, with the same ends.
        integer_times: choose from whole times only.
    """

    like: Schedule
    integer_times: bool

    @property
    def count(self) -> int:
        """How many levels there are."""
        return len(noise_levels(self.like))

    def grid(self, size: int = GRID) -> Schedule:
        """Return the times to choose from, even on Karras's scale."""
        ends = noise_levels(self.like)
        even = LevelMap(float(ends[-1]), float(ends[0]))
        grid = schedule_at(even.levels(torch.ones(size - 2, dtype=torch.float64)), self.like)
        if not self.integer_times:
            return grid
        return Schedule(grid.process, grid.times.round().unique().flip(0))

    def levels(self, pool: Pool, denoiser: Denoiser, student: Tableau) -> list[Tensor]:
        """Find levels (T,), descending; of several answers the best has to be tried out.

        Args:
            pool: the source of noise and data, and of the network whose trajectories count.
            denoiser: the network that samples, whose errors on data count.
            student: the solver on some schedule of as many levels.
        """
        count, generator = self.count, pool.fresh_generator()
        condition = pool.mdp.episodes(pool.batch_size, generator).condition
        network = pool.denoiser.under(condition)
        noise = pool.mdp.initial(pool.batch_size, generator)
        teacher = make_solver("dpm-solver-2m", self.grid())
        plain = trajectory_programme(teacher, network, noise, count)
        teacher = make_solver("dpm-solver-2m", self.grid(COARSE_GRID))
        orders = [_outputs_read(student, j) for j in range(count - 1)]
        return [
            plain,
            *amplified_programmes(teacher, student.output, network, noise, orders, generator),
        ]


class ChordProgramme(LevelProgramme):
    """The levels that GITS chooses, see `chord_programme`."""

    def levels(self, pool: Pool, denoiser: Denoiser, student: Tableau) -> list[Tensor]:
        """See `LevelProgramme.levels`."""
        generator = pool.fresh_generator()
        condition = pool.mdp.episodes(pool.batch_size, generator).condition
        noise = pool.mdp.initial(pool.batch_size, generator)
        teacher = make_solver("dpm-solver-2m", self.grid())
        network = pool.denoiser.under(condition)
        return [chord_programme(teacher, network, noise, self.count)]


class AlignedProgramme(LevelProgramme):
    """The levels of the least bound of Align Your Steps, on the teacher's finished samples."""

    def levels(self, pool: Pool, denoiser: Denoiser, student: Tableau) -> list[Tensor]:
        """See `LevelProgramme.levels`."""
        times, batch = self.grid().times, pool.fitted[0]
        network = denoiser.under(batch.condition)
        clean, generator = batch.finished, pool.fresh_generator()
        return [aligned_programme(network, times[times > 0], clean, self.count, generator)]


PROGRAMMES: dict[str, type[LevelProgramme]] = {
    "trajectory-dp": LevelProgramme,
    "gits": ChordProgramme,
    "ays": AlignedProgramme,
}


def _outputs_read(student: Tableau, jump: int) -> int:
    """Return how many outputs a jump of a solver reads; 2 for one with calls between its levels."""
    rows = len(student.weights)
    if student.one_step:
        return 1
    multistep = all(student.anchor(j) == j for j in range(rows))
    return int(np.count_nonzero(student.weights[jump])) if multistep else 2
