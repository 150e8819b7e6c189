"""A base solver's tables as a function of the schedule, one or many at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ....envs.processes import NoiseProcess
from ....envs.schedules import Schedule
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ...solvers import SOLVERS, Options, build_solver
from ...solvers.many import Stack


@dataclass(frozen=True)
class Builder:
    """A named solver with its options.

    Attributes:
        solver: key of `SOLVERS`.
        denoiser: the network, of which some solvers need something.
        options: of the solver.
    """

    solver: str
    denoiser: Denoiser
    options: Options

    def __call__(self, schedule: Schedule) -> Tableau:
        """Build the table on a schedule."""
        return build_solver(self.solver, schedule, self.denoiser, **self.options)

    def stack(self, process: NoiseProcess, times: Tensor) -> Stack | None:
        """Return the numbers of the tables at times (M, K + 1); None where that is not done."""
        return SOLVERS[self.solver].stack(process, times, **self.options)
