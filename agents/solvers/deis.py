"""DEIS and iPNDM (Zhang & Chen 2023): the predicted noise extrapolated from the last outputs.

DEIS extrapolates by a polynomial, and integrates it exactly (MATH.md 1.5, 1.8):

    x_{i+1} = (alpha_{i+1} / alpha_i) x_i + sum_j C_ij epsilon_{i-j},
    C_ij = alpha_{i+1} * Integral_{rho_i}^{rho_{i+1}} l_j drho

with rho = sigma / alpha and l_j Lagrange's basis on the last nodes, a polynomial in the time
("time", tAB-DEIS) or in rho itself ("rho", Adams-Bashforth of variable step, which k-diffusion
calls LMS and diff-sampler iPNDM of variable step). A polynomial in the
log-SNR is `dpm_solver_multistep(order=3, solver_type="taylor")`. iPNDM takes the Adams-Bashforth
weights of equal steps on any grid (MATH.md 1.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from ...common.arguments import checked
from ...envs.processes import NoiseProcess
from ...envs.schedules import Schedule
from ..samplers.tableau import Tableau
from .exponential import coefficient, scale
from .rows import Node, Rows, check_budget, check_order, nodes_of

Basis = Literal["time", "rho"]

# Gauss-Legendre on panels where the integrand is analytic well beyond the panel: 16 points are
# exact to rounding.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@checked
def deis(schedule: Schedule, order: int = 3, basis: Basis = "time") -> Tableau:
    """Build DEIS (Zhang & Chen 2023), a linear multistep solver in noise prediction.

    Args:
        schedule: the times; it may end at 0.
        order: degree of the polynomial, 0 (DDIM) to 3; the first steps use lower degrees. Papers
            disagree: Kim, Tang & Yu (2024) count so, others count the points, order + 1.
        basis: what the polynomial is in: "time" or "rho".

    Raises:
        ValueError: no such order or basis, or fewer steps than the polynomial has points.
    """
    check_order(order, range(4), "DEIS")
    name = f"deis-{order}" if basis == "time" else f"rho-deis-{order}"
    check_budget(schedule.steps, order + 1, name)
    nodes = nodes_of(schedule)
    time_of_rho = _time_of_rho(schedule.process)
    rows = Rows()
    for i in range(schedule.steps):
        start, end = nodes[i], nodes[i + 1]
        if start.alpha == 0:
            # Noise prediction has no step from there: see `Rows.tableau`.
            rows.add(start.time, 0.0, {i: 0.0})
            continue
        rho, weight = _quadrature(schedule.process, start, end)
        known = nodes[max(i - order, 0) : i + 1][::-1]
        if basis == "rho":
            known = [node for node in known if node.alpha > 0]
        if basis == "time":
            basis_values = _lagrange([node.time for node in known], time_of_rho(rho))
        else:
            basis_values = _lagrange([node.rho for node in known], rho)
        coefficients = end.alpha * basis_values @ weight
        rows.add(
            start.time,
            scale(start, end, "epsilon"),
            {i - back: float(value) for back, value in enumerate(coefficients)},
        )
    return rows.tableau(name, schedule.process, nodes[-1].time, "epsilon")


@checked
def lms(schedule: Schedule, order: int = 4) -> Tableau:
    """Build LMS, linear multistep in sigma / alpha: `deis` in rho by the number of its points.

    k-diffusion's LMS integrates Lagrange's polynomial of the slopes d xbar / d rho = epsilon, and
    so does iPNDM of variable step (`ipndm_v` of diff-sampler), in closed form: MATH.md 1.5.

    Args:
        schedule: the times; it may end at 0.
        order: 1 (DDIM) to 4 points; the first steps use fewer.

    Raises:
        ValueError: no such order, or fewer steps than the order.
    """
    check_order(order, range(1, 5), "LMS")
    check_budget(schedule.steps, order, f"LMS of order {order}")
    return deis(schedule, order - 1, "rho").replace(name=f"lms-{order}")


def _quadrature(process: NoiseProcess, start: Node, end: Node) -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights for integrals over rho from `start` down to `end`."""
    kinks = process.kinks(end.time, start.time)
    at_kinks = (process.sigma(kinks) / process.alpha(kinks)).numpy()
    # t(rho) has singularities at a distance of about 1 + rho from the real axis.
    octaves = 2.0 ** np.arange(-1, 64)
    inner = np.concatenate([at_kinks, octaves])
    inner = inner[(inner > end.rho) & (inner < start.rho)]
    edges = np.unique(np.concatenate([[start.rho, end.rho], inner]))[::-1]
    half = np.diff(edges)[:, None] / 2
    points = (edges[:-1, None] + half) + half * _POINTS
    return points.ravel(), (half * _WEIGHTS).ravel()


def _lagrange(nodes: list[float], points: np.ndarray) -> np.ndarray:
    """Return the basis polynomials of the nodes at the points, (len(nodes), len(points))."""
    values = np.ones((len(nodes), len(points)))
    for j, own in enumerate(nodes):
        for other in nodes[:j] + nodes[j + 1 :]:
            values[j] *= (points - other) / (own - other)
    return values


def _time_of_rho(process: NoiseProcess) -> Callable[[np.ndarray], np.ndarray]:
    def time_of_rho(rho: np.ndarray) -> np.ndarray:
        return process.time_of_log_snr(-torch.from_numpy(rho).log()).numpy()

    return time_of_rho


# Weights on the newest output first, for equal steps; used as they stand on any grid.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@checked
def ipndm(schedule: Schedule, order: int = 4) -> Tableau:
    """Build iPNDM: linear multistep in noise prediction, without PNDM's costly warm-up.

    Args:
        schedule: the times; it may end at 0.
        order: 1 (DDIM) to 4; the first steps use lower orders.

    Raises:
        ValueError: no such order, or fewer steps than the order.
    """
    check_order(order, range(1, 5), "iPNDM")
    check_budget(schedule.steps, order, f"iPNDM of order {order}")
    nodes = nodes_of(schedule)
    rows = Rows()
    for i in range(schedule.steps):
        start, end = nodes[i], nodes[i + 1]
        c1 = coefficient(1, start, end, "epsilon")
        weights = ADAMS_BASHFORTH[min(i + 1, order) - 1]
        rows.add(
            start.time,
            scale(start, end, "epsilon"),
            {i - back: c1 * weight for back, weight in enumerate(weights)},
        )
    return rows.tableau(f"ipndm-{order}", schedule.process, nodes[-1].time, "epsilon")
