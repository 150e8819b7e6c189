"""SDE-DPM-Solver++ multistep: exact integrals, k-diffusion's loop, moments of Gaussian data.

MATH.md 1.14. Against diffusers, orders 1 and 2, in test_solver_oracles.py.
"""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from scipy.integrate import quad

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.denoisers.exact import MixtureBody
from fewstep.agents.solvers import dpm_solver_sde
from fewstep.envs import VE, DiscreteVP, Schedule

pytestmark = pytest.mark.numeric

VP, EDM = DiscreteVP.linear(1000), VE(0.002, 80.0)
PROCESSES = pytest.mark.parametrize("process", [VP, EDM], ids=["VP", "VE"])
ETAS = pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
MEAN, STD = 0.4, 0.5


def lagrange(nodes, j):
    """The basis polynomial that is 1 at nodes[j] and 0 at the others."""
    basis = Polynomial([1.0])
    for node in np.delete(nodes, j):
        basis = basis * Polynomial([-node, 1.0]) / (nodes[j] - node)
    return basis


def integral(function, start, end):
    return quad(function, start, end, epsabs=0, epsrel=1e-12)[0]


@ETAS
@pytest.mark.parametrize("name", ["uniform", "log_snr", "karras", "irregular"])
@PROCESSES
def test_a_row_is_the_solution_of_the_sde_for_polynomial_predictions(process, name, eta, grid):
    """In y = x / alpha and l = log-SNR: dy = (1 + eta) (D - y) dl + e^-l sqrt(2 eta) dw."""
    schedule = grid(name, process, 6)
    alpha, _ = schedule.levels()
    log_snr = process.log_snr(schedule.times).numpy()
    table = dpm_solver_sde(schedule, 3, eta, solver_type="taylor", lower_order_final=False)
    rate = 1 + eta
    for i in range(6):
        start, end = log_snr[i : i + 2]
        nodes = log_snr[i::-1][:3]
        decay = math.exp(-rate * (end - start))
        assert table.scale[i] == pytest.approx(alpha[i + 1] / alpha[i] * decay, rel=1e-10)
        for j in range(len(nodes)):
            basis = lagrange(nodes - start, j)
            exact = integral(
                lambda at, basis=basis, start=start, end=end: (
                    rate * math.exp(-rate * (end - at)) * basis(at - start)
                ),
                start,
                end,
            )
            assert table.weights[i, i - j] == pytest.approx(alpha[i + 1] * exact, rel=1e-9)
        variance = integral(
            lambda at, end=end: 2 * eta * math.exp(-2 * rate * (end - at) - 2 * at), start, end
        )
        assert table.noise[i] == pytest.approx(alpha[i + 1] * math.sqrt(variance), rel=1e-10)


@ETAS
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", ["log_snr", "karras", "irregular", "karras-to-0"])
@PROCESSES
@torch.no_grad()
def test_the_loop_of_k_diffusion(process, name, compat, eta, grid, mixture, prior, generator):
    """Its 3M SDE is `compat`: the second divided difference without its factor 2 (MATH.md 1.7)."""
    schedule, denoiser, noise = grid(name, process, 9), mixture(process), prior(process)
    alpha, sigma = schedule.levels()
    log_snr, rho = process.log_snr(schedule.times).numpy(), sigma / alpha
    state, rng, known, h = noise / alpha[0], generator(3), [], np.diff(log_snr)
    for i in range(9):
        known.insert(0, denoiser.denoised(state * alpha[i], float(schedule.times[i])))
        if rho[i + 1] == 0:
            state = known[0]
            continue
        long = (1 + eta) * h[i]
        state = math.exp(-long) * state + (1 - math.exp(-long)) * known[0]
        phi_2 = (math.exp(-long) - 1) / long + 1
        if i == 1:
            state = state + phi_2 * (known[0] - known[1]) / (h[0] / h[1])
        if i > 1:
            r0, r1 = h[i - 1] / h[i], h[i - 2] / h[i]
            near, far = (known[0] - known[1]) / r0, (known[1] - known[2]) / r1
            curve = (near - far) / (r0 + r1)
            state = state + phi_2 * (near + r0 * curve)
            state = state - (phi_2 / long - 0.5) * curve * (1 if compat else 2)
        if eta:
            fresh = torch.empty_like(state).normal_(generator=rng)
            state = state + rho[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h[i])) * fresh
    options = {"solver_type": "taylor", "compat": compat, "lower_order_final": False}
    table = dpm_solver_sde(schedule, 3, eta, **options)
    ours = table.sample(denoiser, noise, generator=generator(3))
    scale = max(1.0, float(ours.abs().max()))
    torch.testing.assert_close(ours, alpha[-1] * state, rtol=0, atol=1e-11 * scale)


def std(tableau, denoiser, start):
    """The standard deviation of the last state, which is affine in all noise, from the first's."""
    impulses = torch.zeros(tableau.steps + 2, 1, dtype=torch.float64)
    impulses[1] = start

    def transition(_state, moved, j):
        moved = moved.clone()
        moved[j + 2] += tableau.noise[j]
        return moved

    still = tableau.replace(noise=np.zeros(tableau.steps))
    ends = still.sample(denoiser, impulses, transition=transition)
    return float((ends[1:] - ends[0]).norm())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"order": 1}, 1),
        ({"order": 1, "eta": 0.5}, 1),
        ({"order": 2}, 2),
        ({"order": 2, "solver_type": "taylor"}, 2),
        ({"order": 2, "eta": 0.5}, 2),
        # The noise inside a step is extrapolated from that of the steps before.
        ({"order": 3}, 2),
        ({"order": 3, "eta": 0.5}, 2),
        ({"order": 3, "eta": 0.0}, 3),
        ({"order": 2, "method": "singlestep"}, 2),
        ({"order": 2, "eta": 0.5, "method": "singlestep"}, 2),
        ({"order": 2, "method": "singlestep", "solver_type": "taylor"}, 2),
    ],
)
def test_order_of_the_standard_deviation_on_gaussian_data(options, expected):
    process = VE(0.05, 1e4)
    denoiser = Denoiser(MixtureBody(process, torch.tensor([[MEAN]]).double(), STD), process)
    errors = []
    for steps in (400, 800):
        log_snr = torch.linspace(-9, 2, steps + 1, dtype=torch.float64)
        schedule = Schedule(process, process.time_of_log_snr(log_snr))
        alpha, sigma = schedule.levels()
        start, end = np.hypot(alpha * STD, sigma)[[0, -1]]
        if "method" not in options:
            options = {**options, "lower_order_final": False}
        table = dpm_solver_sde(schedule, **options)
        errors.append(abs(std(table, denoiser, start) - end))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.2)


def test_it_reads_and_writes_itself():
    table = dpm_solver_sde(Schedule.karras(EDM, 6), 3, 0.5)
    again = Tableau.from_json(table.to_json())
    assert again.name == "dpm-solver++-3m-sde (eta 0.5)"
    np.testing.assert_array_equal(again.noise, table.noise)
    assert not table.linear
