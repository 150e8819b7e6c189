"""Measured orders of convergence on Gaussian data, whose exact solution is known (MATH.md A.1).

The first step of a multistep solver is DDIM, whose error would cap the order at 2; from a noise
level far above the data it is too small to matter here.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.solvers import (
    ddim,
    deis,
    dpm_solver,
    dpm_solver_multistep,
    dpm_solver_pp,
    euler,
    heun,
    ipndm,
    lms,
    unipc,
)
from fewstep.envs import VE, Schedule

pytestmark = pytest.mark.numeric

MEAN, STD = 0.4, 0.5


class Gaussian(nn.Module):
    """The exact noise prediction for data N(MEAN, STD^2)."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, sample, time):
        alpha, sigma = self.process.alpha(time), self.process.sigma(time)
        variance = alpha**2 * STD**2 + sigma**2
        return (sample - alpha[:, None] * MEAN) * (sigma / variance)[:, None]


def error(build, schedule):
    alpha, sigma = schedule.levels()
    spread = np.hypot(alpha * STD, sigma)
    start = alpha[0] * MEAN + 1.3 * sigma[0]
    exact = alpha[-1] * MEAN + spread[-1] / spread[0] * (start - alpha[0] * MEAN)
    denoiser = Denoiser(Gaussian(schedule.process), schedule.process)
    state = torch.tensor([[start]], dtype=torch.float64)
    return abs(float(build(schedule).sample(denoiser, state)) - exact)


def multistep(build, order, **options):
    return lambda s: build(s, order, lower_order_final=False, **options)


def singlestep(build, order, **options):
    return lambda s: build(s, order, orders=[order] * s.steps, **options)


PP = {"method": "singlestep"}
SOLVERS = {
    "ddim": (ddim, 1),
    "euler": (euler, 1),
    "heun": (heun, 2),
    "heun-epsilon": (lambda s: heun(s, output="epsilon"), 2),
    "ipndm-2": (lambda s: ipndm(s, 2), 2),
    "budget-2": (dpm_solver, 2),
    **{
        f"{name}-{order}-{kind}": (make(build, order, solver_type=kind, **options), order)
        for name, make, build, options in (
            ("dpm", singlestep, dpm_solver, {}),
            ("++s", singlestep, dpm_solver_pp, PP),
            ("m", multistep, dpm_solver_multistep, {}),
            ("++m", multistep, dpm_solver_pp, {}),
        )
        for order in (2, 3)
        for kind in ("dpmsolver", "taylor")
    },
    "tab-1": (lambda s: deis(s, 1), 2),
    "tab-2": (lambda s: deis(s, 2), 3),
    "tab-3": (deis, 4),
    "rab-2": (lambda s: deis(s, 2, "rho"), 3),
    "rab-3": (lambda s: deis(s, 3, "rho"), 4),
    "lms-3": (lambda s: lms(s, 3), 3),
    "lms-4": (lms, 4),
    # The corrector raises the order by one.
    **{
        f"unipc-{order}-{kind}-{output}": (
            multistep(unipc, order, solver_type=kind, output=output),
            order + 1,
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
        for output in ("sample", "epsilon")
    },
    **{f"unip-{k}": (multistep(unipc, k, corrector=False), k) for k in (1, 2, 3)},
    # Without the factor 2 on the second difference the third order is a second (MATH.md 1.7).
    "m-3-compat": (multistep(dpm_solver_multistep, 3, compat=True), 2),
    "++m-3-compat": (multistep(dpm_solver_pp, 3, compat=True), 2),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name, smooth_vp):
    build, expected = SOLVERS[name]
    coarse, fine = (
        error(build, Schedule(smooth_vp, torch.linspace(1, 0.3, n + 1, dtype=torch.float64)))
        for n in (72, 144)
    )
    measured = math.log2(coarse / fine)
    # Order 4 shows the DDIM step that it starts with.
    assert expected - (0.5 if expected == 4 else 0.2) < measured < expected + 0.3


@pytest.mark.parametrize("name", ["heun", "dpm-3-dpmsolver", "++s-3-taylor", "++m-3-taylor"])
def test_order_of_convergence_on_the_grid_of_edm(name):
    build, expected = SOLVERS[name]
    coarse, fine = (
        error(build, Schedule.karras(VE(0.05, 80.0), n, append_zero=False)) for n in (72, 144)
    )
    assert expected - 0.2 < math.log2(coarse / fine) < expected + 0.7
