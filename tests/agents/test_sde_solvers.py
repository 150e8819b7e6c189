"""Multistep solvers of the reverse SDE: exact integrals, others' loops, moments of Gaussian data.

SDE-DPM-Solver++ (MATH.md 1.14; against diffusers, orders 1 and 2, in test_solver_oracles.py) and
SA-Solver (1.21).
"""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from covering import alternating, options_at_places
from diffusers.schedulers import scheduling_sasolver
from gaussian_moments import moments
from numpy.polynomial import Polynomial
from scipy.integrate import quad

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.denoisers.exact import MixtureBody
from fewstep.agents.solvers import dpm_solver_pp, dpm_solver_sde, make_solver, sa_solver, unipc
from fewstep.envs import VE, DiscreteVP, RectifiedFlow, Schedule

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
    if "method" not in options:
        options = {**options, "lower_order_final": False}
    assert order_of_the_std(dpm_solver_sde, options) == pytest.approx(expected, abs=0.2)


def order_of_the_std(build, options):
    process = VE(0.05, 1e4)
    denoiser = Denoiser(MixtureBody(process, torch.tensor([[MEAN]]).double(), STD), process)
    errors = []
    for steps in (400, 800):
        log_snr = torch.linspace(-9, 2, steps + 1, dtype=torch.float64)
        schedule = Schedule(process, process.time_of_log_snr(log_snr))
        alpha, sigma = schedule.levels()
        start, end = np.hypot(alpha * STD, sigma)[[0, -1]]
        table = build(schedule, **options)
        errors.append(abs(moments(table, denoiser, std=start)[1] - end))
    return math.log2(errors[0] / errors[1])


def test_it_reads_and_writes_itself():
    table = dpm_solver_sde(Schedule.karras(EDM, 6), 3, 0.5)
    again = Tableau.from_json(table.to_json())
    assert again.name == "dpm-solver++-3m-sde (eta 0.5)"
    np.testing.assert_array_equal(again.noise, table.noise)
    assert not table.linear


# ---------------------------------------------------------------------------------- SA-Solver

ORDERS = [(1, 2, 3, 4), (1, 2, 3, 4)]


def same_tables(one, other):
    """Equal rows to 1e-11 of each one's largest weight: 1e4 roundings, as for UniPC's tables."""
    for ours, theirs in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * abs(theirs).max())
    np.testing.assert_allclose(one.scale, other.scale, rtol=1e-12)
    np.testing.assert_allclose(one.noise, other.noise, rtol=1e-12, atol=0)


def draws(table, like, rng):
    """The noise that the table's own loop draws, (K, *shape); zeros where a step has none."""
    return [
        torch.empty_like(like).normal_(generator=rng) if std else torch.zeros_like(like)
        for std in table.noise
    ]


@options_at_places(
    "order, corrector, tau, process, name",
    [*ORDERS, (0.0, 0.7, 1.3)],
    alternating([VP, EDM], ["log_snr", "irregular", "karras-to-0"]),
    each=1,
)
@torch.no_grad()
def test_sa_solver_is_the_paper_s_loop(
    order, corrector, tau, process, name, grid, mixture, prior, generator
):
    """With integrals by quadrature, and the noise of a step in both of its versions."""
    schedule, denoiser, predicted = grid(name, process, 7), mixture(process), prior(process)
    table = sa_solver(schedule, order, corrector, tau, lower_order_final=False)
    alpha, sigma = schedule.levels()
    log_snr = process.log_snr(schedule.times).numpy()
    noise, rate, outputs = draws(table, predicted, generator(3)), 1 + tau**2, []

    def step(i, state, nodes):
        start, end = log_snr[i : i + 2]
        if end == math.inf:
            return outputs[i]
        places = log_snr[nodes] - start
        moved = alpha[i + 1] / alpha[i] * math.exp(-rate * (end - start)) * state
        for j, node in enumerate(nodes):
            basis = lagrange(places, j)
            weight = integral(
                lambda at, basis=basis: rate * math.exp(-rate * (end - at)) * basis(at - start),
                start,
                end,
            )
            moved = moved + alpha[i + 1] * weight * outputs[node]
        spread = sigma[i + 1] * math.sqrt(1 - math.exp(-2 * tau**2 * (end - start)))
        return moved + spread * noise[i]

    corrected = predicted
    for i in range(7):
        outputs.append(denoiser.denoised(predicted, float(schedule.times[i])))
        if i:
            before = [k for k in range(i, i - corrector, -1) if k >= 0]
            corrected = step(i - 1, corrected, before)
        predicted = step(i, corrected, [k for k in range(i, i - order, -1) if k >= 0])
    ours = table.sample(denoiser, prior(process), generator=generator(3))
    # The fourth order's weights are some hundred times larger than what they sum to.
    scale = max(1.0, float(ours.abs().max()))
    torch.testing.assert_close(ours, predicted, rtol=0, atol=1e-11 * scale)


@options_at_places(
    "order, corrector, tau, lowered, process, name",
    [*ORDERS, (0.0, 0.6, 1.0, 1.4), (True, False)],
    alternating([VP, EDM], ["log_snr", "irregular", "uniform"]),
    each=1,
)
@torch.no_grad()
def test_sa_solver_is_diffusers(
    order, corrector, tau, lowered, process, name, grid, mixture, prior, generator
):
    schedule, denoiser, start = grid(name, process, 9), mixture(process), prior(process)
    alpha, sigma = map(torch.from_numpy, schedule.levels())
    # The noise is between these levels only, as published.
    window = {"s_min": 0.05, "s_max": 3.0} if lowered else {}
    table = sa_solver(
        schedule, order, corrector, tau, solver_type="bh1", lower_order_final=lowered, **window
    )
    inside = (sigma / alpha >= 0.05) & (sigma / alpha <= 3.0) if window else sigma > 0
    if tau:
        assert 0 < (table.noise > 0).sum() == inside[:-1].sum()
    theirs = run_diffusers(
        schedule,
        denoiser,
        start,
        [tau if i else 0.0 for i in inside],
        draws(table, start, generator(5)),
        predictor_order=order,
        corrector_order=corrector,
        lower_order_final=lowered,
    )
    ours = table.sample(denoiser, start, generator=generator(5))
    # They expand the polynomials in powers of the log-SNR, which is up to 6 here: sums of some
    # thousand times their result, 6^3 times the fourth order's own.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * max(1.0, float(ours.abs().max())))


def run_diffusers(schedule, denoiser, start, taus, noise, **options):
    """Its state is x scaled to alpha^2 + sigma^2 = 1."""
    alpha, sigma = map(torch.from_numpy, schedule.levels())
    unit = 1 / torch.hypot(alpha, sigma)
    scheduler = scheduling_sasolver.SASolverScheduler(
        prediction_type="sample", tau_func=lambda i: taus[i], **options
    )
    scheduler.set_timesteps(schedule.steps)
    scheduler.set_begin_index(0)
    scheduler.sigmas = sigma / alpha
    state = start * unit[0]
    for i in range(schedule.steps):
        clean = denoiser.denoised(state / unit[i], float(schedule.times[i]))
        with mock.patch.object(scheduling_sasolver, "randn_tensor", return_value=noise[i]):
            state = scheduler.step(clean, i, state).prev_sample
    return state / unit[-1]


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
@torch.no_grad()
def test_sa_solver_is_diffusers_on_its_own_timesteps(spacing, tau, mixture, prior, generator):
    """Its defaults: orders 2 and 2, noise at the timesteps 200 to 800."""
    scheduler = scheduling_sasolver.SASolverScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    times = [float(t) + 1 for t in scheduler.timesteps]
    schedule, start = Schedule(VP, [*times, 1.0]), prior(VP)
    alpha, sigma = schedule.levels()
    rho = sigma / alpha
    # 1 - abar is 1e-4 at the end, and one of float32's roundings of abar is 6e-8.
    np.testing.assert_allclose(scheduler.sigmas, rho, rtol=1e-3)
    taus = [tau if 200 <= t - 1 <= 800 else 0.0 for t in times]
    middle = rho[:-1][np.array([200 <= t - 1 <= 800 for t in times])]
    table = sa_solver(schedule, tau=tau, s_min=middle[-1], s_max=middle[0], solver_type="bh1")
    noise = draws(table, start, generator(5))
    theirs = run_diffusers(schedule, mixture(VP), start, taus, noise)
    ours = table.sample(mixture(VP), start, generator=generator(5))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["irregular", "karras-to-0"])
@PROCESSES
def test_sa_solver_contains_unipc_and_dpm_solver(process, name, order, lowered, grid):
    schedule = grid(name, process, 8)
    ours = sa_solver(schedule, order, order + 1, 0.0, solver_type="bh1", lower_order_final=lowered)
    same_tables(ours, unipc(schedule, order, "bh1", lower_order_final=lowered))
    for tau in (0.0, 0.5, 1.0):
        ours = sa_solver(schedule, order, 0, tau, lower_order_final=lowered)
        same_tables(
            ours,
            dpm_solver_sde(
                schedule, order, tau**2, solver_type="taylor", lower_order_final=lowered
            ),
        )
    ours = sa_solver(schedule, order, 0, 0.0, lower_order_final=lowered)
    theirs = dpm_solver_pp(schedule, order, solver_type="taylor", lower_order_final=lowered)
    same_tables(ours, theirs)
    # One Wiener process can't be seen from the predicted state and the corrected one apart.
    corrected = sa_solver(schedule, order, 2, 0.8, lower_order_final=lowered)
    predicted = sa_solver(schedule, order, 0, 0.8, lower_order_final=lowered)
    np.testing.assert_array_equal(corrected.noise, predicted.noise)
    np.testing.assert_array_equal(corrected.scale, predicted.scale)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # A corrector that reads fewer outputs than the predictor lowers the order.
        ((2, 1, 1.0), 1),
        ((2, 2, 1.0, "bh1"), 2),
        # What the noise does inside a step is extrapolated, as above: 2 is the end of it.
        ((3, 4, 0.5), 2),
        ((3, 4, 0.0), 4),
        *(
            pytest.param(options, order, marks=pytest.mark.slow)
            for options, order in (
                ((1, 0, 1.0), 1),
                ((1, 2, 1.0), 2),
                ((2, 0, 0.7), 2),
                ((2, 2, 0.5, "bh1"), 2),
                ((3, 3, 1.0), 2),
                ((4, 4, 1.0), 2),
                ((2, 3, 0.0), 3),
                ((3, 0, 0.0), 3),
                ((4, 0, 0.0), 4),
            )
        ),
    ],
    ids=str,
)
def test_order_of_the_standard_deviation_of_sa_solver(options, expected):
    names = ("order", "corrector_order", "tau", "solver_type")
    given = dict(zip(names, options, strict=False)) | {"lower_order_final": False}
    assert order_of_the_std(sa_solver, given) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_sa_solver_from_where_no_signal_is_left(tau):
    """The first step is the limit of a start just short of it, and it is not corrected."""
    times = [1.0, 0.75, 0.5, 0.3, 0.15, 0.05]
    at, near = (
        sa_solver(Schedule(RectifiedFlow(), [first, *times[1:]]), 3, 3, tau)
        for first in (1.0, 1 - 1e-9)
    )
    np.testing.assert_allclose(at.scale[0], 0.0 if tau else 0.75, atol=1e-12)
    np.testing.assert_allclose(at.weights[0, 0], 0.25, rtol=1e-12)
    assert at.noise[0] == pytest.approx(0.75 if tau else 0.0)
    # Near it the second step still has a share of about 1 / 20, the first one's log-SNR, of O_0.
    assert at.weights[1, 0] == 0
    np.testing.assert_allclose(near.noise[1:], at.noise[1:], rtol=1e-12)
    assert np.isfinite(at.weights).all()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"order": 5}, "SA-Solver's predictor has the orders 1, 2, 3, 4"),
        ({"corrector_order": -1}, "SA-Solver's corrector has the orders 0, 1, 2, 3, 4"),
        ({"tau": -0.1}, "tau must be a finite number >= 0"),
        ({"tau": math.inf}, "tau must be a finite number >= 0"),
        ({"s_min": 2.0, "s_max": 1.0}, "0 <= s_min <= s_max must hold"),
        ({"s_min": math.nan}, "0 <= s_min <= s_max must hold"),
        ({"solver_type": "bh2"}, "solver_type"),
        ({"order": 4}, "needs at least 4 network calls"),
        ({"afs": True}, "afs is for deterministic solvers"),
    ],
)
def test_sa_solver_refuses(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_solver("sa-solver", Schedule.karras(EDM, 3), **options)


def test_sa_solver_reads_and_writes_itself():
    table = make_solver("sa-solver", Schedule.karras(EDM, 6), tau=0.5)
    again = Tableau.from_json(table.to_json())
    assert again.name == "sa-solver (tau 0.5)"
    np.testing.assert_array_equal(again.noise, table.noise)
    assert make_solver("sa-solver", Schedule.karras(EDM, 6), tau=0.0, afs=True).nfe == 5
