"""The mathematics of D-ODE against loops written from MATH.md 2, and its claims on a known problem.

A loop asks `choose` for each new state: `choose(stage)` picks the stage's lambdas, given ones or
those of a least-squares fit, and returns `stage(lambdas)`. `stage` is the formula of the paper.
"""

import dataclasses

import numpy as np
import pytest
import torch
from conditioning import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from solver_names import ODE_SOLVERS
from torch import nn

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.denoisers.exact import mixture as exact_mixture
from fewstep.agents.solver_learning.distillation.fit import (
    GRID,
    Batch,
    best_constant,
    final_error,
    fit,
)
from fewstep.agents.solver_learning.distillation.forms import directions, distilled
from fewstep.agents.solver_learning.distillation.refine import Refinement
from fewstep.agents.solver_learning.distillation.teacher import Teacher, make_teacher
from fewstep.agents.solvers import SOLVERS, make_solver
from fewstep.common.optimisation import frozen
from fewstep.envs import VE, DiscreteVP, Schedule, make_schedule

pytestmark = pytest.mark.numeric

VP = DiscreteVP.linear(1000)
EDM = VE(0.002, 80.0)
PROCESSES = pytest.mark.parametrize("process", [VP, EDM], ids=["VP", "VE"])


# ------------------------------------------------------------------------- choosing the lambdas


class Given:
    """Take the lambdas from a list, one array a stage."""

    def __init__(self, lambdas):
        self.lambdas = iter(lambdas)

    def __call__(self, stage):
        return stage(next(self.lambdas))


class Fitted:
    """Fit the lambdas of each stage to its target with NumPy's lstsq, and keep the state.

    A direction without length counts as none, see MATH.md 2.2; as does what only the rounding of
    parallel directions of unit length tells apart.
    """

    def __init__(self, counts, targets):
        self.work = iter(zip(counts, targets, strict=True))
        self.lambdas = []

    def __call__(self, stage):
        count, target = next(self.work)
        base = stage(np.zeros(max(count, 1)))
        columns = [(stage(unit) - base).flatten().numpy() for unit in np.eye(max(count, 1))[:count]]
        lambdas = np.zeros(max(count, 1))
        shortest = 1e-12 * float(base.square().sum())
        moving = [k for k, column in enumerate(columns) if column @ column > shortest]
        if moving:
            matrix = np.stack([columns[k] for k in moving], 1)
            lengths = np.linalg.norm(matrix, axis=0)
            residual = (target - base).flatten().numpy()
            lambdas[moving] = np.linalg.lstsq(matrix / lengths, residual, rcond=1e-6)[0] / lengths
        self.lambdas.append(lambdas[:count])
        return stage(lambdas)


# ------------------------------------------------------------- the loops of MATH.md 2.4, verbatim


def levels(schedule):
    alpha, sigma = schedule.levels()
    with np.errstate(divide="ignore"):
        return alpha, sigma, sigma / alpha, np.log(alpha / sigma)


def E1(a):
    return np.expm1(a)


def E2(a):
    return np.expm1(a) / a - 1


def P1(a):
    return -np.expm1(-a)


def P2(a):
    return (np.expm1(-a) + a) / a


def d_multistep(schedule, denoiser, x, choose, effective):
    """D-DDIM, D-iPNDM, D-DEIS: x' = A x + B [O + l (O - O_prev)] in noise prediction."""
    alpha, _, rho, _ = levels(schedule)
    raw, O_prev = [], x / schedule.process.prior_std(float(schedule.times[0]))
    for i in range(schedule.steps):
        raw.insert(0, denoiser.epsilon(x, float(schedule.times[i])))
        A, B = alpha[i + 1] / alpha[i], alpha[i + 1] * (rho[i + 1] - rho[i])
        out = effective(schedule, i, raw)
        x = choose(lambda v, A=A, B=B, x=x, out=out, P=O_prev: A * x + B * (out + v[0] * (out - P)))
        O_prev = out
    return x


def newest(_schedule, _i, raw):
    return raw[0]


def adams_bashforth(_schedule, i, raw):
    weights = [[1], [3, -1], [23, -16, 5], [55, -59, 37, -9]][min(i, 3)]
    return sum(w * e for w, e in zip(weights, raw, strict=False)) / sum(weights)


def polynomial_in_time(schedule, i, raw):
    """(1 / B_i) sum_j C_ij e_{i-j} with the integral over rho by parts, between whole noisings."""
    times, (_, _, rho, _) = schedule.times.numpy(), levels(schedule)
    start, end, known = times[i], times[i + 1], times[max(i - 3, 0) : i + 1][::-1]
    inner = np.arange(np.ceil(end), np.ceil(start)) if schedule.process == VP else []
    edges = np.unique([end, *inner, start])
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half = np.diff(edges)[:, None] / 2
    t = torch.from_numpy(edges[:-1, None] + half * (1 + nodes))
    noise_to_signal = (schedule.process.sigma(t) / schedule.process.alpha(t)).numpy()
    out = torch.zeros_like(raw[0])
    for j, own in enumerate(known):
        basis = Polynomial([1.0])
        for other in np.delete(known, j):
            basis *= Polynomial([-other, 1.0]) / (own - other)
        forward = (half * weights * basis.deriv()(t.numpy()) * noise_to_signal).sum()
        integral = basis(end) * rho[i + 1] - basis(start) * rho[i] + forward
        out = out + integral / (rho[i + 1] - rho[i]) * raw[j]
    return out


def blocks_of(steps, order):
    """Blocks of MATH.md 1.4 as (first node, order)."""
    orders = {(7, 2): [2, 2, 2, 1], (6, 2): [2, 2, 2], (7, 3): [3, 3, 1], (6, 3): [3, 2, 1]}
    chosen = orders[steps, order]
    return zip(np.cumsum([0, *chosen[:-1]]).tolist(), chosen, strict=True)


def d_dpm_solver(schedule, denoiser, x, choose, order):
    """D-DPM-Solver-2 and -3, with blocks of lower order where the budget asks for them."""
    alpha, sigma, _, lam = levels(schedule)
    prev = x / schedule.process.prior_std(float(schedule.times[0]))

    def e(state, node):
        return denoiser.epsilon(state, float(schedule.times[node]))

    for s, k in blocks_of(schedule.steps, order):
        t, e0, p = s + k, e(x, s), prev
        h = lam[t] - lam[s]

        def predict(n, r, v, x=x, e0=e0, p=p, s=s, h=h):
            return alpha[n] / alpha[s] * x - sigma[n] * E1(r * h) * (e0 + v * (e0 - p))

        if k == 1:
            x, prev = choose(lambda v, f=predict, t=t: f(t, 1.0, v[0])), e0
            continue
        r1 = (lam[s + 1] - lam[s]) / h
        e1 = e(choose(lambda v, f=predict, s=s, r1=r1: f(s + 1, r1, v[0])), s + 1)
        if k == 2:
            x = choose(
                lambda v, f=predict, t=t, h=h, r1=r1, e0=e0, e1=e1: (
                    f(t, 1.0, 0.0) - sigma[t] * E1(h) / (2 * r1) * ((e1 + v[0] * (e1 - e0)) - e0)
                )
            )
            prev = e1
            continue
        r2 = (lam[s + 2] - lam[s]) / h
        u2 = choose(
            lambda v, f=predict, s=s, h=h, r1=r1, r2=r2, e0=e0, e1=e1: (
                f(s + 2, r2, 0.0)
                - sigma[s + 2] * r2 / r1 * E2(r2 * h) * ((e1 + v[0] * (e1 - e0)) - e0)
            )
        )
        e2 = e(u2, s + 2)
        x = choose(
            lambda v, f=predict, t=t, h=h, r2=r2, e0=e0, e1=e1, e2=e2: (
                f(t, 1.0, 0.0) - sigma[t] / r2 * E2(h) * ((e2 + v[0] * (e2 - e1)) - e0)
            )
        )
        prev = e2
    return x


def d_dpm_solver_pp(schedule, denoiser, x, choose, order):
    """D-DPM-Solver++ 2S and 3S; the first evaluation has nothing before it: prev is itself."""
    alpha, sigma, _, lam = levels(schedule)
    prev = None

    def D(state, node):
        return denoiser.denoised(state, float(schedule.times[node]))

    for s, k in blocks_of(schedule.steps, order):
        t, D0 = s + k, D(x, s)
        p = D0 if prev is None else prev
        h = lam[t] - lam[s]

        def predict(n, r, v, x=x, D0=D0, p=p, s=s, h=h):
            return sigma[n] / sigma[s] * x + alpha[n] * P1(r * h) * (D0 + v * (D0 - p))

        if k == 1:
            x, prev = choose(lambda v, f=predict, t=t: f(t, 1.0, v[0])), D0
            continue
        r1 = (lam[s + 1] - lam[s]) / h
        D1 = D(choose(lambda v, f=predict, s=s, r1=r1: f(s + 1, r1, v[0])), s + 1)
        if k == 2:
            x = choose(
                lambda v, f=predict, t=t, h=h, r1=r1, D0=D0, D1=D1: (
                    f(t, 1.0, 0.0) + alpha[t] * P1(h) / (2 * r1) * ((D1 + v[0] * (D1 - D0)) - D0)
                )
            )
            prev = D1
            continue
        r2 = (lam[s + 2] - lam[s]) / h
        u2 = choose(
            lambda v, f=predict, s=s, h=h, r1=r1, r2=r2, D0=D0, D1=D1: (
                f(s + 2, r2, 0.0)
                + alpha[s + 2] * r2 / r1 * P2(r2 * h) * ((D1 + v[0] * (D1 - D0)) - D0)
            )
        )
        D2 = D(u2, s + 2)
        x = choose(
            lambda v, f=predict, t=t, h=h, r2=r2, D0=D0, D1=D1, D2=D2: (
                f(t, 1.0, 0.0) + alpha[t] / r2 * P2(h) * ((D2 + v[0] * (D2 - D1)) - D0)
            )
        )
        prev = D2
    return x


def d_dpm_solver_pp_2m(schedule, denoiser, x, choose):
    alpha, sigma, _, lam = levels(schedule)
    h = np.diff(lam)
    D_prev = O_prev = None
    for i in range(schedule.steps):
        D = denoiser.denoised(x, float(schedule.times[i]))
        out = D
        if i > 0:
            r0 = h[i - 1] / h[i]
            out = (1 + 1 / (2 * r0)) * D - 1 / (2 * r0) * D_prev
        A, B = sigma[i + 1] / sigma[i], alpha[i + 1] * P1(h[i])
        P = out if O_prev is None else O_prev
        x = choose(lambda v, A=A, B=B, x=x, out=out, P=P: A * x + B * (out + v[0] * (out - P)))
        D_prev, O_prev = D, out
    return x


def d_euler(schedule, denoiser, x, choose):
    """D-DDIM in EDM's parameterisation; xbar = x / alpha."""
    alpha, _, rho, _ = levels(schedule)
    prev = None
    for i in range(schedule.steps):
        D, q, xbar = (
            denoiser.denoised(x, float(schedule.times[i])),
            rho[i + 1] / rho[i],
            x / alpha[i],
        )
        p = D if prev is None else prev
        x = choose(
            lambda v, a=alpha[i + 1], q=q, xbar=xbar, D=D, p=p: (
                a * (q * xbar + (1 - q) * (D + v[0] * (D - p)))
            )
        )
        prev = D
    return x


def d_edm(schedule, denoiser, x, choose):
    """D-EDM, Heun: the corrector reuses the unmodified d, d' starts from the modified u."""
    alpha, _, rho, _ = levels(schedule)
    prev = None
    for i in range(schedule.steps):
        xbar, now, then = x / alpha[i], rho[i], rho[i + 1]
        D = denoiser.denoised(x, float(schedule.times[i]))
        p, d = D if prev is None else prev, (xbar - D) / now
        u = choose(
            lambda v, a=alpha[i + 1], now=now, then=then, xbar=xbar, D=D, d=d, p=p: (
                a * (xbar + (then - now) * d + (1 - then / now) * v[0] * (D - p))
            )
        )
        x, prev = u, D
        if then > 0:
            D2 = denoiser.denoised(u, float(schedule.times[i + 1]))
            d2 = (u / alpha[i + 1] - D2) / then
            x = choose(
                lambda v, a=alpha[i + 1], now=now, then=then, xbar=xbar, D=D, d=d, D2=D2, d2=d2: (
                    a
                    * (
                        xbar
                        + (then - now) * (d + d2) / 2
                        - (then - now) / (2 * then) * v[0] * (D2 - D)
                    )
                )
            )
            prev = D2
    return x


VARIANTS = {
    "D-DDIM": ("ddim", {}, d_multistep, newest),
    "D-iPNDM": ("ipndm", {}, d_multistep, adams_bashforth),
    "D-DEIS": ("deis", {"order": 3}, d_multistep, polynomial_in_time),
    "D-DPM-Solver-2": ("dpm-solver-2", {}, d_dpm_solver, 2),
    "D-DPM-Solver-3": ("dpm-solver-3", {}, d_dpm_solver, 3),
    "D-DPM-Solver++(2S)": ("dpm-solver++-2s", {}, d_dpm_solver_pp, 2),
    "D-DPM-Solver++(3S)": ("dpm-solver++-3s", {}, d_dpm_solver_pp, 3),
    "D-DPM-Solver++(2M)": ("dpm-solver++-2m", {"lower_order_final": False}, d_dpm_solver_pp_2m),
    "D-DDIM (EDM)": ("euler", {}, d_euler),
    "D-EDM": ("heun", {}, d_edm),
}
TO_ZERO = {"D-DDIM", "D-iPNDM", "D-DDIM (EDM)", "D-EDM"}
CASES = [
    (variant, name, steps)
    for variant in VARIANTS
    for name, steps in [("uniform", 7), ("karras", 6), ("karras-to-0", 5)]
    if variant in TO_ZERO or not name.endswith("0")
]
VARIANT_CASES = pytest.mark.parametrize(("variant", "name", "steps"), CASES)


def variant_of(variant, schedule):
    """The base table and the loop `(denoiser, x, choose) -> sample`."""
    solver, options, loop, *rest = VARIANTS[variant]

    @torch.no_grad()
    def run(denoiser, x, choose):
        return loop(schedule, denoiser, x, choose, *rest)

    return make_solver(solver, schedule, **options), run


def some_lambdas(rows, seed=0):
    source = np.random.default_rng(seed)
    return [source.uniform(-0.8, 1.2, len(row)) for row in rows]


def padded(lambdas):
    """Lambdas for the loops, which name one also where there is nothing to mix in."""
    return [values if len(values) else np.array([np.pi]) for values in lambdas]


# The states that two fits make differ by float64's rounding times the largest condition number
# that a fit accepts, 1e6; the factor 40 is for the sums of a fit and for the steps after it.
FITTED = 40 * 1e6 * torch.finfo(torch.float64).eps


def assert_close(ours, expected, tolerance=1e-10):
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * scale)


@VARIANT_CASES
@PROCESSES
def test_a_distilled_table_is_the_loop_of_the_paper(
    process, variant, name, steps, grid, mixture, prior
):
    base, loop = variant_of(variant, grid(name, process, steps))
    denoiser, noise, rows = mixture(process), prior(process), directions(base)
    # One unknown a network call, none before the first in data prediction.
    counts = [len(row) for row in rows]
    assert counts == [0 if base.output == "sample" else 1] + [1] * (base.nfe - 1)
    for seed in range(2):
        lambdas = some_lambdas(rows, seed)
        table = distilled(base, rows, lambdas)
        assert table.name == f"d-{base.name}"
        with torch.no_grad():
            ours = table.sample(denoiser, noise)
        assert_close(ours, loop(denoiser, noise, Given(padded(lambdas))))
    still = distilled(base, rows, [np.zeros(n) for n in counts])
    np.testing.assert_array_equal(still.weights, base.weights)
    np.testing.assert_array_equal(still.scale, base.scale)


@VARIANT_CASES
@PROCESSES
def test_the_fit_is_least_squares_on_the_students_own_states(
    process, variant, name, steps, grid, mixture, generator
):
    schedule = grid(name, process, steps)
    base, loop = variant_of(variant, schedule)
    denoiser, rows = mixture(process), directions(base)
    noise = process.prior_sample((40, 2), generator(1), dtype=torch.float64, t=process.t_max)
    targets = make_teacher(base, schedule, "dpm-solver-3m", scale=3).states(denoiser, noise)
    fits = fit(base, rows, denoiser, [Batch(noise, targets)])
    choose = Fitted([len(row) for row in rows], targets)
    sample = loop(denoiser, noise, choose)
    for ours, expected in zip(fits, choose.lambdas, strict=True):
        np.testing.assert_allclose(ours.lambdas, expected, rtol=1e-6, atol=1e-6)
        assert 0 <= ours.after <= ours.before * (1 + 1e-9)
        assert ours.removed == pytest.approx(1 - ours.after / ours.before)
    table = distilled(base, rows, [step.lambdas for step in fits])
    with torch.no_grad():
        assert_close(table.sample(denoiser, noise), sample, 1e-7)
    error = float((sample - targets[-1]).square().mean())
    assert fits[-1].after == pytest.approx(error, rel=1e-5, abs=1e-14)
    assert final_error(table, denoiser, [Batch(noise, targets)]) == pytest.approx(error, rel=1e-5)


# ------------------------------------------------------------------------------ the other forms


def mixed(form, v, out, earlier):
    """What a form puts in O's place; `earlier` are O_{j-1}, O_{j-2}, ..."""
    if form in ("difference", "fixed"):
        return out + sum(v[0] * (out - P) for P in earlier[:1])
    if form == "two":
        return out + sum(w * (out - P) for w, P in zip(v, earlier[:2], strict=False))
    if form == "sep":
        return (1 + v[0]) * out + v[1] * earlier[0]
    if form == "all":
        return (1 + v[0]) * out + sum(w * P for w, P in zip(v[1:], earlier, strict=True))
    if form == "general":
        return out + sum(w * (out - P) for w, P in zip(v, earlier, strict=False))
    raise AssertionError(form)


@torch.no_grad()
def run_form(form, schedule, denoiser, x, choose, output, effective=newest):
    """One-call solvers in any form."""
    alpha, sigma, rho, _ = levels(schedule)
    ask = denoiser.epsilon if output == "epsilon" else denoiser.denoised
    raw, O_s = [], []
    for i in range(schedule.steps):
        raw.insert(0, ask(x, float(schedule.times[i])))
        out = effective(schedule, i, raw)
        if i > 0:
            earlier = O_s
        elif output == "epsilon":
            earlier = [x / schedule.process.prior_std(float(schedule.times[0]))]
        else:
            # Nothing comes before the first: only "sep" and "all" can still scale it.
            earlier = [torch.zeros_like(x)] if form in ("sep", "all") else []
        if form == "lookahead":
            epsilon = (x - alpha[i] * out) / sigma[i]
            x = choose(
                lambda v, i=i, out=out, P=earlier, e=epsilon: (
                    sigma[i + 1] * e + alpha[i + 1] * mixed("fixed", v, out, P)
                )
            )
        elif output == "epsilon":
            B = alpha[i + 1] * (rho[i + 1] - rho[i])
            x = choose(
                lambda v, i=i, x=x, B=B, out=out, P=earlier: (
                    alpha[i + 1] / alpha[i] * x + B * mixed(form, v, out, P)
                )
            )
        else:
            B = alpha[i + 1] * (1 - rho[i + 1] / rho[i])
            x = choose(
                lambda v, i=i, x=x, B=B, out=out, P=earlier: (
                    sigma[i + 1] / sigma[i] * x + B * mixed(form, v, out, P)
                )
            )
        O_s = [out, *O_s]
    return x


FORMS = ["two", "sep", "all", "general", "fixed"]
FORM_CASES = [
    *((form, *solver) for form in FORMS for solver in (("ddim", newest), ("euler", newest))),
    *((form, "ipndm", adams_bashforth) for form in FORMS),
    ("lookahead", "euler", newest),
]


@pytest.mark.parametrize(("form", "solver", "effective"), FORM_CASES)
@PROCESSES
def test_the_other_forms(process, form, solver, effective, grid, mixture, generator):
    schedule, denoiser = grid("karras", process, 5), mixture(process)
    base = make_solver(solver, schedule)
    rows = directions(base, form)
    data = base.output == "sample"
    first = {"sep": 2, "all": 2}.get(form, 0 if data else 1)
    later = {"two": [1, 2, 2, 2], "sep": [2] * 4, "all": [2, 3, 4, 5], "general": [1, 2, 3, 4]}
    counts = [first, *later.get(form, [1] * 4)]
    assert [len(row) for row in rows] == counts
    noise = process.prior_sample((200, 2), generator(2), dtype=torch.float64, t=process.t_max)

    def run(choose):
        return run_form(form, schedule, denoiser, noise, choose, base.output, effective)

    lambdas = some_lambdas(rows)
    with torch.no_grad():
        ours = distilled(base, rows, lambdas).sample(denoiser, noise)
    assert_close(ours, run(Given(padded(lambdas))))

    targets = make_teacher(base, schedule, "dpm-solver-3m", scale=3).states(denoiser, noise)
    batch = Batch(noise, targets)
    if form in ("fixed", "lookahead"):
        constant = best_constant(base, rows, denoiser, [batch])
        errors = [
            float((run(Given([[value]] * 5)) - targets[-1]).square().mean()) for value in GRID
        ]
        assert constant == GRID[np.argmin(errors)]
        fits = fit(base, rows, denoiser, [batch], constant=constant)
        assert all((step.lambdas == constant).all() for step in fits)
        assert fits[-1].after == pytest.approx(min(errors), rel=1e-9)
        return
    fits = fit(base, rows, denoiser, [batch])
    choose = Fitted(counts, targets)
    sample = run(choose)
    # Two columns that say nearly the same leave their lambdas open, but not what they make.
    scale = max(1.0, float(sample.abs().max()))
    error = float((sample - targets[-1]).square().mean())
    assert fits[-1].after ** 0.5 == pytest.approx(error**0.5, abs=FITTED * scale)
    table = distilled(base, rows, [step.lambdas for step in fits])
    with torch.no_grad():
        assert_close(table.sample(denoiser, noise), sample, FITTED)


def test_a_form_that_holds_another_fits_at_least_as_well(grid, mixture, prior):
    """For the first step they differ in, whose states are still the same."""
    schedule, denoiser, noise = grid("karras", EDM, 5), mixture(EDM), prior(EDM)
    base = make_solver("euler", schedule)
    targets = make_teacher(base, schedule, "heun", scale=3).states(denoiser, noise)
    fits = {
        form: fit(base, directions(base, form), denoiser, [Batch(noise, targets)])
        for form in ("difference", "two", "general")
    }
    assert fits["two"][2].before == pytest.approx(fits["difference"][2].before)
    assert fits["general"][3].before == pytest.approx(fits["two"][3].before)
    assert fits["two"][2].after < fits["difference"][2].after
    assert fits["general"][3].after < fits["two"][3].after


# ------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("form", ["difference", "two", "sep", "all", "general"])
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver-3", "dpm-solver++-2m", "heun"])
def test_many_batches_are_one_large_batch(solver, form, grid, mixture, generator):
    schedule, denoiser = grid("log_snr", VP, 6), mixture(VP)
    base = make_solver(solver, schedule)
    rows, teacher = directions(base, form), make_teacher(base, schedule, "ipndm", scale=2)
    noise = VP.prior_sample((60, 2), generator(), dtype=torch.float64, t=VP.t_max)
    sizes = [7, 30, 23]
    batches = [Batch(part, teacher.states(denoiser, part)) for part in noise.split(sizes)]
    whole = [Batch(noise, teacher.states(denoiser, noise))]
    many, one = (fit(base, rows, denoiser, group) for group in (batches, whole))
    # Nearly parallel directions leave their lambdas open, but not the states that they make.
    states = [
        distilled(base, rows, [step.lambdas for step in fits]).sample(
            denoiser, noise, return_trajectory=True
        )
        for fits in (many, one)
    ]
    for ours, expected in zip(*states, strict=True):
        assert_close(ours, expected, FITTED)
    scale = float(states[1].abs().max())
    for ours, expected in zip(many, one, strict=True):
        assert ours.before**0.5 == pytest.approx(expected.before**0.5, abs=FITTED * scale)
        assert ours.after**0.5 == pytest.approx(expected.after**0.5, abs=FITTED * scale)
        if form == "difference":
            np.testing.assert_allclose(ours.lambdas, expected.lambdas, rtol=1e-9)
    errors = [final_error(base, denoiser, group) for group in (batches, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@PROCESSES
def test_a_teacher_that_is_the_base_solver_leaves_it_alone(process, solver, grid, mixture, prior):
    schedule, denoiser, noise = grid("log_snr", process, 6), mixture(process), prior(process)
    base = make_solver(solver, schedule)
    teachers = [Teacher(base, tuple(range(1, base.steps + 1)))]
    if base.steps == schedule.steps and not SOLVERS[solver].singlestep:
        same = [make_teacher(base, schedule, solver, scale=1, align=a) for a in ("time", "index")]
        for teacher in same:
            np.testing.assert_array_equal(teacher.tableau.weights, base.weights)
            assert teacher.targets == teachers[0].targets
    targets = teachers[0].states(denoiser, noise)
    for form in ("difference", "two", "sep"):
        for step in fit(base, directions(base, form), denoiser, [Batch(noise, targets)]):
            np.testing.assert_allclose(step.lambdas, 0, atol=1e-12)
            assert 0 <= step.after <= step.before + 1e-20
            assert step.before < 1e-20
            assert np.isfinite(step.removed) and step.removed <= 1


def test_a_direction_without_length_gets_no_lambda(grid, prior):
    """A network that always says the same has no differences; and there is no 0 / 0."""

    class Constant(nn.Module):
        def forward(self, sample, _time):
            return torch.full_like(sample, 0.5)

    denoiser, noise, schedule = Denoiser(Constant(), VP), prior(VP), grid("uniform", VP, 5)
    base = make_solver("ddim", schedule)
    targets = torch.ones(5, *noise.shape, dtype=torch.float64)
    fits = fit(base, directions(base), denoiser, [Batch(noise, targets)])
    assert fits[0].lambdas[0] != 0  # against the noise there is a difference
    for step in fits[1:]:
        assert step.lambdas[0] == 0
        assert step.after == pytest.approx(step.before)
        assert step.removed == pytest.approx(0)


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 3.0])
def test_ridge_penalises_by_its_share_of_the_error(ridge, grid, mixture, prior):
    schedule, denoiser, noise = grid("karras", VP, 4), mixture(VP), prior(VP)
    base = make_solver("ddim", schedule)
    targets = make_teacher(base, schedule, "heun", scale=4).states(denoiser, noise)
    plain, shrunk = (
        fit(base, directions(base), denoiser, [Batch(noise, targets)], value)
        for value in (0.0, ridge)
    )
    # Only the first steps of the two students start from the same state. There, with r^2 the error
    # and lambda the plain fit, <b, r> = lambda <b, b> and r^2 - <b, r>^2 / <b, b> is what is left.
    best, before, after = plain[0].lambdas[0], plain[0].before, plain[0].after
    curvature = (before - after) / best**2
    assert shrunk[0].lambdas[0] == pytest.approx(best * curvature / (curvature + ridge * before))
    assert abs(shrunk[0].lambdas[0]) <= 1 / (2 * ridge**0.5)
    assert plain[0].after < shrunk[0].after < shrunk[0].before


# --------------------------------------------------------------------------------- the teacher

SCHEDULES = {
    "karras": lambda process, steps: Schedule.karras(process, steps),
    "karras, rho 3": lambda process, steps: Schedule.karras(
        process, steps, rho=3.0, append_zero=False
    ),
    "uniform": lambda process, steps: Schedule.uniform(process, steps),
    "log_snr": lambda process, steps: Schedule.log_snr(process, steps),
    "quadratic": lambda process, steps: Schedule.quadratic(process, steps),
    "a list": lambda process, _steps: Schedule(
        process, np.array([1, 0.61, 0.4, 0.21, 0.1, 0.04, 0.011]) * process.t_max
    ),
}


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@PROCESSES
def test_time_alignment_meets_every_state_at_its_own_time(process, solver):
    """Of all teachers, each on another kind of schedule."""
    teachers = ["dpm-solver-3m", "heun", "dpm-solver-3", "dpm-solver++-2s", "ddim", solver]
    kinds, turn = list(SCHEDULES), ODE_SOLVERS.index(solver) + (process == EDM)
    for i, name in enumerate(teachers):
        schedule = SCHEDULES[kinds[(i + turn) % len(kinds)]](process, 6)
        student = make_solver(solver, schedule)
        teacher = make_teacher(student, schedule, name, scale=3)
        table = teacher.tableau
        assert [table.times[k] for k in teacher.targets] == student.times[1:].tolist()
        assert table.times[0] == student.times[0]
        assert teacher.targets[-1] == table.steps
        # Each target is the end of a step: no stage of the teacher at that time comes after it.
        for target in teacher.targets:
            later = [j for j in range(target, table.steps) if table.times[j] == table.times[target]]
            assert later in ([], [target])
            assert target == table.steps or table.anchor(target) == target


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpm-solver++-2m"])
def test_the_times_of_a_teacher_refine_those_of_the_student(solver):
    """In the grid's own variable: Karras with C (K - 1) + 1 levels and 0, and so on."""
    cases = [
        (Schedule.karras(EDM, 6), Schedule.karras(EDM, 5 * 5 + 1)),
        (Schedule.karras(EDM, 6, rho=3), Schedule.karras(EDM, 26, rho=3)),
        (Schedule.uniform(VP, 6), Schedule.uniform(VP, 30)),
        (Schedule.log_snr(VP, 6), Schedule.log_snr(VP, 30)),
        (Schedule.quadratic(VP, 6), Schedule.quadratic(VP, 26)),
    ]
    for schedule, fine in cases:
        teacher = make_teacher(make_solver(solver, schedule), schedule, "ddim", scale=5)
        np.testing.assert_allclose(teacher.tableau.times, fine.times, rtol=1e-9)
    # The times of networks that know whole noisings only.
    schedule = Schedule.uniform_torch(VP, 40)
    teacher = make_teacher(
        make_solver("ddim", schedule), schedule, "ddim", scale=30, integer=True
    ).tableau
    assert set(teacher.times) == set(range(977))  # from index 975 to 0 and the clean sample
    teacher = make_teacher(make_solver("ddim", schedule), schedule, "ddim", scale=10, integer=True)
    assert (teacher.tableau.times % 1 == 0).all()
    assert set(schedule.times.tolist()) <= set(teacher.tableau.times)


@PROCESSES
def test_one_teacher_passes_the_times_of_many_students(process):
    """Those of each are among its targets, whatever their grids; near rounding two are one."""
    schedules = [make(process, 6) for make in SCHEDULES.values()]
    schedules = [s for s in schedules if s.times[[0, -1]].tolist() == [process.t_max, 0.0]]
    nudged = schedules[0].times.clone()
    nudged[3] *= 1 + 1e-9
    schedules.append(Schedule(process, nudged))
    students = [make_solver("heun", schedule) for schedule in schedules]
    assert len(students) >= 3
    teacher = make_teacher(students[0], schedules[0], "heun", scale=20, others=students[1:])
    wanted = np.concatenate([student.times[1:] for student in students])
    times = teacher.tableau.times
    np.testing.assert_allclose(times[list(teacher.targets)], wanted, rtol=2e-9)
    unique = np.unique(times)
    assert len(unique) < 20 * 6 + len(wanted)
    assert (np.diff(unique) / unique[1:]).min() > 5e-7
    with pytest.raises(ValueError, match="align='index' compares with one student"):
        make_teacher(students[0], schedules[0], "ddim", align="index", others=students[1:])
    # Its blocks' orders are of its own grid alone.
    orders = {"orders": [2] * 119 + [1]}
    make_teacher(students[0], schedules[0], "dpm-solver-2", orders, 20, others=students[1:])
    # It leads there, too: of the second order, it comes as near as its steps are fine.
    denoiser, _ = exact_mixture(process)
    noise = process.prior_sample(
        (20, 16), torch.Generator().manual_seed(0), dtype=torch.float64, t=process.t_max
    )
    here, there = (Schedule.karras(process, 6, rho=rho) for rho in (7, 4))
    one, other = (make_solver("heun", schedule) for schedule in (here, there))
    alone = make_teacher(other, there, "heun", scale=400).states(denoiser, noise)
    missed = []
    for scale in (20, 80):
        teacher = make_teacher(one, here, "heun", scale=scale, others=[other])
        states = teacher.states(denoiser, noise)
        assert len(states) == one.steps + other.steps
        # The median: a noise between two modes may end in another one.
        each = (states[one.steps :] - alone).square().mean((0, 2)).sqrt()
        missed.append(float(each.median()))
    assert missed[1] < missed[0] / 8


def test_index_alignment_is_the_official_table():
    """MATH.md 2.6, with the noise levels of the teacher's states and of the student's."""
    schedule = Schedule.uniform_torch(VP, 10)
    student = make_solver("ddim", schedule)
    teacher = make_teacher(student, schedule, "ddim", scale=10, align="index")
    index = teacher.tableau.times - 1  # 0-based, -1 is clean data
    assert index[0] == 990
    assert [index[k] for k in teacher.targets] == [*range(890, 0, -100), -1]
    assert (student.times[1:] - 1).tolist() == [*range(800, -1, -100), -1]

    schedule = Schedule.karras(EDM, 10)
    student = make_solver("euler", schedule)
    teacher = make_teacher(student, schedule, "euler", scale=10, align="index")
    levels = [45.0, 24.1, 12.1, 5.65, 2.40, 0.907, 0.292, 0.0756, 0.0141, 0]
    np.testing.assert_allclose(teacher.tableau.times[list(teacher.targets)], levels, rtol=5e-3)
    levels = [42.4, 21.1, 9.72, 4.07, 1.50, 0.470, 0.117, 0.0204, 0.002, 0]
    np.testing.assert_allclose(student.times[1:], levels, rtol=5e-3)

    schedule = Schedule.karras(EDM, 5)
    student = make_solver("heun", schedule)
    teacher = make_teacher(student, schedule, "ddim", scale=10, align="index")
    levels = teacher.tableau.times[list(teacher.targets)]
    np.testing.assert_allclose(student.times[1::2], [17.5, 2.52, 0.170, 0.002, 0], rtol=5e-3)
    np.testing.assert_allclose(levels[::2], [42.1, 9.46, 1.41, 0.103, 0], rtol=5e-3)
    np.testing.assert_allclose(levels[1::2], [20.8, 3.90, 0.431, 0.0171], rtol=5e-3)


@pytest.mark.parametrize("solver", ["ipndm", "deis"])
def test_index_alignment_of_the_multistep_solvers_is_time_alignment(solver):
    schedule = Schedule.uniform(VP, 10, end=VP.t_min)
    student = make_solver(solver, schedule)
    one, other = (
        make_teacher(student, schedule, solver, scale=4, align=align) for align in ("time", "index")
    )
    assert one.targets == other.targets
    np.testing.assert_allclose(one.tableau.times, other.tableau.times, rtol=1e-12)


def test_the_teacher_s_states_are_those_of_its_trajectory(mixture, prior):
    schedule, denoiser, noise = Schedule.karras(EDM, 5), mixture(EDM), prior(EDM)
    student = make_solver("heun", schedule)
    teacher = make_teacher(student, schedule, "heun", scale=4)
    with torch.no_grad():
        states = teacher.tableau.sample(denoiser, noise, return_trajectory=True)
    targets = teacher.states(denoiser, noise)
    assert targets.shape == (9, 7, 2)
    assert torch.equal(targets, states[list(teacher.targets)])
    # Both stages of a step are matched at its end.
    assert torch.equal(targets[0:8:2], targets[1:8:2])


@pytest.mark.parametrize(
    ("solver", "steps"), [("euler", 5), ("euler", 8), ("euler", 10), ("heun", 5), ("heun", 8)]
)
def test_time_alignment_beats_index_alignment_and_the_base(solver, steps):
    """MATH.md 2.6: EDM's grid, 16-d mixture, held-out noise, against the ODE's end."""
    denoiser, _ = exact_mixture(EDM)
    schedule = Schedule.karras(EDM, steps)
    base = make_solver(solver, schedule)
    rows = directions(base)
    fitted, held_out = (
        EDM.prior_sample(
            (n, 16), torch.Generator().manual_seed(n), dtype=torch.float64, t=EDM.t_max
        )
        for n in (100, 400)
    )
    exact = make_solver("dpm-solver-3m", Schedule.karras(EDM, 600))
    with torch.no_grad():
        truth = [Batch(held_out, exact.sample(denoiser, held_out).unsqueeze(0))]
    errors = {"base": final_error(base, denoiser, truth)}
    for align in ("time", "index"):
        teacher = make_teacher(base, schedule, "euler", scale=10, align=align)
        batch = Batch(fitted, teacher.states(denoiser, fitted))
        lambdas = [step.lambdas for step in fit(base, rows, denoiser, [batch])]
        errors[align] = final_error(distilled(base, rows, lambdas), denoiser, truth)
    assert errors["time"] < min(errors["base"], errors["index"])
    if solver == "euler":
        assert errors["time"] < 0.6 * errors["base"] < errors["index"]


# ------------------------------------------------------------------------------- the refinement


@pytest.mark.parametrize("solver", ["ddim", "ipndm", "dpm-solver-3", "heun", "dpm-solver++-2m"])
def test_the_gradient_of_the_refinement(solver, grid, mixture, prior):
    schedule, denoiser, noise = grid("log_snr", VP, 4), mixture(VP), prior(VP)
    base = make_solver(solver, schedule)
    rows = directions(base)
    table = distilled(base, rows, some_lambdas(rows))
    targets = noise.flip(0)
    refinement = Refinement(table, base.weights, torch.device("cpu"))
    with torch.no_grad():
        unrolled, sampled = refinement(denoiser, noise), table.sample(denoiser, noise)
        assert_close(unrolled, sampled, rounding(table, denoiser, noise))
        source = torch.Generator().manual_seed(3)
        shape = refinement.change.shape
        refinement.change.add_(0.05 * torch.randn(shape, generator=source, dtype=torch.float64))

    def loss():
        return (refinement(denoiser, noise) - targets).square().mean()

    loss().backward()
    gradient = refinement.change.grad
    assert not gradient.triu(1).any()
    assert gradient.tril().abs().min() >= 0 and gradient.abs().max() > 1e-3
    step = 1e-6
    with torch.no_grad():
        for j, k in zip(*np.tril_indices(table.steps), strict=True):
            start = refinement.change[j, k].item()
            ends = []
            for sign in (1, -1):
                refinement.change[j, k] = start + sign * step
                ends.append(loss().item())
            refinement.change[j, k] = start
            slope = (ends[0] - ends[1]) / (2 * step)
            assert gradient[j, k].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
        # The exported table is the refined sampler, also after a trip through JSON.
        exported = Tableau.from_json(refinement.export().to_json())
        tolerance = rounding(exported, denoiser, noise)
        assert_close(exported.sample(denoiser, noise), refinement(denoiser, noise), tolerance)
        again = Refinement(exported, base.weights, torch.device("cpu"))
        np.testing.assert_array_equal(again.export().weights, exported.weights)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_the_refinement_starts_at_its_table(solver):
    base = make_solver(solver, Schedule.log_snr(VP, 6))
    exported = Refinement(base, base.weights, torch.device("cpu")).export()
    for field in dataclasses.fields(Tableau):
        ours, given = getattr(exported, field.name), getattr(base, field.name)
        if isinstance(given, np.ndarray):
            np.testing.assert_array_equal(ours, given)
        else:
            assert ours == given


def test_frozen_gives_the_flags_back(wave):
    def flags():
        return [parameter.requires_grad for parameter in wave.parameters()]

    wave.body.still = nn.Parameter(torch.zeros(1), requires_grad=False)
    assert flags() == [True, False]
    with pytest.raises(KeyError), frozen(wave):
        assert flags() == [False, False]
        raise KeyError
    assert flags() == [True, False]


# ------------------------------------------------------------------------------- any table at all


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_distilled_table_survives_json(data):
    solver = data.draw(st.sampled_from(ODE_SOLVERS))
    process = data.draw(st.sampled_from([VP, EDM]))
    name = data.draw(st.sampled_from(["uniform", "karras", "log_snr"]))
    base = make_solver(solver, make_schedule(name, process, data.draw(st.integers(4, 7))))
    forms = ["difference", "two", "sep", "all", "general", "fixed"]
    rows = directions(base, data.draw(st.sampled_from(forms)))
    number = st.floats(-3, 3)
    lambdas = [
        np.array(data.draw(st.lists(number, min_size=len(row), max_size=len(row)))) for row in rows
    ]
    table = distilled(base, rows, lambdas)
    read = Tableau.from_json(table.to_json())
    denoiser, _ = exact_mixture(process, dimension=2, components=3)
    noise = process.prior_sample((3, 2), torch.Generator().manual_seed(0), t=process.t_max)
    with torch.no_grad():
        assert torch.equal(read.sample(denoiser, noise), table.sample(denoiser, noise))


# ------------------------------------------------------------------------------------ bad input


def test_bad_input_is_refused():
    schedule = Schedule.uniform(VP, 5)
    base = make_solver("ddim", schedule)
    for stochastic in (make_solver("ddim", schedule, eta=1.0), make_solver("ancestral", schedule)):
        with pytest.raises(ValueError, match=r"adds noise.*deterministic"):
            directions(stochastic)
    with pytest.raises(ValueError, match=r"form.*'nonsense'|nonsense.*form"):
        directions(base, "nonsense")
    for solver in ("ddim", "dpm-solver++-2m", "heun"):
        with pytest.raises(ValueError, match="lookahead"):
            directions(make_solver(solver, schedule), "lookahead")
    directions(make_solver("ddim", schedule, output="sample"), "lookahead")
    for teacher, options in (("ancestral", {}), ("ddim", {"eta": 0.5})):
        with pytest.raises(ValueError, match=r"teacher.*adds noise"):
            make_teacher(base, schedule, teacher, options)
    for problem, settings_ in (
        ("scale", {"scale": 0}),
        ("align", {"align": "sideways"}),
        ("one network call a step", {"solver": "heun", "align": "index"}),
    ):
        with pytest.raises(ValueError, match=problem):
            make_teacher(base, schedule, **{"solver": "ddim", **settings_})
    with pytest.raises(ValueError, match="list of times"):
        times = Schedule(VP, schedule.times)
        make_teacher(base, times, "ddim", align="index")
