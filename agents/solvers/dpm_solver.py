"""DPM-Solver and DPM-Solver++, singlestep, multistep and with noise: the public builders.

C. Lu et al., "DPM-Solver" (2022a) and "DPM-Solver++" (2022b); MATH.md 1.4, 1.6, 1.7, 1.14.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ...common.arguments import checked
from ...envs.schedules import Schedule
from ..samplers.tableau import Tableau
from .multistep import multistep
from .rows import check_order
from .singlestep import SolverType, singlestep

Method = Literal["multistep", "singlestep"]


@checked
def dpm_solver(
    schedule: Schedule,
    order: int = 2,
    solver_type: SolverType = "dpmsolver",
    orders: Sequence[int] | None = None,
) -> Tableau:
    """Build DPM-Solver singlestep, in noise prediction.

    Args:
        schedule: by default its K steps are the budget of network calls: `singlestep_orders`
            groups them into blocks, and the times inside a block are those of its inner stages. A
            schedule that ends at time 0 ends with a block of order 1.
        order: 1, 2 or 3.
        solver_type: how differences of outputs stand for derivatives, as published: "dpmsolver"
            or "taylor".
        orders: the order of each step instead, every step being a block of its own with stages
            evenly spaced in log-SNR. The published log-SNR grid is
            `orders=singlestep_orders(nfe, 3)` on `Schedule.log_snr(process, len(orders))`.

    Raises:
        ValueError: no such order or type, fewer steps than the order, orders that do not fit the
            steps, or a block of order 2 or 3 that ends at time 0.
    """
    return singlestep(f"dpm-solver-{order}", schedule, order, solver_type, orders, "epsilon")


@checked
def dpm_solver_pp(
    schedule: Schedule,
    order: int = 2,
    method: Method = "multistep",
    solver_type: SolverType = "dpmsolver",
    orders: Sequence[int] | None = None,
    compat: bool = False,
    lower_order_final: bool | None = None,
) -> Tableau:
    """Build DPM-Solver++, in data prediction: 2M and 3M, or 2S and 3S.

    Args:
        schedule: the times.
        order: 1, 2 or 3.
        method: "multistep", one network call a step, or "singlestep", see `dpm_solver`.
        solver_type: "dpmsolver" or "taylor".
        orders: of singlestep blocks, see `dpm_solver`.
        compat: of multistep, see `dpm_solver_multistep`.
        lower_order_final: of multistep, see `dpm_solver_multistep`.

    Raises:
        ValueError: as `dpm_solver`; or no such method, or an option of the other method.
    """
    return _data_prediction(schedule, order, method, solver_type, orders, compat, lower_order_final)


@checked
def dpm_solver_multistep(
    schedule: Schedule,
    order: int = 2,
    solver_type: SolverType = "dpmsolver",
    compat: bool = False,
    lower_order_final: bool | None = None,
) -> Tableau:
    """Build DPM-Solver multistep in noise prediction, 2M or 3M.

    Args:
        schedule: the times; a last step to time 0 is of first order.
        order: 1, 2 or 3. Order 3 with `solver_type="taylor"` is Adams-Bashforth in log-SNR.
        solver_type: of the steps of second order: "dpmsolver" or "taylor".
        compat: the third-order formula as published, which lacks a factor 2 and converges at
            order 2 only.
        lower_order_final: lower the order of the last steps; None does so on fewer than 10 steps,
            as published, and for order 3 on fewer than 15.

    Raises:
        ValueError: no such order or type, or fewer steps than the order.
    """
    name = f"dpm-solver-{order}m"
    return multistep(name, schedule, order, solver_type, compat, lower_order_final, "epsilon")


@checked
def dpm_solver_sde(
    schedule: Schedule,
    order: int = 2,
    eta: float = 1.0,
    method: Method = "multistep",
    solver_type: SolverType = "dpmsolver",
    orders: Sequence[int] | None = None,
    compat: bool = False,
    lower_order_final: bool | None = None,
) -> Tableau:
    """Build SDE-DPM-Solver++ (Lu et al. 2022b, on diffusion SDEs; k-diffusion): 2M, 3M or 2S SDE.

        x_t = (sigma_t / sigma_s) e^(-eta h) x_s - alpha_t E_1(-(1 + eta) h) D_s + ...
              + sigma_t sqrt(1 - e^(-2 eta h)) noise

    in data prediction: `dpm_solver_pp` with (1 + eta) h for h in the terms of the outputs. With any
    eta the exact solution has the same distributions. Order 1 with eta 1 is `ancestral` with the
    small variance.

    Args:
        schedule: the times; a last step to time 0 is of first order and adds no noise.
        order: 1, 2 or, of multistep, 3, of the drift. What the noise does inside a step is
            extrapolated as well: on Gaussian data the standard deviation converges at order 2.
        eta: how much noise the SDE adds, at least 0: 1 is the time reversal of the process, 0 is
            `dpm_solver_pp`.
        method: "multistep", or "singlestep", k-diffusion's "DPM++ SDE", with the noise of a block's
            stage kept in its end as one Wiener process would have it.
        solver_type: of the steps of second order: "dpmsolver" or "taylor".
        orders: of singlestep blocks, see `dpm_solver`.
        compat: of multistep, see `dpm_solver_multistep`; True is k-diffusion's 3M SDE.
        lower_order_final: of multistep, see `dpm_solver_multistep`; with noise None lowers them on
            any number of steps.

    Raises:
        ValueError: as `dpm_solver_pp`; or eta negative or not finite.
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be a finite number >= 0, got {eta}.")
    if method == "singlestep":
        check_order(order, (1, 2), "SDE-DPM-Solver++ singlestep")
    return _data_prediction(
        schedule, order, method, solver_type, orders, compat, lower_order_final, eta
    )


def _data_prediction(
    schedule: Schedule,
    order: int,
    method: Method,
    solver_type: SolverType,
    orders: Sequence[int] | None,
    compat: bool,
    lower_order_final: bool | None,
    eta: float | None = None,
) -> Tableau:
    """Build DPM-Solver++, or its SDE version where there is an eta."""
    name = f"dpm-solver++-{order}{method[0]}"
    if eta is not None:
        name += "-sde" + (f" (eta {eta:g})" if eta != 1 else "")
    noise = eta or 0.0
    if method == "singlestep":
        if compat or lower_order_final is not None:
            raise ValueError("compat and lower_order_final belong to method='multistep'.")
        return singlestep(name, schedule, order, solver_type, orders, "sample", noise)
    if orders is not None:
        raise ValueError("orders belongs to method='singlestep'.")
    return multistep(name, schedule, order, solver_type, compat, lower_order_final, "sample", noise)
