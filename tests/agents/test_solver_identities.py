"""What the ODE solvers have in common: identities between them, exact cases, their price, refusals.

The identities are those of MATH.md 1 and 2.5.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from solver_names import ALONE, ODE_SOLVERS
from torch import nn

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.denoisers.exact import mixture as exact_mixture
from fewstep.agents.solvers import (
    SOLVERS,
    ancestral,
    ddim,
    deis,
    dpm_solver,
    dpm_solver_multistep,
    dpm_solver_pp,
    dpm_solver_sde,
    euler,
    euler_ancestral,
    flow_heun,
    heun,
    ipndm,
    lms,
    make_solver,
    singlestep_orders,
    solver_within,
    unipc,
)
from fewstep.envs import VE, DiscreteVP, RectifiedFlow, Schedule

pytestmark = pytest.mark.numeric

VP = DiscreteVP.linear(1000)
EDM = VE(0.002, 80.0)
PROCESSES = pytest.mark.parametrize("process", [VP, EDM], ids=["VP", "VE"])
NAMES = pytest.mark.parametrize(
    "name", ["uniform", "log_snr", "irregular", "uniform-to-0", "karras-to-0"]
)
# flow-sde needs a straight path.
FLOW = RectifiedFlow()
TWICE = ("heun", "flow-heun")


def same_rows(one, other, tolerance=1e-12):
    """Equal tables, each row to `tolerance` of its largest number."""
    assert one.output == other.output
    np.testing.assert_array_equal(one.times, other.times)
    np.testing.assert_allclose(one.scale, other.scale, rtol=tolerance)
    for ours, theirs in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * abs(theirs).max())
    np.testing.assert_array_equal(one.noise, other.noise)


@torch.no_grad()
def same_maps(one, other, denoiser, noise, generator, tolerance=1e-12):
    """The two tables send the same noise to the same samples."""
    ours, theirs = (t.sample(denoiser, noise, generator=generator(3)) for t in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def extrapolated(schedule, lambdas, output):
    """DDIM on O_j + lambda_j (O_j - O_{j-1}), which is D-DDIM (MATH.md 2.5)."""
    table = ddim(schedule, output=output)
    last = np.diag(table.weights)
    weights = np.diag(last * (1 + lambdas)) - np.diag((last * lambdas)[1:], -1)
    return Tableau(
        "by hand", schedule.process, table.times, table.scale, weights, table.noise, output=output
    )


@NAMES
@PROCESSES
def test_extrapolated_ddim_is_2m_and_ipndm_2(process, name, grid):
    schedule = grid(name, process, 7)
    log_snr = process.log_snr(schedule.times).numpy()
    h = np.diff(log_snr)
    lambdas = np.concatenate([[0], h[1:] / (2 * h[:-1])])
    if np.isinf(h[-1]):
        lambdas[-1] = 0  # the step into time 0 is of first order
    options = {"order": 2, "lower_order_final": False}
    same_rows(dpm_solver_multistep(schedule, **options), extrapolated(schedule, lambdas, "epsilon"))
    same_rows(dpm_solver_pp(schedule, **options), extrapolated(schedule, lambdas, "sample"))
    halves = np.array([0] + [0.5] * 6)
    same_rows(ipndm(schedule, 2), extrapolated(schedule, halves, "epsilon"))


@NAMES
@PROCESSES
def test_first_order_of_every_family_is_ddim(process, name, grid):
    schedule = grid(name, process, 7)
    noise, data = ddim(schedule), ddim(schedule, output="sample")
    for table in (
        deis(schedule, 0),
        deis(schedule, 0, "rho"),
        ipndm(schedule, 1),
        lms(schedule, 1),
        unipc(schedule, 1, corrector=False, output="epsilon"),
        dpm_solver(schedule, 1),
        dpm_solver(schedule, 3, orders=[1] * 7),
        dpm_solver_multistep(schedule, 1),
    ):
        same_rows(table, noise)
    for table in (
        euler(schedule),
        dpm_solver_pp(schedule, 1),
        dpm_solver_pp(schedule, 1, "singlestep"),
        unipc(schedule, 1, corrector=False),
    ):
        same_rows(table, data)


@NAMES
@PROCESSES
def test_unip_is_dpm_solver_multistep(process, name, grid):
    schedule = grid(name, process, 11)
    for order in (1, 2, 3):
        data = unipc(schedule, order, corrector=False, lower_order_final=False)
        same_rows(data, dpm_solver_pp(schedule, order, lower_order_final=False), 1e-11)
        noise = unipc(schedule, order, "bh2", False, False, "epsilon")
        same_rows(noise, dpm_solver_multistep(schedule, order, lower_order_final=False), 1e-11)


@NAMES
@PROCESSES
def test_b_of_h_matters_only_where_half_stands_for_the_exact_weight(process, name, grid):
    schedule = grid(name, process, 11)
    one, other = (unipc(schedule, 3, kind, lower_order_final=False) for kind in ("bh1", "bh2"))
    # Steps 0 and 1 are predicted, or corrected, with one other output; row 2 undoes the latter.
    same = [j for j in range(11) if np.array_equal(one.weights[j], other.weights[j])]
    assert same == [0, *range(3, 11)]


@NAMES
@PROCESSES
def test_the_sde_solvers_without_noise_are_dpm_solver_pp(process, name, grid):
    schedule = grid(name, process, 7)
    for order in (1, 2, 3):
        for options in ({}, {"solver_type": "taylor"}, {"compat": True}):
            ours = dpm_solver_sde(schedule, order, 0.0, **options)
            theirs = dpm_solver_pp(schedule, order, **options)
            np.testing.assert_array_equal(ours.scale, theirs.scale)
            np.testing.assert_array_equal(ours.weights, theirs.weights)
            assert not ours.noise.any()
    for solver_type in ("dpmsolver", "taylor"):
        options = {"method": "singlestep", "solver_type": solver_type}
        ours = dpm_solver_sde(schedule, 2, 0.0, **options)
        assert (
            ours.to_json()
            == dpm_solver_pp(schedule, 2, **options).replace(name=ours.name).to_json()
        )


@pytest.mark.parametrize("solver_type", ["dpmsolver", "taylor"])
@NAMES
@PROCESSES
@torch.no_grad()
def test_blocks_with_next_to_no_noise_are_those_without(
    process, name, solver_type, grid, mixture, prior, generator
):
    """The rows start from the stage instead of from the block's start: the same states."""
    schedule, denoiser, noise = grid(name, process, 7), mixture(process), prior(process)
    options = {"method": "singlestep", "solver_type": solver_type}
    table = dpm_solver_sde(schedule, 2, 1e-13, **options)
    assert table.noise[:-1].all()
    still = table.replace(noise=np.zeros(7))
    expected = dpm_solver_pp(schedule, 2, **options)
    same_maps(still, expected, denoiser, noise, generator, 1e-10)


@NAMES
@PROCESSES
def test_first_order_with_the_noise_of_the_process_is_ancestral(
    process, name, grid, mixture, prior, generator
):
    schedule, denoiser, noise = grid(name, process, 7), mixture(process), prior(process)
    expected = ancestral(schedule, "small")
    for table in (
        ddim(schedule, 1.0, "sample"),
        euler_ancestral(schedule),
        dpm_solver_sde(schedule, 1),
    ):
        np.testing.assert_allclose(table.noise, expected.noise, rtol=1e-11, atol=1e-14)
        same_maps(table, expected, denoiser, noise, generator, 1e-11)


@PROCESSES
def test_lms_is_rho_deis_by_the_number_of_its_points(process, grid):
    schedule = grid("irregular-to-0", process, 7)
    for order in (1, 2, 3, 4):
        same_rows(lms(schedule, order), deis(schedule, order - 1, "rho"))


@NAMES
@PROCESSES
def test_multistep_rows_sum_to_the_coefficient_of_ddim(process, name, grid):
    schedule = grid(name, process, 7)
    tables = [deis(schedule, r, basis) for r in range(4) for basis in ("time", "rho")]
    tables += [ipndm(schedule, k) for k in (2, 3, 4)]
    for solver_type in ("dpmsolver", "taylor"):
        for compat in (False, True):
            options = {"solver_type": solver_type, "compat": compat}
            tables += [dpm_solver_multistep(schedule, k, **options) for k in (2, 3)]
            tables += [dpm_solver_pp(schedule, k, **options) for k in (2, 3)]
    for table in tables:
        expected = ddim(schedule, output=table.output)
        np.testing.assert_allclose(table.scale, expected.scale, rtol=1e-13)
        sums, coefficients = table.weights.sum(1), np.diag(expected.weights)
        size = abs(table.weights).sum(1)
        np.testing.assert_array_less(abs(sums - coefficients), 1e-13 * size + 1e-300)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["log_snr", "irregular"])
@PROCESSES
def test_exact_multistep_integrates_the_polynomial_in_log_snr(process, name, order, grid):
    """MATH.md 1.7 with c = 2: noise over d rho, data over d (1 / rho)."""
    schedule = grid(name, process, 6)
    alpha, sigma = schedule.levels()
    log_snr = np.log(alpha / sigma)
    options = {"solver_type": "taylor", "lower_order_final": False}
    noise = dpm_solver_multistep(schedule, order, **options)
    data = dpm_solver_pp(schedule, order, **options)
    for i in range(6):
        nodes = log_snr[i::-1][:order]
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)

            def basis(x, node=node, others=others):
                return np.prod((x - others) / (node - others))

            def integral(f, ends=log_snr[i : i + 2]):
                return quad(f, *ends, epsabs=0, epsrel=1e-12)[0]

            expected = -alpha[i + 1] * integral(lambda x: np.exp(-x) * basis(x))
            assert noise.weights[i, i - j] == pytest.approx(expected, rel=1e-9)
            expected = sigma[i + 1] * integral(lambda x: np.exp(x) * basis(x))
            assert data.weights[i, i - j] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["uniform-to-0", "karras-to-0", "irregular-to-0"])
@pytest.mark.parametrize("order", [2, 3])
@PROCESSES
def test_multistep_step_into_time_0_is_ddim(process, order, name, grid):
    schedule = grid(name, process, 7)
    above = Schedule(process, schedule.times[:-1])
    for build, output in ((dpm_solver_multistep, "epsilon"), (dpm_solver_pp, "sample")):
        table = build(schedule, order, lower_order_final=False)
        before = build(above, order, lower_order_final=False)
        np.testing.assert_allclose(table.weights[:-1, :-1], before.weights, rtol=1e-14)
        last = ddim(schedule, output=output).weights[-1]
        np.testing.assert_allclose(table.weights[-1], last, rtol=1e-14, atol=0)


@NAMES
@PROCESSES
def test_heun_euler_and_ddim_are_one_map_in_either_output(
    process, name, grid, mixture, prior, generator
):
    schedule, denoiser, noise = grid(name, process, 7), mixture(process), prior(process)
    pairs = [(ddim(schedule), euler(schedule))]
    for eta in (0.0, 0.6):
        pairs.append((ddim(schedule, eta), ddim(schedule, eta, output="sample")))
    for options in ({}, {"s_churn": 2.0, "s_max": 10.0}):
        pairs.append(tuple(heun(schedule, output=o, **options) for o in ("epsilon", "sample")))
    for one, other in pairs:
        same_maps(one, other, denoiser, noise, generator)


@pytest.mark.parametrize("name", ["log_snr", "irregular", "uniform-to-0"])
@pytest.mark.parametrize(
    ("solver", "options"),
    # FastDPM reads levels of its own between whole times.
    # Flow matching's steps are of x itself, not of x / alpha.
    [(name, {}) for name in ALONE if name not in ("deis", "fast-dpm", "flow-heun", "flow-sde")]
    + [
        ("ddim", {"eta": 0.5}),
        ("heun", {"s_churn": 2.0, "s_max": 10.0}),
        ("dpm-solver-3m", {"compat": True, "solver_type": "taylor"}),
    ],
    ids=str,
)
def test_vp_and_ve_are_one_ode(solver, options, name, grid, mixture, prior, generator):
    """MATH.md 0.1: x / alpha on VP is the state on the VE process that meets the same rho."""
    schedule, noise = grid(name, VP, 7), prior(VP)
    alpha, sigma = schedule.levels()
    rho = sigma / alpha
    ve = VE(1e-3, float(rho[0]))
    with torch.no_grad():
        on_vp = make_solver(solver, schedule, **options).sample(
            mixture(VP), noise, generator=generator(4)
        )
        on_ve = make_solver(solver, Schedule(ve, rho), **options).sample(
            mixture(ve), noise / alpha[0], generator=generator(4)
        )
    torch.testing.assert_close(on_vp / alpha[-1], on_ve, rtol=1e-10, atol=1e-10)


def test_ipndm_is_deis_over_rho_where_its_steps_are_equal():
    schedule = Schedule.uniform(EDM, 7, end=EDM.t_min)
    for order in (1, 2, 3, 4):
        same_rows(ipndm(schedule, order), deis(schedule, order - 1, "rho"))


def test_deis_over_time_is_deis_over_rho_where_time_is_rho(grid):
    for name in ("log_snr", "irregular", "karras-to-0"):
        schedule = grid(name, EDM, 7)
        for order in range(4):
            same_rows(deis(schedule, order), deis(schedule, order, "rho"), 1e-11)


# The process, which has no part in the order of the calls, changes from one budget to the next.
@pytest.mark.parametrize("end", ["", "-to-0"])
@pytest.mark.parametrize(("process", "budget"), [(VP, 4), (EDM, 5), (VP, 6), (EDM, 9)])
@pytest.mark.parametrize("solver", ALONE)
def test_price_and_times_of_the_calls(
    process, solver, budget, end, grid, mixture, prior, count_calls
):
    denoiser = mixture(process)
    if solver == "flow-sde":
        process, denoiser = FLOW, exact_mixture(FLOW, prediction="sample", dimension=2)[0]
    schedule = grid("uniform" + end, process, budget)
    table, calls = make_solver(solver, schedule), count_calls(denoiser.body)
    with torch.no_grad():
        table.sample(denoiser, prior(process))
    twice = 2 * budget - bool(end)
    assert len(calls) == table.nfe == (twice if solver in TWICE else budget)
    np.testing.assert_allclose(calls.times, process.network_time(table.times[:-1]), atol=1e-12)
    if solver not in TWICE:
        np.testing.assert_array_equal(table.times, schedule.times)
    assert Tableau.from_json(table.to_json()).to_json() == table.to_json()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("ddim", ddim),
        ("euler", euler),
        ("heun", heun),
        ("flow-heun", flow_heun),
        ("ipndm", lambda s: ipndm(s, 4)),
        ("deis", lambda s: deis(s, 3, "time")),
        ("rho-deis", lambda s: deis(s, 3, "rho")),
        ("lms", lambda s: lms(s, 4)),
        ("ipndm-v", lambda s: lms(s, 4)),
        ("euler-ancestral", lambda s: euler_ancestral(s, 1.0)),
        ("unipc-2", lambda s: unipc(s, 2, "bh2", True, True, "sample")),
        ("unipc-3", lambda s: unipc(s, 3, "bh2", True, True, "sample")),
        ("dpm-solver++-2s-sde", lambda s: dpm_solver_sde(s, 2, 1.0, "singlestep", "dpmsolver")),
        ("dpm-solver++-2m-sde", lambda s: dpm_solver_sde(s, 2, 1.0, "multistep", "dpmsolver")),
        ("dpm-solver++-3m-sde", lambda s: dpm_solver_sde(s, 3, 1.0, "multistep", "dpmsolver")),
        ("dpm-solver-1", lambda s: dpm_solver(s, 1, "dpmsolver")),
        ("dpm-solver-2", lambda s: dpm_solver(s, 2, "dpmsolver")),
        ("dpm-solver-3", lambda s: dpm_solver(s, 3, "dpmsolver")),
        ("dpm-solver-2m", lambda s: dpm_solver_multistep(s, 2, "dpmsolver", False, None)),
        ("dpm-solver-3m", lambda s: dpm_solver_multistep(s, 3, "dpmsolver", False, None)),
        ("dpm-solver++-2s", lambda s: dpm_solver_pp(s, 2, "singlestep", "dpmsolver")),
        ("dpm-solver++-3s", lambda s: dpm_solver_pp(s, 3, "singlestep", "dpmsolver")),
        ("dpm-solver++-2m", lambda s: dpm_solver_pp(s, 2, "multistep", "dpmsolver")),
        ("dpm-solver++-3m", lambda s: dpm_solver_pp(s, 3, "multistep", "dpmsolver")),
    ],
)
def test_names(name, build, grid):
    for end in ("", "-to-0"):
        schedule = grid("irregular" + end, VP, 12)
        assert make_solver(name, schedule).to_json() == build(schedule).to_json()


class Constant(nn.Module):
    value = torch.tensor([0.7, -1.3], dtype=torch.float64)

    def forward(self, sample, _time):
        return self.value.expand_as(sample)


@st.composite
def schedules(draw):
    process = draw(st.sampled_from([VP, EDM, DiscreteVP.cosine(50)]))
    times = st.floats(process.t_min, process.t_max)
    times = sorted(draw(st.lists(times, min_size=5, max_size=9)), reverse=True)
    assume(all(s < t * (1 - 1e-9) for t, s in pairwise(times)))
    return Schedule(process, times + [0.0] * draw(st.booleans()))


# Some of the schedules start where no signal is left, which is no trouble if it is constant.
@pytest.mark.filterwarnings("ignore::fewstep.envs.schedules.ends.EmptyStartWarning")
@settings(max_examples=60, deadline=None)
@given(schedule=schedules())
def test_constant_predictions_are_integrated_exactly(schedule):
    """x / alpha is linear in rho for constant noise, and falls onto a constant sample as rho."""
    process = schedule.process
    alpha, sigma = schedule.levels()
    rho = sigma / alpha
    start = torch.tensor([[2.0, -0.5]], dtype=torch.float64) * process.prior_std(process.t_max)
    constant = Constant.value
    expected = {
        "epsilon": start / alpha[0] + (rho[-1] - rho[0]) * constant,
        "sample": constant + (start / alpha[0] - constant) * (rho[-1] / rho[0]),
    }
    tables = [make_solver(name, schedule) for name in ODE_SOLVERS]
    tables += [heun(schedule, output="epsilon"), ddim(schedule, output="sample")]
    tables += [dpm_solver(schedule, 3, "taylor"), dpm_solver_multistep(schedule, 3, compat=True)]
    for table in tables:
        ours = table.sample(Denoiser(Constant(), process, table.output), start)
        # Rounding is relative to the terms, which close nodes make larger than their sum.
        size = [float(start.abs().max())]
        for j in range(table.steps):
            terms = abs(table.weights[j]).sum() * float(constant.abs().max())
            size.append(abs(table.scale[j]) * size[table.anchor(j)] + terms)
        error = float((ours - alpha[-1] * expected[table.output]).abs().max())
        assert error <= 1e-13 * size[-1], table.name


@pytest.fixture
def schedule():
    return Schedule.uniform(VP, 6)


def above(steps):
    return Schedule.log_snr(VP, steps)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda s: make_solver("dpm-solver++2m", s), r"did you mean 'dpm-solver\+\+-2m'"),
        (lambda s: make_solver("unipc", s), r"unknown solver 'unipc'; did you mean 'unipc-\d'"),
        (lambda s: make_solver("pndm-x", s), r"unknown solver 'pndm-x'.*ancestral.*rho-deis"),
        (lambda s: make_solver("unipc-2", s, order=3), "unknown option.*solver_type"),
        (lambda s: unipc(s, 2, "bh3"), "solver_type 'bh3'.*bh1, bh2"),
        (lambda s: unipc(s, 4), "orders 1, 2, 3; got 4"),
        (lambda s: unipc(s, 0), "got 0"),
        (lambda s: unipc(s, output="x0"), "output 'x0'.*epsilon, sample"),
        (lambda s: unipc(above(2), 3), "unipc-3 needs at least 3"),
        (lambda s: lms(s, 0), "orders 1, 2, 3, 4; got 0"),
        (lambda s: lms(s, 5), "got 5"),
        (lambda s: lms(above(3)), "LMS of order 4 needs at least 4"),
        (lambda s: euler_ancestral(s, 1.5), r"eta must lie in \[0, 1\], got 1.5"),
        (lambda s: dpm_solver_sde(s, eta=-0.5), "eta must be a finite number >= 0, got -0.5"),
        (lambda s: dpm_solver_sde(s, eta=float("nan")), "eta must be .*nan"),
        (lambda s: dpm_solver_sde(s, eta=float("inf")), "eta must be .*inf"),
        (lambda s: dpm_solver_sde(s, 4), "orders 1, 2, 3; got 4"),
        (lambda s: dpm_solver_sde(s, 3, method="singlestep"), "orders 1, 2; got 3"),
        (lambda s: dpm_solver_sde(s, solver_type="heun"), "solver_type 'heun'.*dpmsolver, taylor"),
        (lambda s: dpm_solver_sde(s, orders=[1] * 6), "orders.*singlestep"),
        (lambda s: dpm_solver_sde(s, 2, 1.0, "singlestep", compat=True), "compat.*multistep"),
        (lambda s: dpm_solver_sde(above(2), 3), "needs at least 3"),
        (lambda s: make_solver("heun", s, churn=1), "unknown option of solver 'heun'.*s_churn"),
        (lambda s: make_solver("dpm-solver-3m", s, order=2), "unknown option.*solver_type"),
        (lambda s: make_solver("dpm-solver-2", s, solver_type="x"), "dpmsolver, taylor"),
        (lambda s: dpm_solver(s, 2, "midpoint"), "solver_type 'midpoint'.*dpmsolver, taylor"),
        (lambda s: dpm_solver_multistep(s, 2, "heun"), "solver_type 'heun'.*dpmsolver, taylor"),
        (lambda s: dpm_solver_pp(s, 2, "mutlistep"), "did you mean 'multistep'"),
        (lambda s: dpm_solver_pp(s, 2, "singlestep", "x"), "solver_type 'x'"),
        (lambda s: deis(s, 2, "lambda"), "basis 'lambda'.*rho, time"),
        (lambda s: heun(s, output="noise"), "output 'noise'.*epsilon, sample"),
        (lambda s: ddim(s, output="x0"), "output 'x0'.*epsilon, sample"),
        (lambda s: heun(s, s_churn=-1.0), "s_churn"),
        (lambda s: heun(s, s_churn=1.0, s_noise=float("nan")), "s_noise"),
        (lambda s: deis(s, 4), "orders 0, 1, 2, 3; got 4"),
        (lambda s: deis(s, -1), "got -1"),
        (lambda s: ipndm(s, 0), "orders 1, 2, 3, 4; got 0"),
        (lambda s: ipndm(s, 5), "got 5"),
        (lambda s: dpm_solver(s, 4), "orders 1, 2, 3; got 4"),
        (lambda s: dpm_solver(s, 0), "got 0"),
        (lambda s: dpm_solver_pp(s, 4), "got 4"),
        (lambda s: dpm_solver_pp(s, 4, "singlestep"), "got 4"),
        (lambda s: dpm_solver_multistep(s, 4), "got 4"),
        (lambda s: singlestep_orders(5, 4), "got 4"),
        (lambda s: singlestep_orders(0, 2), "got 0"),
        (lambda s: dpm_solver(above(2), 3), "needs at least 3"),
        (lambda s: dpm_solver_pp(above(1), 2), "needs at least 2"),
        (lambda s: dpm_solver_pp(above(2), 3, "singlestep"), "needs at least 3"),
        (lambda s: dpm_solver_multistep(above(2), 3), "needs at least 3"),
        (lambda s: ipndm(above(3)), "needs at least 4"),
        (lambda s: deis(above(3), 3), "needs at least 4"),
        (lambda s: dpm_solver(s, 2, orders=[2] * 6), "time 0.*t_min"),
        (lambda s: dpm_solver_pp(s, 2, "singlestep", orders=[2] * 6), "time 0.*t_min"),
        (lambda s: dpm_solver(s, 2, orders=[2, 2, 1]), "6 steps; got 3"),
        (lambda s: dpm_solver_pp(s, 2, "singlestep", orders=[1] * 7), "6 steps; got 7"),
        (lambda s: dpm_solver(s, 3, orders=[3, 3, 4, 3, 3, 1]), "orders 1, 2, 3; got 4"),
        (lambda s: dpm_solver(s, 3, orders=[3, 3, 0, 3, 3, 1]), "orders 1, 2, 3; got 0"),
        (lambda s: dpm_solver_pp(s, 2, orders=[1] * 6), "orders.*singlestep"),
        (lambda s: dpm_solver_pp(s, 2, "singlestep", compat=True), "compat.*multistep"),
    ],
)
def test_what_makes_no_sense_is_refused(build, complaint, schedule):
    with pytest.raises(ValueError, match=complaint):
        build(schedule)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("nfe", [5, 6, 9])
def test_a_budget_is_spent_exactly(name, nfe):
    process = FLOW if name == "flow-sde" else VE()
    for append_zero in (True, False):

        def schedule_of(steps, append_zero=append_zero):
            return Schedule.karras(process, steps, append_zero=append_zero)

        if name in TWICE and append_zero != bool(nfe % 2):
            # 2 K - 1 calls to time 0, else 2 K.
            with pytest.raises(ValueError, match=rf"heun cannot spend exactly {nfe} .* but \d"):
                solver_within(name, nfe, schedule_of)
        else:
            assert solver_within(name, nfe, schedule_of).nfe == nfe


@PROCESSES
@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name, solver in SOLVERS.items() if solver.rows is not None),
        ("dpm-solver++-3m", {"compat": True, "lower_order_final": False}),
        ("unipc-3", {"solver_type": "bh1", "output": "epsilon", "lower_order_final": False}),
        ("unipc-2", {"solver_type": "bh1"}),
    ],
)
def test_tables_built_together_are_those_built_one_by_one(name, options, to_zero, process):
    first, last = (1000.0, 1.0) if process is VP else (80.0, 0.002)
    ramp = torch.linspace(0, 1, 6, dtype=torch.float64) ** torch.tensor([[1.0], [0.7], [1.6]])
    times = first ** (1 - ramp) * last**ramp
    if to_zero:
        times = torch.cat([times, torch.zeros(3, 1)], 1)
    stack = SOLVERS[name].stack(process, times, **options)
    for number, row in enumerate(times):
        table = make_solver(name, Schedule(process, row), **options)
        rounding = 1e-11  # of divided differences of log-SNRs that are up to 1e3 times larger
        largest = np.abs(table.weights).max()
        np.testing.assert_allclose(stack.scale[number], table.scale, rtol=rounding)
        np.testing.assert_allclose(stack.weights[number], table.weights, atol=rounding * largest)
        np.testing.assert_array_equal(stack.current[number], table.current)
        np.testing.assert_allclose(
            stack.levels[number], -process.log_snr(row[:-1]).numpy(), atol=rounding
        )
