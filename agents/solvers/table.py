"""The table of solvers: a new one is one line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ...envs.processes import NoiseProcess
from ...envs.schedules import Schedule
from ..samplers.tableau import Output, Tableau
from .afs import afs as without_first_call
from .ddim import ddim
from .deis import deis, ipndm, lms
from .dpm_solver import dpm_solver, dpm_solver_multistep, dpm_solver_pp, dpm_solver_sde
from .heun import euler, flow_heun, heun
from .many import Stack
from .multistep import multistep_rows
from .rows import Rows, nodes_of_many
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
from .unipc import unipc, unipc_rows

if TYPE_CHECKING:
    from ..denoisers.denoiser import Denoiser

# Options of a solver or a schedule by name, as they come from a command line or a JSON file.
Options = dict[str, bool | int | float | str]

# What a solver may need of the denoiser: its Gamma, or a second head of this kind.
Need = Literal["gamma", "sn", "npr"]


@dataclass(frozen=True)
class Solver:
    """A builder under a name, with the options that the name fixes.

    Attributes:
        build: the builder.
        summary: one line for listings.
        fixed: options that the name stands for.
        to_t_min: whether it is at its best on a schedule that ends at `process.t_min`: in log-SNR
            a last step to clean data is infinitely long. Where that leaves visible noise, its
            default grid has a last step to 0 all the same, of first order.
        by_signal: whether its unknown is the log-SNR or sigma / alpha, so that its default grid
            starts where some signal is left.
        singlestep: whether it groups the schedule's times into blocks of several calls.
        needs: what `VarianceLearning` must have given the denoiser first, if anything.
        rows: nodes -> rows, of a builder of one call a step that is no more than that: it makes the
            tables of many schedules at once (`stack`).
    """

    build: Callable[..., Tableau]
    summary: str
    fixed: dict[str, Any] = field(default_factory=dict)
    to_t_min: bool = False
    by_signal: bool = False
    singlestep: bool = False
    needs: Need | None = None
    rows: Callable[..., Rows] | None = None

    @property
    def options(self) -> list[str]:
        """Names of the options that are left to choose."""
        names = list(inspect.signature(self.build).parameters)[1:]
        # An argument called as what it needs comes from the denoiser.
        names = [name for name in names if name not in self.fixed and name != self.needs]
        return [*names, "afs"]

    def __call__(
        self,
        schedule: Schedule,
        denoiser: Denoiser | None = None,
        *,
        afs: bool = False,
        **options: Any,
    ) -> Tableau:
        """Build the tableau; with `afs` the first output is guessed, see the function.

        Raises:
            ValueError: the denoiser lacks what the solver needs, or the solver takes no `afs`.
        """
        if not isinstance(afs, bool):
            raise ValueError(f"afs must be True or False, got {afs!r}.")
        if self.needs is not None:
            options |= self._needed(denoiser)
        table = self.build(schedule, **self.fixed, **options)
        return without_first_call(table) if afs else table

    def stack(self, process: NoiseProcess, times: Tensor, **options: Any) -> Stack | None:
        """Return the numbers of the tables on M schedules, times (M, K + 1).

        None where the builder makes one at a time: also with `afs`, and where no signal is left at
        the first time, which is the same for all.
        """
        if self.rows is None or "afs" in options or process.levels(float(times[0, 0]))[0] == 0:
            return None
        nodes = nodes_of_many(process, times)
        levels = np.stack([-node.log_snr for node in nodes[:-1]], axis=1)
        return self.rows(nodes, **options).stack(levels)

    def _needed(self, denoiser: Denoiser | None) -> dict[str, Any]:
        """Return the builder's arguments that come from the denoiser."""
        if self.needs == "gamma" and denoiser is not None and denoiser.gamma is not None:
            return {"gamma": denoiser.gamma}
        head = None if denoiser is None else denoiser.head
        if head is not None and head.kind == self.needs:
            return {}
        lacking = "Gamma" if self.needs == "gamma" else f"a second head of kind '{self.needs}'"
        raise ValueError(
            f"This solver needs a denoiser with {lacking}: train one with "
            f"VarianceLearning, kind='{self.needs}'."
        )


def _singlestep(build: Callable[..., Tableau], summary: str, **fixed: Any) -> Solver:
    return Solver(build, summary, fixed, to_t_min=True, by_signal=True, singlestep=True)


def _multistep(
    build: Callable[..., Tableau],
    summary: str,
    rows: Callable[..., Rows] | None = None,
    **fixed: Any,
) -> Solver:
    return Solver(build, summary, fixed, to_t_min=True, by_signal=True, rows=rows)


def _rows(order: int, output: Output) -> Callable[..., Rows]:
    return partial(multistep_rows, order=order, output=output)


# What the other method's options must be: they are not left to choose.
_PP_SINGLESTEP = {"method": "singlestep", "compat": False, "lower_order_final": None}
_PP_MULTISTEP: dict[str, Any] = {"method": "multistep", "orders": None}


SOLVERS: dict[str, Solver] = {
    "ancestral": Solver(ancestral, "DDPM's stochastic sampler on any times"),
    "fast-dpm": Solver(
        fast_dpm, "FastDPM's chain, that of schedule fast_dpm (kappa 0 to 1: noise)"
    ),
    "analytic-dpm": Solver(
        analytic_dpm, "Analytic-DPM: the best variance of each step, from Gamma", needs="gamma"
    ),
    "sn-ddpm": Solver(
        per_pixel_dpm, "SN-DDPM: the best variance of each pixel", {"head": "sn"}, needs="sn"
    ),
    "npr-ddpm": Solver(
        per_pixel_dpm,
        "NPR-DDPM: that of an imperfect network, by its residuals",
        {"head": "npr"},
        needs="npr",
    ),
    "ddim": Solver(ddim, "DDIM, first order (eta 0 to 1: noise)"),
    "euler": Solver(euler, "EDM's Euler steps: DDIM in data prediction"),
    "euler-ancestral": Solver(euler_ancestral, "Euler with noise: DDIM with eta 1"),
    "heun": Solver(heun, "EDM's sampler, second order, two calls a step", by_signal=True),
    "flow-heun": Solver(flow_heun, "Heun's method on x itself, flow matching's, two calls a step"),
    "consistency": Solver(
        consistency, "jumps to the clean sample, and noises it again: for consistency models"
    ),
    "flow-sde": Solver(
        flow_sde, "stochastic steps with a flow's marginals: Flow-GRPO's, DanceGRPO's"
    ),
    "ipndm": Solver(ipndm, "improved PNDM, orders 1 to 4"),
    "deis": Solver(
        deis, "tAB-DEIS: polynomial in the time, degrees 0 to 3", {"basis": "time"}, by_signal=True
    ),
    "rho-deis": Solver(
        deis, "rho-AB DEIS: polynomial in sigma / alpha", {"basis": "rho"}, by_signal=True
    ),
    "lms": Solver(lms, "linear multistep in sigma / alpha, orders 1 to 4", by_signal=True),
    "ipndm-v": Solver(lms, "iPNDM of variable step, which is LMS", by_signal=True),
    "dpm-solver-1": _singlestep(dpm_solver, "DPM-Solver, first order: DDIM", order=1),
    "dpm-solver-2": _singlestep(dpm_solver, "DPM-Solver singlestep, second order", order=2),
    "dpm-solver-3": _singlestep(dpm_solver, "DPM-Solver singlestep, third order", order=3),
    "dpm-solver-2m": _multistep(
        dpm_solver_multistep,
        "DPM-Solver multistep, second order",
        _rows(2, "epsilon"),
        order=2,
    ),
    "dpm-solver-3m": _multistep(
        dpm_solver_multistep,
        "DPM-Solver multistep, third order (compat: as published)",
        _rows(3, "epsilon"),
        order=3,
    ),
    "dpm-solver++-2s": _singlestep(
        dpm_solver_pp, "DPM-Solver++ singlestep, second order", order=2, **_PP_SINGLESTEP
    ),
    "dpm-solver++-3s": _singlestep(
        dpm_solver_pp, "DPM-Solver++ singlestep, third order", order=3, **_PP_SINGLESTEP
    ),
    "dpm-solver++-2m": _multistep(
        dpm_solver_pp,
        "DPM-Solver++ multistep, second order",
        _rows(2, "sample"),
        order=2,
        **_PP_MULTISTEP,
    ),
    "dpm-solver++-3m": _multistep(
        dpm_solver_pp,
        "DPM-Solver++ multistep, third order (compat: as published)",
        _rows(3, "sample"),
        order=3,
        **_PP_MULTISTEP,
    ),
    "dpm-solver++-2s-sde": _singlestep(
        dpm_solver_sde, "DPM-Solver++ 2S with noise: DPM++ SDE", order=2, **_PP_SINGLESTEP
    ),
    "dpm-solver++-2m-sde": _multistep(
        dpm_solver_sde, "DPM-Solver++ 2M with noise (eta: how much)", order=2, **_PP_MULTISTEP
    ),
    "dpm-solver++-3m-sde": _multistep(
        dpm_solver_sde,
        "DPM-Solver++ 3M with noise (compat: as published)",
        order=3,
        **_PP_MULTISTEP,
    ),
    "unipc-2": _multistep(
        unipc, "UniPC, second order, corrected to the third", partial(unipc_rows, order=2), order=2
    ),
    "unipc-3": _multistep(
        unipc, "UniPC, third order, corrected to the fourth", partial(unipc_rows, order=3), order=3
    ),
    "sa-solver": _multistep(
        sa_solver, "SA-Solver, stochastic Adams with a corrector (tau: how much noise)"
    ),
}
