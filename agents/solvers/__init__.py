"""Solvers: pure functions `(schedule, **options) -> Tableau`, also by name with `make_solver`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...common.arguments import checked
from ...common.names import unknown_name
from ...envs.schedules import Schedule
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau
from .afs import afs
from .ddim import ddim
from .defaults import default_schedule, default_solver_options
from .deis import deis, ipndm, lms
from .dpm_solver import dpm_solver, dpm_solver_multistep, dpm_solver_pp, dpm_solver_sde
from .heun import euler, flow_heun, heun
from .singlestep import singlestep_orders
from .stochastic import (
    analytic_dpm,
    ancestral,
    consistency,
    euler_ancestral,
    fast_dpm,
    flow_sde,
    per_pixel_dpm,
    sa_solver,
)
from .table import SOLVERS, Options, Solver
from .unipc import unipc


@checked
def make_solver(
    name: str, schedule: Schedule, denoiser: Denoiser | None = None, **options: Any
) -> Tableau:
    """Build the named solver's tableau on a schedule, as `fewstep sample` does.

    Args:
        name: a key of `SOLVERS`.
        schedule: the times.
        denoiser: the network that will be asked. What it says of how to sample from it is the
            default of the options (`default_solver_options`), and some solvers need its Gamma or
            its second head.
        options: of the solver. All that add no noise take `afs=True`, which spares the first call.

    The schedule's steps are the network calls a sample costs, except for "heun" and "flow-heun",
    which take two a step, and with `afs`; `tableau.nfe` says. `solver_within` chooses the steps for
    a budget.

    Raises:
        ValueError: a solver or an option that does not exist, the message lists those that do; or
            the denoiser lacks what the solver needs.
    """
    return build_solver(
        name,
        schedule,
        denoiser,
        **(default_solver_options(name, denoiser, given=options) | options),
    )


@checked
def build_solver(
    name: str, schedule: Schedule, denoiser: Denoiser | None = None, **options: Any
) -> Tableau:
    """Build the named solver with these options and its own defaults for the others.

    What the denoiser says of how to sample from it has no say, as for a sampler that is trained:
    SFT-PG's chain is Gaussian around a mean that is linear in the network's output, and
    distillation needs solvers that are linear in it.

    Args:
        name: see `make_solver`, which has the same arguments and errors.
        schedule: the times.
        denoiser: only solvers that `need` something of it look.
        options: of the solver.
    """
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    solver = SOLVERS[name]
    for option in options:
        if option not in solver.options:
            raise unknown_name(f"option of solver '{name}'", option, solver.options)
    try:
        return solver(schedule, denoiser, **options)
    except TypeError as error:
        raise ValueError(
            f"An option of solver '{name}' has a wrong type: {options} ({error})."
        ) from None


@checked
def solver_within(
    name: str,
    nfe: int,
    schedule_of: Callable[[int], Schedule] | None = None,
    denoiser: Denoiser | None = None,
    **options: Any,
) -> Tableau:
    """Build the named solver with a budget of exactly `nfe` network calls a sample.

    Args:
        name: a key of `SOLVERS`.
        nfe: the budget.
        schedule_of: steps -> schedule; None takes `default_schedule` on the denoiser's process.
        denoiser: see `make_solver`.
        options: of the solver.

    Raises:
        TypeError: neither schedules nor a denoiser.
        ValueError: as `make_solver`; or no number of steps costs exactly that.
    """
    if schedule_of is None:
        if denoiser is None:
            raise TypeError("Give schedule_of, or the denoiser that the schedules are for.")
        process = denoiser.process

        def schedule_of(steps: int) -> Schedule:
            return default_schedule(name, process, steps)

    costs = set()
    # What afs saves goes into one more step. Heun's methods take two calls a step, one to time 0,
    # and EDM's one where no signal is left.
    calls = nfe + (options.get("afs") is True)
    for steps in dict.fromkeys((calls, (calls + 1) // 2, (calls + 2) // 2)):
        tableau = make_solver(name, schedule_of(steps), denoiser, **options)
        if tableau.nfe == nfe:
            return tableau
        costs.add(tableau.nfe)
    nearest = sorted(costs, key=lambda cost: (abs(cost - nfe), cost))[:2]
    near = " or ".join(str(cost) for cost in sorted(nearest))
    raise ValueError(
        f"{name} cannot spend exactly {nfe} network calls on this kind of schedule, but {near}."
    )


__all__ = [
    "SOLVERS",
    "Options",
    "Solver",
    "afs",
    "analytic_dpm",
    "ancestral",
    "build_solver",
    "consistency",
    "ddim",
    "default_schedule",
    "default_solver_options",
    "deis",
    "dpm_solver",
    "dpm_solver_multistep",
    "dpm_solver_pp",
    "dpm_solver_sde",
    "euler",
    "euler_ancestral",
    "fast_dpm",
    "flow_heun",
    "flow_sde",
    "heun",
    "ipndm",
    "lms",
    "make_solver",
    "per_pixel_dpm",
    "sa_solver",
    "singlestep_orders",
    "solver_within",
    "unipc",
]
