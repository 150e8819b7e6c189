"""The mathematics of schedule learning against few lines of autograd and brute force (MATH.md 3).

The references below are written from MATH.md, in torch, as functions of the logarithms of the noise
levels. Like the code they take the levels in sampling order, the noisiest first.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from solver_names import ODE_SOLVERS
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.networks import MLP, ResidualMLP, SmallUNet
from fewstep.agents.denoisers.parameterisations import time_range_of
from fewstep.agents.solver_learning.scheduling.adjoint import (
    Sensitivity,
    backpropagate,
    by_log_level,
)
from fewstep.agents.solver_learning.scheduling.levels import (
    LevelMap,
    check_levels,
    level_of_time,
    noise_levels,
    schedule_at,
    step_weights,
    time_of_level,
)
from fewstep.agents.solver_learning.scheduling.objective import Objective
from fewstep.agents.solver_learning.scheduling.paper.loss import (
    denoising_errors,
    diffusion_loss,
    diffusion_programme,
    tuning_loss,
)
from fewstep.agents.solver_learning.scheduling.paper.parts import DataPool, PaperObjective
from fewstep.agents.solver_learning.scheduling.paper.surrogate import Reading, surrogate_gradient
from fewstep.agents.solver_learning.scheduling.pool import Batch
from fewstep.agents.solver_learning.scheduling.probe import check_differentiable
from fewstep.agents.solver_learning.scheduling.programmes import (
    cheapest_path,
    trajectory_programme,
)
from fewstep.agents.solver_learning.scheduling.rollout import path_of
from fewstep.agents.solvers import SOLVERS, make_solver
from fewstep.envs import VE, DiffusionMDP, DiscreteVP, Schedule, Target

pytestmark = pytest.mark.numeric

VP = DiscreteVP.linear(1000)
EDM = VE(0.002, 80.0)
SPACES = ["sigma", "log", "rho"]
STORED_NUMBERS = "fewstep.agents.solver_learning.scheduling.rollout.STORED_NUMBERS"

# MATH.md A.4 and 3.2.
KARRAS = [80, 42.415189, 21.108677, 9.7232014, 4.0661236, 1.501742, 0.46997906, 0.11663856]
KARRAS += [0.020435335, 0.002]
WEIGHTS = [0.90213, 0.0807227, 0.0128915, 0.00292372, 8.39918e-4, 2.86175e-4, 1.10946e-4]
WEIGHTS += [4.75948e-5, 2.21529e-5]


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def assert_close(ours, reference, tolerance):
    """Compare to a share of the largest entry."""
    ours, reference = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, reference))
    assert ours.shape == reference.shape
    assert reference.abs().max() > 0
    worst = float((ours - reference).abs().max() / reference.abs().max())
    assert worst <= tolerance, worst


def squared(error):
    """Squared norm, the mean over samples."""
    return error.square().flatten(1).sum(1).mean()


class Smooth(nn.Module):
    """A small network in float64, smooth in its sample and its time, whatever their size."""

    def __init__(self, seed=0):
        super().__init__()
        source = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return nn.Parameter(torch.randn(*shape, generator=source, dtype=torch.float64))

        self.first, self.phase, self.last = drawn(2, 8), drawn(8), drawn(8, 2)

    def forward(self, sample, time):
        unit = sample / (1 + sample.square().sum(1, keepdim=True) / 4).sqrt()
        phase = (time.double() + 2).log().unsqueeze(1) * self.phase / 3
        return torch.tanh(unit @ self.first / 2 + phase) @ self.last / 3


# ------------------------------------------------------------ processes and solvers from MATH.md


def alpha_sigma(process, logs):
    """MATH.md 0.1 at log noise levels, -lambda."""
    if isinstance(process, VE):
        return torch.ones_like(logs), logs.exp()
    zero = torch.zeros_like(logs)
    return (-torch.logaddexp(zero, 2 * logs) / 2).exp(), (
        -torch.logaddexp(zero, -2 * logs) / 2
    ).exp()


def time_of(process, logs):
    """The time of log noise levels, differentiable."""
    if isinstance(process, VE):
        return logs.exp()
    log_alpha = -torch.log1p((2 * logs).exp()) / 2
    if isinstance(process, DiscreteVP):
        # Linear interpolation of log alpha between whole noisings.
        table = torch.cat([vector(0), torch.log1p(-process.betas).cumsum(0) / 2])
        n = (table >= log_alpha.detach().unsqueeze(-1)).sum(-1).sub(1).clamp(max=len(table) - 2)
        return n + (log_alpha - table[n]) / (table[n + 1] - table[n])
    # log abar = -t^2 (b1 - b0) / 2 - t b0
    b0, b1 = process.slowest, process.fastest
    return (-b0 + (b0**2 - 4 * (b1 - b0) * log_alpha).sqrt()) / (b1 - b0)


def logs_of(process, times):
    """Log noise levels of positive times."""
    times = torch.as_tensor(times, dtype=torch.float64)
    if isinstance(process, VE):
        return times.log()
    if isinstance(process, DiscreteVP):
        table = np.concatenate([[0], np.log1p(-process.betas.numpy()).cumsum()])
        log_abar = torch.from_numpy(np.interp(times.numpy(), np.arange(len(table)), table))
    else:
        b0, b1 = process.slowest, process.fastest
        log_abar = -times.square() * (b1 - b0) / 2 - times * b0
    return (torch.expm1(-log_abar)).log() / 2


def noise_at(denoiser, sample, log):
    """The body's noise prediction at a log level."""
    shift = 1 if isinstance(denoiser.process, DiscreteVP) else 0
    time = time_of(denoiser.process, log) - shift
    return denoiser.body(sample, time.expand(len(sample)))


def edm_denoised(denoiser, sample, level):
    """D(xbar; rho) = xbar - rho e(alpha xbar, t(rho)), MATH.md 0.1."""
    alpha, _ = alpha_sigma(denoiser.process, level.log())
    return sample - level * noise_at(denoiser, alpha * sample, level.log())


def mixture_at(denoiser, sample, log):
    """The noise prediction of the fixture `mixture` by its log level alone: it reads no time."""
    alpha, sigma = alpha_sigma(denoiser.process, log)
    body = denoiser.body
    offsets = sample[:, None] - alpha * body.means
    marginal = alpha**2 * body.variance + sigma**2
    logits = body.weights.log() - offsets.square().sum(2) / (2 * marginal)
    return (logits.softmax(1)[..., None] * offsets).sum(1) * sigma / marginal


def chain(solver, denoiser, logs, x, noise_at=noise_at):
    """The states of a solver at all levels, as functions of their logarithms (MATH.md 1)."""
    alpha, sigma = alpha_sigma(denoiser.process, logs)
    rho, h = logs.exp(), -logs.diff()
    states, earlier = [x], []
    for i in range(len(logs) - 1):
        e = noise_at(denoiser, x, logs[i])
        D = (x - sigma[i] * e) / alpha[i]
        B = alpha[i + 1] * (rho[i + 1] - rho[i])
        if solver == "euler":
            x = (
                sigma[i + 1] / sigma[i] * x
                + (alpha[i + 1] - alpha[i] * sigma[i + 1] / sigma[i]) * D
            )
        elif solver == "ddim":
            x = alpha[i + 1] * D + sigma[i + 1] * e
        elif solver == "ipndm":
            earlier.insert(0, e)
            weights = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12]][i : i + 1]
            weights = weights[0] if weights else [55 / 24, -59 / 24, 37 / 24, -9 / 24]
            O = sum(w * past for w, past in zip(weights, earlier, strict=False))  # noqa: E741
            x = alpha[i + 1] / alpha[i] * x + B * O
        elif solver == "dpm-solver++-2m":
            hat = D
            # Of fewer than ten steps the last one is of first order.
            if 0 < i < len(logs) - 2:
                r0 = h[i - 1] / h[i]
                hat = (1 + 1 / (2 * r0)) * D - earlier[0] / (2 * r0)
            earlier.insert(0, D)
            x = sigma[i + 1] / sigma[i] * x + alpha[i + 1] * -torch.expm1(-h[i]) * hat
        elif solver == "heun":
            guess = alpha[i + 1] * (x / alpha[i] + (rho[i + 1] - rho[i]) * e)
            mean = (e + noise_at(denoiser, guess, logs[i + 1])) / 2
            x = alpha[i + 1] / alpha[i] * x + B * mean
        states.append(x)
    return states


def autograd_error(solver, denoiser, logs, x, target, noise_at=noise_at):
    """The error of a rollout and its derivatives by the log levels, the ends' set to 0."""
    leaf = logs.clone().requires_grad_()
    loss = squared(chain(solver, denoiser, leaf, x, noise_at)[-1] - target)
    (gradient,) = torch.autograd.grad(loss, leaf)
    gradient[[0, -1]] = 0
    return float(loss.detach()), gradient


def exact_gradient(solver, schedule, denoiser, noise, target):
    """The code's error and derivatives."""
    tableau = make_solver(solver, schedule)
    rows = tableau.steps - int(tableau.times[-1] == 0)
    error, ends, sensitivity = backpropagate(tableau, denoiser, noise, target, rows)
    assert ends.shape == noise.shape
    return error, by_log_level(lambda s: make_solver(solver, s), schedule, sensitivity)


def on(process, levels, to_zero=False):
    """A schedule at noise levels."""
    logs = torch.as_tensor(levels, dtype=torch.float64).log()
    times = time_of(process, logs).clamp(max=process.t_max)
    return Schedule(process, torch.cat([times, vector(0)]) if to_zero else times)


@pytest.fixture
def worlds(smooth_vp):
    """`worlds(name)`: a process and a schedule of seven levels without any pattern.

    The times of the discrete process lie half-way between noisings, where it is smooth.
    """

    def make(name, to_zero=False):
        process = {"VE": EDM, "smooth": smooth_vp, "VP": VP}[name]
        times = {
            "VE": [80.0, 31.0, 9.0, 4.0, 0.7, 0.05, 0.002],
            "smooth": [1.0, 0.81, 0.5, 0.34, 0.13, 0.02, 1e-3],
            "VP": [1000.0, 731.5, 512.5, 330.5, 111.5, 20.5, 1.0],
        }[name]
        return process, Schedule(process, [*times, 0.0] if to_zero else times)

    return make


@pytest.fixture
def make(mixture):
    """`make(body, process)`: a noise predictor by name."""

    def build(name, process):
        return mixture(process) if name == "mixture" else Denoiser(Smooth(), process)

    return build


@pytest.fixture
def draw_clean(mixture):
    """`draw_clean(n, seed)`: samples of the mixture that the fixture denoises."""
    body = mixture(EDM).body

    def draw(n, seed=0):
        source = torch.Generator().manual_seed(seed)
        which = torch.multinomial(body.weights, n, replacement=True, generator=source)
        noise = torch.randn(n, 2, generator=source, dtype=torch.float64)
        return body.means[which] + math.sqrt(body.variance) * noise

    return draw


# ------------------------------------------------------------------------- levels as parameters

gaps = st.lists(st.floats(0.05, 2.0), min_size=2, max_size=8)
greatest = st.floats(0.5, 100.0)


def descending(gaps, greatest):
    return greatest * (-vector(0, *gaps).cumsum(0)).exp()


@pytest.mark.parametrize("space", SPACES)
@given(gaps=gaps, greatest=greatest)
@settings(max_examples=50, deadline=None)
def test_levels_to_parameters_and_back(space, gaps, greatest):
    levels = descending(gaps, greatest)
    level_map = LevelMap(float(levels[-1]), float(levels[0]), space)
    parameters = level_map.parameters(levels)
    assert parameters.shape == (len(levels) - 2,)
    again = level_map.levels(parameters)
    assert torch.equal(again[[0, -1]], levels[[0, -1]])
    # A small level is the small end plus a share of the large one's digits.
    absolute = 1e-13 * greatest if space == "sigma" else 0
    torch.testing.assert_close(again, levels, rtol=1e-11, atol=absolute)


@pytest.mark.parametrize("space", SPACES)
@given(
    parameters=st.lists(st.floats(-6, 6), min_size=1, max_size=8),
    least=st.floats(1e-3, 0.4),
    greatest=greatest,
)
@settings(max_examples=50, deadline=None)
def test_any_parameters_are_levels(space, parameters, least, greatest):
    level_map = LevelMap(least, greatest, space)
    parameters = vector(*parameters)
    levels = level_map.levels(parameters)
    assert levels.dtype == torch.float64
    assert (levels[0], levels[-1]) == (greatest, least)
    assert (levels.diff() < 0).all()
    check_levels(levels)
    torch.testing.assert_close(level_map.parameters(levels), parameters, rtol=1e-6, atol=1e-6)
    # Eq. 13 in its own order, with a sum for each level.
    forth, back = {
        "sigma": (lambda s: s, lambda f: f),
        "log": (math.log, math.exp),
        "rho": (lambda s: s ** (1 / 7), lambda f: f**7),
    }[space]
    exponentials = np.exp([*parameters.tolist(), 1])
    shares = exponentials / exponentials.sum()
    low, high = forth(least), forth(greatest)
    upward = [back(low + (high - low) * shares[: t - 1].sum()) for t in range(1, len(shares) + 2)]
    np.testing.assert_allclose(levels.numpy(), upward[::-1], rtol=1e-11)


@pytest.mark.parametrize("space", SPACES)
def test_the_jacobian_of_the_levels(space, generator):
    level_map = LevelMap(0.002, 80.0, space)
    parameters = torch.randn(6, generator=generator(), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(level_map.levels, parameters).flip(0)
    w = torch.cat([parameters, vector(1)]).softmax(0)
    levels = level_map.levels(parameters).flip(0)
    scale, derivative = {
        "sigma": (80 - 0.002, torch.ones(8)),
        "log": (math.log(80 / 0.002), levels),
        "rho": (80 ** (1 / 7) - 0.002 ** (1 / 7), 7 * levels ** (6 / 7)),
    }[space]
    for t, k in itertools.product(range(1, 9), range(1, 7)):
        inner = w[k - 1] * (float(k <= t - 1) - w[: t - 1].sum())
        expected = float(scale * inner * derivative[t - 1]) if 1 < t < 8 else 0.0
        assert float(jacobian[t - 1, k - 1]) == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_equal_parameters_are_even_levels():
    ones = vector(*[1] * 8)
    rho = LevelMap(0.002, 80.0).levels(ones)
    np.testing.assert_allclose(rho, KARRAS, rtol=5e-8)
    np.testing.assert_allclose(rho, Schedule.karras(EDM, 10).times[:-1], rtol=1e-12)
    np.testing.assert_allclose(
        LevelMap(0.002, 80.0, "log").levels(ones), np.geomspace(80, 0.002, 10), rtol=1e-12
    )
    np.testing.assert_allclose(
        LevelMap(0.002, 80.0, "sigma").levels(ones), np.linspace(80, 0.002, 10), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("least", "greatest", "space", "message"),
    [
        (1.0, 1.0, "rho", r"sigma_min = 1 and sigma_max = 1"),
        (2.0, 1.0, "log", r"between 0 and the largest"),
        (0.0, 1.0, "sigma", r"between 0 and the largest"),
        (-1.0, 1.0, "rho", r"between 0 and the largest"),
        (1.0, math.inf, "rho", r"between 0 and the largest"),
        (math.nan, 1.0, "rho", r"between 0 and the largest"),
        (0.1, 1.0, "cube", r"space 'cube'.*log, rho, sigma"),
    ],
)
def test_bad_maps_are_refused(least, greatest, space, message):
    with pytest.raises(ValueError, match=message):
        LevelMap(least, greatest, space)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([80, 0.002], r"at least 3 noise levels.*got 2\. Take more steps"),
        ([80], r"at least 3 noise levels"),
        ([80, 1, 1, 0.002], r"strictly descend"),
        ([0.002, 1, 80], r"strictly descend"),
        ([80, 90, 0.002], r"strictly descend"),
        ([80, math.nan, 0.002], r"strictly descend"),
        ([math.inf, 1, 0.002], r"strictly descend"),
        ([80, 1, 0], r"must be positive"),
        ([80, 1, -0.002], r"must be positive"),
        ([79, 1, 0.002], r"from 79 to 0\.002, expected 80 to 0\.002"),
        ([80, 1, 0.003], r"from 80 to 0\.003, expected 80 to 0\.002"),
    ],
)
def test_bad_levels_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        LevelMap(0.002, 80.0).parameters(vector(*levels))


@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
@pytest.mark.parametrize("to_zero", [False, True])
def test_levels_of_a_schedule(name, to_zero, worlds):
    process, schedule = worlds(name, to_zero)
    levels = noise_levels(schedule)
    assert len(levels) == 7
    torch.testing.assert_close(
        levels, logs_of(process, schedule.times[:7]).exp(), rtol=1e-9, atol=0
    )
    moved = levels.clone()
    moved[1:-1] *= 1.01
    there = schedule_at(moved, schedule)
    assert len(there.times) == len(schedule.times)
    assert torch.equal(there.times[[0, 6, -1]], schedule.times[[0, 6, -1]])
    torch.testing.assert_close(noise_levels(there)[1:-1], moved[1:-1], rtol=1e-10, atol=0)
    torch.testing.assert_close(
        there.times[1:6], time_of(process, moved[1:-1].log()), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
def test_times_and_levels_are_inverse_and_differentiable(name, worlds):
    process, schedule = worlds(name)
    times = schedule.times[1:-1].clone().requires_grad_()
    levels = level_of_time(process, times)
    again = time_of_level(process, levels)
    torch.testing.assert_close(again, times, rtol=1e-10, atol=0)
    (slope,) = torch.autograd.grad(again.sum(), times)
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------- Euler's expansion


def test_the_published_weights():
    weights = step_weights(Schedule.karras(EDM, 10).times[:-1])
    np.testing.assert_allclose(weights.flip(0), WEIGHTS, rtol=5e-6)


@given(gaps=gaps, greatest=greatest)
@settings(max_examples=100, deadline=None)
def test_the_weights_sum_to_nearly_one(gaps, greatest):
    levels = descending(gaps, greatest)
    weights = step_weights(levels)
    assert weights.shape == (len(levels) - 1,)
    assert (weights > 0).all()
    assert float(weights.sum()) == pytest.approx(1 - float(levels[-1] / levels[0]), rel=1e-12)


@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_euler_s_steps_telescope(solver, name, worlds, mixture, prior):
    process, schedule = worlds(name, to_zero=True)
    noise = prior(process)
    path = path_of(make_solver(solver, schedule), mixture(process), noise)
    levels = logs_of(process, schedule.times[:7]).exp()
    torch.testing.assert_close(path.levels, levels, rtol=1e-9, atol=0)
    assert (len(path.states), len(path.outputs)) == (7, 6)
    alpha, _ = alpha_sigma(process, levels.log())
    weights = step_weights(levels)
    expanded = levels[-1] / levels[0] * noise / alpha[0]
    for weight, state, output, level in zip(
        weights, path.states, path.outputs, levels, strict=False
    ):
        assert_close(output, edm_denoised(mixture(process), state, level), 1e-7)
        expanded = expanded + weight * output
    assert_close(path.states[-1], expanded, 1e-9)


def test_what_a_rollout_from_noised_data_misses(mixture, draw_clean, generator):
    clean = draw_clean(50)
    first, second = (
        torch.randn(50, 2, generator=generator(seed), dtype=torch.float64) for seed in (1, 2)
    )
    levels = vector(80, 20, 3, 0.4, 0.1)
    path = path_of(make_solver("euler", on(VE(0.1, 80.0), levels)), mixture(VE(0.1, 80.0)),
                   clean + 80 * first)  # fmt: skip
    missed = path.states[-1] - (clean + 0.1 * second)
    errors = sum(w * (D - clean) for w, D in zip(step_weights(levels), path.outputs, strict=True))
    assert_close(missed, errors + 0.1 * (first - second), 1e-12)


# ------------------------------------------------------------------------- the exact gradient

CHAINS = ["euler", "ddim", "ipndm", "dpm-solver++-2m", "heun"]


@pytest.mark.parametrize("body", ["network", "mixture"])
@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
@pytest.mark.parametrize("solver", CHAINS)
def test_the_gradient_is_that_of_the_unrolled_chain(solver, name, body, worlds, make, prior):
    process, schedule = worlds(name)
    denoiser, noise = make(body, process), prior(process)
    target = prior(process).flip(0) / process.prior_std(process.t_max)
    logs = logs_of(process, schedule.times)
    error, gradient = exact_gradient(solver, schedule, denoiser, noise, target)
    expected, reference = autograd_error(solver, denoiser, logs, noise, target)
    assert error == pytest.approx(expected, rel=1e-9)
    assert gradient.dtype == torch.float64
    assert gradient[0] == gradient[-1] == 0
    # Derivatives by the numbers of Heun's table in data prediction are up to 3000 times their sum,
    # which by_log_level follows over a distance of 1e-3: ten times that rounding.
    rounding = 10 * 3000 * torch.finfo(torch.float64).eps / 1e-3
    assert_close(gradient, reference, rounding if solver == "heun" else 1e-10)


WHOLE = vector(1000, 700, 400, 150, 50, 10, 1)


@pytest.mark.parametrize("shift", [0, 0.05, 1e-10, -1e-10])
def test_the_gradient_near_whole_noisings(shift, mixture, prior):
    """As a function of the levels this error has no kinks at all."""
    times = WHOLE.clone()
    times[1:-1] += shift
    denoiser, noise, target = mixture(VP), prior(VP), prior(VP).flip(0)
    _, gradient = exact_gradient("ddim", Schedule(VP, times), denoiser, noise, target)
    logs = logs_of(VP, times)
    _, reference = autograd_error("ddim", denoiser, logs, noise, target, mixture_at)
    # Here the code differentiates from one side, whose truncation is 6 times the centred one's.
    assert_close(gradient, reference, 1e-9)


@pytest.mark.parametrize("solver", ["ddim", "deis"])
def test_the_gradient_at_whole_noisings_is_the_one_towards_more_noise(solver, prior):
    """This network and DEIS read the time, which bends there; rounding doesn't choose the side."""
    denoiser, noise, target = Denoiser(Smooth(), VP), prior(VP), prior(VP).flip(0)
    logs, ahead = logs_of(VP, WHOLE), logs_of(VP, (WHOLE + 0.1).clamp(max=1000))

    @torch.no_grad()
    def loss(moved):
        times = torch.cat([WHOLE[:1], time_of(VP, moved)[1:-1], WHOLE[-1:]])
        tableau = make_solver(solver, Schedule(VP, times))
        return float(squared(tableau.sample(denoiser, noise) - target))

    reference = torch.zeros(7, dtype=torch.float64)
    for i in range(1, 6):
        # Five points before a tenth of the way to the next whole noising.
        step = float(ahead[i] - logs[i]) / 4
        for distance, weight in enumerate((-25 / 12, 4, -3, 4 / 3, -1 / 4)):
            moved = logs.clone()
            moved[i] += distance * step
            reference[i] += weight * loss(moved) / step
    for ulps in (-40, -3, -1, 0, 1, 3, 40):
        times = WHOLE * (1 + ulps * torch.finfo(torch.float64).eps)
        times[[0, -1]] = WHOLE[[0, -1]]
        _, gradient = exact_gradient(solver, Schedule(VP, times), denoiser, noise, target)
        assert_close(gradient, reference, 1e-8)


@pytest.mark.parametrize("solver", ["euler", "ddim", "ipndm", "heun"])
def test_a_last_step_to_clean_data_is_left_out(solver, worlds, make, prior):
    process, schedule = worlds("VE", to_zero=True)
    denoiser, noise = make("network", process), prior(process)
    target = noise.flip(0) / 80
    error, gradient = exact_gradient(solver, schedule, denoiser, noise, target)
    expected, reference = autograd_error(solver, denoiser, schedule.times[:-1].log(), noise, target)
    assert error == pytest.approx(expected, rel=1e-9)
    assert_close(gradient, reference, 1e-10)


@pytest.mark.parametrize("name", ["VE", "smooth"])
@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_the_gradient_is_the_difference_quotient(solver, name, worlds, prior):
    process, schedule = worlds(name, to_zero=not SOLVERS[solver].to_t_min)
    denoiser, noise = Denoiser(Smooth(), process), prior(process)
    target = noise.flip(0) / process.prior_std(process.t_max)
    logs = logs_of(process, schedule.times[:7])
    ending = schedule.times[7:]

    @torch.no_grad()
    def loss(moved):
        times = torch.cat([schedule.times[:1], time_of(process, moved)[1:-1], schedule.times[6:7]])
        tableau = make_solver(solver, Schedule(process, torch.cat([times, ending])))
        states = tableau.sample(denoiser, noise, return_trajectory=True)
        return float(squared(states[tableau.steps - len(ending)] - target))

    error, gradient = exact_gradient(solver, schedule, denoiser, noise, target)
    assert error == pytest.approx(loss(logs), rel=1e-9)
    reference = torch.zeros(7, dtype=torch.float64)
    step = 1e-4
    for i in range(1, 6):
        for distance, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            moved = logs.clone()
            moved[i] += distance * step
            reference[i] += weight * loss(moved) / (12 * step)
    assert_close(gradient, reference, 1e-7)


def test_the_published_adjoint(mixture, prior, worlds):
    """The recursion of MATH.md 3.5, with two products with Jacobians for each level."""
    process, schedule = worlds("VE")
    denoiser, noise = mixture(process), prior(process)
    target, levels = noise.flip(0) / 80, schedule.times
    states = chain("euler", denoiser, levels.log(), noise)
    p = 2 * (states[-1] - target) / len(noise)
    by_level = torch.zeros(7, dtype=torch.float64)
    for i in reversed(range(6)):
        here, after = levels[i], levels[i + 1]
        c = 1 - after / here
        x, level = states[i].clone().requires_grad_(), here.clone().requires_grad_()
        D = edm_denoised(denoiser, x, level)
        pulled, along = torch.autograd.grad(D, (x, level), p)
        away = float((p * (states[i] - D.detach())).sum())
        by_level[i] += c * along - after / here**2 * away
        by_level[i + 1] += away / here
        p = after / here * p + c * pulled
    by_level[[0, -1]] = 0
    for solver in ("euler", "ddim"):
        _, gradient = exact_gradient(solver, schedule, denoiser, noise, target)
        assert_close(gradient, by_level * levels, 1e-10)


@pytest.mark.parametrize("solver", ["euler", "heun", "ipndm", "dpm-solver-3"])
def test_chunks_change_nothing(solver, worlds, prior, monkeypatch):
    process, schedule = worlds("smooth")
    denoiser, noise = Denoiser(Smooth(), process), prior(process)
    tableau = make_solver(solver, schedule)

    def run():
        for weight in denoiser.parameters():
            weight.grad = None
        error, ends, sensitivity = backpropagate(
            tableau, denoiser, noise, noise.flip(0), tableau.steps, list(denoiser.parameters())
        )
        gradients = [weight.grad for weight in denoiser.parameters()]
        return error, ends, sensitivity, gradients

    whole = run()
    calls = []
    handle = denoiser.body.register_forward_hook(
        lambda _m, inputs, _o: calls.append(len(inputs[0]))
    )
    numbers = 2 * (tableau.steps + 1) * 2
    for stored, sizes in ((1, {1}), (3 * numbers, {1, 3})):
        monkeypatch.setattr(STORED_NUMBERS, stored)
        calls.clear()
        parts = run()
        assert set(calls) == sizes  # of seven samples
        assert parts[0] == pytest.approx(whole[0], rel=1e-13)
        assert_close(parts[1], whole[1], 1e-14)
        for name in ("levels", "scale", "weights"):
            assert_close(getattr(parts[2], name), getattr(whole[2], name), 1e-12)
        for ours, reference in zip(parts[3], whole[3], strict=True):
            assert_close(ours, reference, 1e-12)
    handle.remove()


class Alive:
    """Counts tensors that autograd keeps for a backward pass."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Alive.now += 1
        Alive.most = max(Alive.most, Alive.now)

    def __del__(self):
        Alive.now -= 1


@pytest.mark.parametrize("solver", ["euler", "ipndm", "heun", "dpm-solver-3"])
def test_one_network_graph_is_alive_at_a_time(solver, grid, smooth_vp, prior):
    denoiser, noise = Denoiser(Smooth(), smooth_vp), prior(smooth_vp)
    most = {}
    for steps in (5, 20):
        tableau = make_solver(solver, grid("log_snr", smooth_vp, steps))
        Alive.now = Alive.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Alive, lambda kept: kept.tensor):
            backpropagate(tableau, denoiser, noise, noise, tableau.steps)
            most[steps] = Alive.most
            assert Alive.now == 0
            squared(denoiser.denoised(noise, torch.tensor(0.5, requires_grad=True))).backward()
            one_call = Alive.most
    assert 0 < most[5] == most[20] <= one_call + 2


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm-solver-2", "ipndm"])
def test_the_network_s_own_gradient(solver, worlds, prior):
    process, schedule = worlds("VE")
    denoiser, noise = Denoiser(Smooth(), process), prior(process)
    target = noise.flip(0) / 80
    tableau = make_solver(solver, schedule)
    weights = list(denoiser.parameters())
    states, outputs = [noise], []
    for j in range(tableau.steps):
        outputs.append(tableau.evaluate(denoiser, states[j], j))
        states.append(tableau.advance(j, states, outputs))
    reference = torch.autograd.grad(squared(states[-1] - target), weights)
    for _ in range(2):  # added up
        backpropagate(tableau, denoiser, noise, target, tableau.steps, weights)
    for weight, expected in zip(weights, reference, strict=True):
        assert_close(weight.grad, 2 * expected, 1e-12)
    denoiser.zero_grad()
    backpropagate(tableau, denoiser, noise, target, tableau.steps)
    assert all(weight.grad is None for weight in weights)


def test_a_network_without_a_time_still_has_a_gradient(worlds, prior):
    class Timeless(nn.Module):
        def forward(self, sample, _time):
            return torch.tanh(sample)

    process, schedule = worlds("smooth")
    denoiser, noise = Denoiser(Timeless(), process), prior(process)
    error, gradient = exact_gradient("ddim", schedule, denoiser, noise, noise.flip(0))
    logs = logs_of(process, schedule.times)
    expected, reference = autograd_error("ddim", denoiser, logs, noise, noise.flip(0))
    assert error == pytest.approx(expected)
    assert_close(gradient, reference, 1e-10)


def test_sensitivity_is_the_change_of_the_error(worlds, prior):
    process, schedule = worlds("VE")
    denoiser, noise = Denoiser(Smooth(), process), prior(process)
    here = make_solver("heun", schedule)
    error, _, sensitivity = backpropagate(here, denoiser, noise, noise / 80, here.steps)
    changes = []
    for size in (1e-4, 1e-5):
        levels = schedule.times.clone()
        levels[1:-1] *= 1 + size * torch.arange(1, 6)
        there = make_solver("heun", Schedule(process, levels))
        moved, _, _ = backpropagate(there, denoiser, noise, noise / 80, there.steps)
        changes.append(abs(moved - error - sensitivity.along(here, there)))
    assert 50 < changes[0] / changes[1] < 200  # of second order
    assert sensitivity.along(here, here) == 0
    assert Sensitivity.zeros(here.steps).along(here, there) == 0


# ------------------------------------------------------------------- one process seen as another


@pytest.mark.parametrize("name", ["smooth", "VP"])
@pytest.mark.parametrize("solver", CHAINS)
def test_vp_seen_as_edm(solver, name, worlds, mixture, prior):
    """MATH.md 0.1: in xbar = x / alpha the two processes are one, but for the error's unit."""
    process, schedule = worlds(name)
    logs = logs_of(process, schedule.times)
    alpha, _ = alpha_sigma(process, logs)
    ve = VE(float(logs[-1].exp()) / 2, float(logs[0].exp()) * 2)
    noise = prior(process)
    target = noise.flip(0) / 2
    error, gradient = exact_gradient(solver, schedule, mixture(process), noise, target)
    bar_error, bar_gradient = exact_gradient(
        solver, Schedule(ve, logs.exp()), mixture(ve), noise / alpha[0], target / alpha[-1]
    )
    assert error == pytest.approx(float(alpha[-1] ** 2) * bar_error, rel=1e-8)
    assert_close(gradient, alpha[-1] ** 2 * bar_gradient, 1e-8)


# ------------------------------------------------------------------------------ equation 14

RESIDUALS, INPUTS = ("rollout", "one-shot", "convex"), ("rollout", "moving", "noised")


def euler_weights(levels):
    """lambda_t = sigma_1 / sigma_{t-1} - sigma_1 / sigma_t, the noisiest first."""
    return torch.stack(
        [levels[-1] / levels[j + 1] - levels[-1] / levels[j] for j in range(len(levels) - 1)]
    )


def euler_run(denoiser, levels, x):
    """States and outputs of MATH.md 3.1, without the last step."""
    states, outputs = [x], []
    for j in range(len(levels) - 1):
        outputs.append(edm_denoised(denoiser, states[-1], levels[j]))
        share = levels[j + 1] / levels[j]
        states.append(share * states[-1] + (1 - share) * outputs[-1])
    return states, outputs


def surrogate(denoiser, levels, x_T, clean, reading, source):
    """S of MATH.md 3.5 and its derivatives by the levels, the ends' set to 0."""
    last = len(levels) - 1

    def fresh():
        return torch.empty_like(clean).normal_(generator=source)

    with torch.no_grad():
        states, outputs = euler_run(denoiser, levels, x_T)
        weights = euler_weights(levels)
        if reading.residual == "rollout":
            r = states[-1] - clean
        elif reading.residual == "one-shot":
            r = edm_denoised(denoiser, clean + levels[-1] * fresh(), levels[-1]) - clean
        else:
            r = levels[-1] * (x_T - clean) / levels[0]
            for j in range(last):
                D = edm_denoised(denoiser, clean + levels[j] * fresh(), levels[j])
                r = r + weights[j] * (D - clean)
    leaf = levels.clone().requires_grad_()
    S = 0
    for j in range(1, last):
        if reading.input == "rollout":
            z = states[j]
        elif reading.input == "moving":
            along = (states[j - 1] - outputs[j - 1]) / levels[j - 1]
            z = states[j] + (leaf[j] - levels[j]) * along
        else:
            z = clean + leaf[j] * fresh()
        S = S + 2 * weights[j] * (r * edm_denoised(denoiser, z, leaf[j])).sum(1).mean()
    if reading.weight_term:
        moving = euler_weights(leaf)
        S = S + sum(2 * moving[j] * (r * outputs[j]).sum(1).mean() for j in range(last))
    (gradient,) = torch.autograd.grad(S, leaf)
    gradient[[0, -1]] = 0
    return gradient


@pytest.fixture
def noised(worlds, draw_clean, generator):
    """`noised(name)`: a schedule, clean samples, and the noised ones in both processes' units."""

    def build(name, n=20):
        process, schedule = worlds(name)
        logs = logs_of(process, schedule.times)
        clean = draw_clean(n)
        eps = torch.randn(n, 2, generator=generator(5), dtype=torch.float64)
        x_T = clean + logs[0].exp() * eps
        return process, schedule, logs.exp(), clean, x_T, alpha_sigma(process, logs)[0]

    return build


@pytest.mark.parametrize("name", ["VE", "smooth"])
@pytest.mark.parametrize("weight_term", [False, True])
@pytest.mark.parametrize("input_", INPUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_equation_14_as_written(residual, input_, weight_term, name, noised, mixture, generator):
    process, schedule, levels, clean, x_T, alpha = noised(name)
    denoiser, reading = mixture(process), Reading(residual, input_, weight_term)
    assert reading.needs_data == (residual != "rollout" or input_ == "noised")
    path = path_of(make_solver("euler", schedule), denoiser, alpha[0] * x_T)
    gradient = surrogate_gradient(denoiser, path, clean, reading, clean, generator(3))
    reference = surrogate(denoiser, levels, x_T, clean, reading, generator(3))
    # The smallest level of a VP process is known to nine digits only.
    assert_close(gradient, reference, 1e-10 if name == "VE" else 1e-6)
    assert gradient[0] == gradient[-1] == 0


@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
def test_the_moving_reading_is_exact_for_the_last_free_level(name, noised, mixture):
    process, schedule, levels, clean, x_T, alpha = noised(name)
    denoiser = mixture(process)
    path = path_of(make_solver("ddim", schedule), denoiser, alpha[0] * x_T)

    def ours(reading):
        return surrogate_gradient(denoiser, path, clean, reading)

    leaf = levels.clone().requires_grad_()
    loss = squared(euler_run(denoiser, leaf, x_T)[0][-1] - clean)
    (exact,) = torch.autograd.grad(loss, leaf)
    full = ours(Reading(input="moving", weight_term=True))
    assert float(full[-2]) == pytest.approx(float(exact[-2]), rel=1e-6)
    # Earlier levels move all later states, and each part matters.
    for other in (Reading(input="moving"), Reading(input="rollout", weight_term=True)):
        assert abs(float(ours(other)[-2] / exact[-2]) - 1) > 0.01
    assert ((full / exact - 1).abs()[1:-2] > 0.01).all()


def test_one_level_makes_the_moving_reading_the_gradient(noised, mixture):
    process, _, _, clean, x_T, _ = noised("VE")
    denoiser = mixture(process)
    for inner in (0.1, 1.0, 10.0):
        levels = vector(80, inner, 0.002)
        path = path_of(make_solver("euler", on(process, levels)), denoiser, x_T)
        reading = Reading(input="moving", weight_term=True)
        gradient = surrogate_gradient(denoiser, path, clean, reading)
        _, exact = exact_gradient("euler", on(process, levels), denoiser, x_T, clean)
        assert_close(gradient * levels, exact, 1e-10)


def test_the_error_on_data_gives_almost_no_signal(noised, mixture, generator):
    process, schedule, _, clean, x_T, _ = noised("VE", 500)
    denoiser = mixture(process)
    path = path_of(make_solver("euler", schedule), denoiser, x_T)
    sizes = {
        residual: float(
            surrogate_gradient(
                denoiser, path, clean, Reading(residual, "moving"), clean, generator()
            ).norm()
        )
        for residual in ("rollout", "one-shot")
    }
    assert 0 < sizes["one-shot"] < 1e-3 * sizes["rollout"]


def test_theorem_1(mixture, draw_clean, generator):
    """Where (14) with its weight term vanishes, a difference of outputs is a first-order step."""
    process = VE(0.05, 20.0)
    denoiser = mixture(process)
    clean = draw_clean(200)
    x_T = clean + 20 * torch.randn(200, 2, generator=generator(1), dtype=torch.float64)
    reading = Reading("rollout", "rollout", weight_term=True)

    def slope(log_level):
        levels = vector(20, math.exp(log_level), 0.05)
        path = path_of(make_solver("euler", on(process, levels)), denoiser, x_T)
        gradient = surrogate_gradient(denoiser, path, clean, reading)
        return float(gradient[1])

    logs = np.linspace(math.log(0.06), math.log(19), 60)
    slopes = [slope(log) for log in logs]
    falls = [low * high < 0 for low, high in itertools.pairwise(slopes)]
    brackets = [pair for pair, fell in zip(itertools.pairwise(logs), falls, strict=True) if fell]
    assert brackets
    for low, high in brackets:
        level = math.exp(brentq(slope, low, high, xtol=1e-14))
        states, outputs = euler_run(denoiser, vector(20, level, 0.05), x_T)
        r, inverse = states[-1] - clean, 1 / level
        step = 1e-5 * inverse
        after, before = (
            edm_denoised(denoiser, states[1], 1 / vector(inverse + sign * step).squeeze())
            for sign in (1, -1)
        )
        derivative = (after - before) / (2 * step)

        def along(direction, r=r):
            return float((r * direction).sum(1).mean())

        difference = along(outputs[1] - outputs[0])
        assert difference == pytest.approx((1 / 0.05 - inverse) * along(derivative), rel=1e-6)
        assert abs(difference) > 1e-6


@pytest.mark.parametrize(("name", "value"), [("residual", "R1"), ("input", "Z1")])
def test_unknown_readings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Reading(**{name: value})


# ------------------------------------------------------------------------------ denoising losses


@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
@pytest.mark.parametrize("body", ["network", "mixture"])
def test_the_diffusion_loss_and_its_gradient(body, name, worlds, make, draw_clean, generator):
    process, schedule = worlds(name)
    denoiser, clean = make(body, process), draw_clean(30)
    levels = logs_of(process, schedule.times).exp()
    loss, gradient = diffusion_loss(denoiser, levels, clean, generator(4))
    source, leaf = generator(4), levels.clone().requires_grad_()
    expected = 0
    for j, weight in enumerate(euler_weights(leaf)):
        noisy = clean + leaf[j] * torch.empty_like(clean).normal_(generator=source)
        expected = expected + weight * squared(edm_denoised(denoiser, noisy, leaf[j]) - clean)
    (reference,) = torch.autograd.grad(expected, leaf)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9)
    # The noisiest level has a derivative from one side only.
    assert_close(gradient[1:], reference[1:], 1e-9)
    assert not levels.requires_grad


@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
def test_denoising_errors(name, worlds, mixture, draw_clean, generator):
    process, schedule = worlds(name)
    denoiser, clean = mixture(process), draw_clean(30)
    errors = denoising_errors(denoiser, schedule.times, clean, generator(4))
    noise = torch.empty_like(clean).normal_(generator=generator(4))
    expected = [
        float(squared(edm_denoised(denoiser, clean + level * noise, level) - clean))
        for level in logs_of(process, schedule.times).exp()
    ]
    np.testing.assert_allclose(errors, expected, rtol=1e-8)
    assert errors.dtype == torch.float64


# ------------------------------------------------------------------------------ what L_disc is


def of_data(solver, schedule, reading=None, gamma=1.0, diffusion_weight=0.0, **settings):
    """The objective of Huang (2024)."""
    settings = {"target": None, "of_data": True, **settings}
    return PaperObjective(
        lambda s: make_solver(solver, s),
        schedule,
        reading=reading,
        gamma=gamma,
        diffusion_weight=diffusion_weight,
        **settings,
    )


class Fixed:
    """A target that always gives the same samples."""

    def __init__(self, samples):
        self.samples = samples

    def draw(self, n, generator, kind):
        assert n == len(self.samples) and kind is None
        return self.samples, None


def total_variance(samples):
    return float(samples.var(0).sum())


@pytest.mark.parametrize("levels", [(6.0, 2.0, 0.7, 0.3), (6.0, 0.9, 0.5, 0.3)])
def test_the_error_on_data_falls_into_three_parts(levels, mixture, draw_clean, generator):
    """MATH.md 3.6: only the first part depends on the schedule, and the posterior mean makes it 0.

    The tolerance is four standard errors of the difference of the two sides.
    """
    process, n = VE(0.3, 6.0), 200_000
    denoiser, levels = mixture(process), vector(*levels)
    clean = draw_clean(n, 1)
    first, second = (
        torch.randn(n, 2, generator=generator(seed), dtype=torch.float64) for seed in (2, 3)
    )
    x_T, x_1 = clean + 6 * first, clean + 0.3 * second
    schedule = on(process, levels)
    objective = of_data("euler", schedule)
    errors = objective.errors(denoiser, objective.build(schedule), [Batch(x_T, x_1, clean)])
    # Errors are a coordinate's, and there are two.
    loss = 2 * float(errors.mean())
    with torch.no_grad():
        end = euler_run(denoiser, levels, x_T)[0][-1]
        best = edm_denoised(denoiser, x_T, levels[0])
    assert loss == pytest.approx(float(squared(end - x_1)), rel=1e-12)
    parts = squared(end - best) + squared(clean - best) + 0.3**2 * 2
    excess = (
        (end - x_1).square() - (end - best).square() - (clean - best).square()
    ).sum(1) - 0.3**2 * 2  # fmt: skip
    standard_error = float(excess.std()) / math.sqrt(n)
    assert abs(loss - float(parts)) < 4 * standard_error
    assert standard_error < 0.005 * loss
    # The cross term that the paper drops is there: without it the sides differ.
    assert abs(loss - float(parts) + 0.3**2 * 2) > 10 * standard_error


# ------------------------------------------------------------------------------ stage one's whole


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("name", ["VE", "smooth"])
def test_the_objective_is_the_sum_of_its_parts(name, to_zero, noised, mixture, generator):
    process, schedule, levels, clean, x_T, alpha = noised(name)
    if to_zero:
        schedule = Schedule(process, [*schedule.times.tolist(), 0.0])
    denoiser = mixture(process)
    batch = Batch(alpha[0] * x_T, alpha[-1] * clean, clean)
    objective = of_data("ddim", schedule, gamma=3.0, diffusion_weight=0.5, target=Fixed(clean))
    slope = objective.slope(denoiser, levels, batch, generator(2))

    leaf = levels.clone().requires_grad_()
    end = euler_run(denoiser, leaf, x_T)[0][-1] * float(alpha[-1])
    disc = squared(end - batch.target)
    source, diff = generator(2), 0
    for j, weight in enumerate(euler_weights(leaf)):
        noisy = clean + leaf[j] * torch.empty_like(clean).normal_(generator=source)
        diff = diff + weight * squared(edm_denoised(denoiser, noisy, leaf[j]) - clean)
    (reference,) = torch.autograd.grad(3 * disc + diff / 2, leaf)
    assert slope.loss == pytest.approx(float(disc.detach()), rel=1e-8)
    assert slope.others["diff_loss"] == pytest.approx(float(diff.detach()) / 2, rel=1e-8)
    spread = total_variance(end.detach()) / total_variance(batch.target)
    assert slope.others["variance_ratio"] == pytest.approx(spread, rel=1e-6)
    # The ends stay fixed.
    assert_close(slope.gradient[1:-1], reference[1:-1], 1e-6)
    table = objective.build(schedule)
    errors = objective.errors(denoiser, table, [batch] * 2)
    assert errors.shape == (2 * len(clean),)
    assert 2 * float(errors.mean()) == pytest.approx(slope.loss)
    # With a teacher the finished samples count, and nothing else is added.
    with torch.no_grad():
        finished = table.sample(denoiser, batch.noise)
    alone = Objective(objective.build, schedule)
    errors = alone.errors(denoiser, table, [batch])
    assert 2 * float(errors.mean()) == pytest.approx(float(squared(finished - clean)))
    slope = alone.slope(denoiser, levels, batch, generator(2))
    assert slope.loss == pytest.approx(float(disc.detach()), rel=1e-8) and not slope.others
    (exact,) = torch.autograd.grad(
        squared(euler_run(denoiser, leaf, x_T)[0][-1] * float(alpha[-1]) - batch.target), leaf
    )
    assert_close(slope.gradient[1:-1], exact[1:-1], 1e-6)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("name", ["VE", "smooth"])
def test_the_objective_reads_equation_14(name, real, noised, mixture, generator, monkeypatch):
    process, schedule, levels, clean, x_T, alpha = noised(name)
    denoiser = mixture(process)
    # Real samples are compared with themselves, not with what noise made of them.
    reached = torch.randn(clean.shape, generator=generator(7)).to(clean)
    batch = Batch(alpha[0] * x_T, reached if real else alpha[-1] * clean, clean)
    reading = Reading("rollout", "moving", weight_term=True)
    objective = of_data("euler", schedule, reading, 3.0, of_data=real)
    reference = 3 * surrogate(denoiser, levels, x_T, clean, reading, None)
    for stored in (2**22, 1):
        monkeypatch.setattr(STORED_NUMBERS, stored)
        slope = objective.slope(denoiser, levels, batch, generator())
        assert_close(slope.gradient, reference, 1e-6)
        end = alpha[-1] * euler_run(denoiser, levels, x_T)[0][-1]
        assert slope.loss == pytest.approx(float(squared(end - batch.target)), rel=1e-8)


def test_a_batch_of_data(worlds, draw_clean, generator):
    process, schedule = worlds("smooth", to_zero=True)
    target = Target.from_sampler(lambda n, seed: draw_clean(n, seed).float(), "Mixture", 1000)
    mdp = DiffusionMDP(target, process, schedule, lambda sample: sample.sum(1))
    n = 40_000
    batch = DataPool(mdp, schedule, None, None, n, 1, 0).fitted[0]
    alpha, sigma = alpha_sigma(process, logs_of(process, vector(1.0, 1e-3)))
    first = (batch.noise - alpha[0] * batch.finished) / sigma[0]
    second = (batch.target - alpha[1] * batch.finished) / sigma[1]
    for noise in (first, second):
        assert noise.mean(0).abs().max() < 5 / math.sqrt(n)
        assert (noise.var(0) - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert (first * second).mean(0).abs().max() < 5 / math.sqrt(n)  # independent
    parts = list(batch.split(15_000))
    assert [len(part.noise) for part in parts] == [15_000, 15_000, 10_000]
    for whole, pieces in zip(batch, zip(*parts, strict=True), strict=True):
        assert pieces == (None,) * 3 if whole is None else torch.equal(torch.cat(pieces), whole)


# ------------------------------------------------------------------------------ programmes


def brute_force(cost, nodes):
    """The least cost of a path and the paths that have it."""
    inner = itertools.combinations(range(1, len(cost) - 1), nodes - 2)
    paths = [[0, *middle, len(cost) - 1] for middle in inner]
    sums = [sum(cost[i][j] for i, j in itertools.pairwise(path)) for path in paths]
    return min(sums), paths, sums


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_cheapest_path(data):
    size = data.draw(st.integers(2, 8))
    nodes = data.draw(st.integers(2, size))
    # Few values make ties; what stands at and below the diagonal is not read.
    number = data.draw(st.sampled_from([st.integers(0, 3), st.floats(-5, 5)]))
    rows = [data.draw(st.lists(number, min_size=size, max_size=size)) for _ in range(size)]
    cost = np.array(rows, dtype=float)
    cost[np.tril_indices(size)] = data.draw(st.sampled_from([-100.0, math.nan, 0.0]))
    path = cheapest_path(cost, nodes)
    least, paths, sums = brute_force(cost, nodes)
    assert path in paths
    assert sums[paths.index(path)] == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("nodes", [-1, 0, 1, 6])
def test_paths_without_enough_nodes_are_refused(nodes):
    with pytest.raises(ValueError, match=rf"2 to 5 nodes, the grid's; got {nodes}"):
        cheapest_path(np.zeros((5, 5)), nodes)


@pytest.mark.parametrize("count", [3, 4, 6, 9])
@pytest.mark.parametrize("name", ["VE", "smooth"])
def test_the_diffusion_programme_minimises_the_diffusion_loss(
    count, name, smooth_vp, mixture, draw_clean, generator
):
    process = EDM if name == "VE" else smooth_vp
    grid = vector(*np.geomspace(60.0, 0.02, 9))
    denoiser, clean = mixture(process), draw_clean(100)
    times = time_of(process, grid.log())
    levels = diffusion_programme(denoiser, times, count, clean, generator(6))
    noise = torch.empty_like(clean).normal_(generator=generator(6))
    mmse = {
        float(level): float(squared(edm_denoised(denoiser, clean + level * noise, level) - clean))
        for level in grid
    }

    def loss(chosen):
        weights = euler_weights(chosen).tolist()
        return sum(w * mmse[float(level)] for w, level in zip(weights, chosen, strict=False))

    losses = {
        inner: loss(torch.stack([grid[0], *(grid[i] for i in inner), grid[-1]]))
        for inner in itertools.combinations(range(1, 8), count - 2)
    }
    best = min(losses, key=losses.get)
    assert_close(levels, grid[[0, *best, 8]], 1e-12)


@pytest.mark.parametrize("name", ["VE", "smooth", "VP"])
@pytest.mark.parametrize("solver", ["euler", "ddim", "ipndm", "dpm-solver++-2m"])
def test_the_trajectory_programme_jumps_best(solver, name, worlds, mixture, prior, monkeypatch):
    process, schedule = worlds(name)
    denoiser, noise = mixture(process), prior(process)
    teacher = make_solver(solver, schedule)
    logs = logs_of(process, schedule.times)
    levels, (alpha, _) = logs.exp(), alpha_sigma(process, logs)
    bars = [x / a for x, a in zip(chain(solver, denoiser, logs, noise), alpha, strict=True)]
    cost = np.zeros((7, 7))
    for i, j in itertools.combinations(range(7), 2):
        D = edm_denoised(denoiser, bars[i], levels[i])
        share = levels[j] / levels[i]
        cost[i, j] = float(squared(share * bars[i] + (1 - share) * D - bars[j]))
    seen = []

    def spy(table, *arguments):
        seen.append(table)
        return cheapest_path(table, *arguments)

    monkeypatch.setattr("fewstep.agents.solver_learning.scheduling.programmes.cheapest_path", spy)
    for stored in (2**22, 1):
        monkeypatch.setattr(STORED_NUMBERS, stored)
        for count in (3, 4, 5, 7):
            kept = trajectory_programme(teacher, denoiser, noise, count)
            ours = np.triu(seen.pop(), 1)
            np.testing.assert_allclose(ours, np.triu(cost, 1), rtol=1e-7, atol=1e-9)
            least, paths, sums = brute_force(cost, count)
            nodes = [int((levels - level).abs().argmin()) for level in kept]
            torch.testing.assert_close(kept, levels[nodes], rtol=1e-9, atol=0)
            assert sums[paths.index(nodes)] == pytest.approx(least, abs=1e-9)


def test_a_teacher_that_goes_on_to_0_gives_positive_levels(worlds, mixture, prior):
    process, schedule = worlds("VE", to_zero=True)
    noise = prior(process)
    ours = trajectory_programme(make_solver("ddim", schedule), mixture(process), noise, 4)
    _, shorter = worlds("VE")
    reference = trajectory_programme(make_solver("ddim", shorter), mixture(process), noise, 4)
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("count", [2, 8])
def test_programmes_refuse_bad_counts(count, worlds, mixture, prior, draw_clean, generator):
    process, schedule = worlds("VE")
    message = r"at least 3 noise levels" if count == 2 else r"2 to 7 nodes.*got 8"
    with pytest.raises(ValueError, match=message):
        diffusion_programme(mixture(process), schedule.times, count, draw_clean(5), generator())
    teacher = make_solver("euler", schedule)
    with pytest.raises(ValueError, match=message):
        trajectory_programme(teacher, mixture(process), prior(process), count)


# ------------------------------------------------------------------------------ the probe

ADVICE = {"learner": "L", "instead": "stop"}


class Timed(nn.Module):
    """A body that embeds what a function makes of its time."""

    def __init__(self, embed, size=2):
        super().__init__()
        self.embed, self.table, self.out = embed, nn.Embedding(1000, size), nn.Linear(size, size)

    def forward(self, sample, time):
        return self.out(sample) + self.embed(self, time)


@pytest.mark.parametrize(
    ("make_body", "prediction", "t", "shape"),
    [
        (lambda: MLP((2,), 1000), "epsilon", 500.0, (2,)),
        (lambda: MLP((2,), 1000), "epsilon", 500.3, (2,)),
        (lambda: MLP((2,), 1000), "v", 1.0, (2,)),
        (lambda: MLP((2,), 64, time_range=time_range_of("edm", EDM)), "edm", 1.0, (2,)),
        (lambda: MLP((2,), 64, time_range=time_range_of("edm", EDM)), "edm", 79.0, (2,)),
        (lambda: ResidualMLP((2,), 16, 1), "epsilon", 400.0, (2,)),
        (lambda: ResidualMLP((1, 2, 2), 16, 1, time_range_of("edm", EDM)), "edm", 0.5, (1, 2, 2)),
        (lambda: SmallUNet((1, 4, 4), 8), "epsilon", 400.0, (1, 4, 4)),
        (lambda: Timed(lambda _, time: time.sin().unsqueeze(1)), "sample", 30.0, (2,)),
    ],
)
def test_networks_with_a_smooth_time_are_accepted(make_body, prediction, t, shape):
    body = make_body()
    process = EDM if prediction == "edm" else VP
    check_differentiable(Denoiser(body, process, prediction), [t, t / 2.5], shape, **ADVICE)
    assert all(weight.grad is None for weight in body.parameters())


@pytest.mark.parametrize("process", [VP, EDM], ids=["VP", "VE"])
def test_a_table_of_times_may_be_flat_at_its_ends(process):
    prediction = "epsilon" if process == VP else "edm"
    body = MLP((2,), 1000, time_range=time_range_of(prediction, process))
    denoiser = Denoiser(body, process, prediction)
    times = Schedule.karras(process, 6).times[:-1].tolist()
    check_differentiable(denoiser, times, (2,), **ADVICE)


COARSE = {
    "long": lambda body, time: body.table(time.long()),
    "lookup": lambda body, time: body.table(time),
    "none": lambda body, time: 0.0,
    "detached": lambda body, time: time.detach().sin().unsqueeze(1),
    "list": lambda body, time: body.table.weight[time],
}


@pytest.mark.parametrize("how", COARSE)
def test_networks_that_look_their_time_up_are_refused(how):
    denoiser = Denoiser(Timed(COARSE[how]), VP)
    with pytest.raises(ValueError, match=r"(?s)^L needs.*differentiable.*Interpolate.*or stop\.$"):
        check_differentiable(denoiser, [500.5, 37.5], (2,), **ADVICE)


def test_a_network_that_does_not_take_the_samples_is_not_called_rough():
    for body in (ResidualMLP((3,), 16, 1), Timed(COARSE["lookup"], 3)):
        with pytest.raises(ValueError, match=r"does not take samples of shape \(2,\), whatever"):
            check_differentiable(Denoiser(body, VP), [500.5, 37.5], (2,), **ADVICE)


@pytest.mark.parametrize("coarse", [torch.round, torch.floor])
def test_networks_that_round_their_time_are_refused(coarse):
    denoiser = Denoiser(Timed(lambda _, time: coarse(time).sin().unsqueeze(1)), VP)
    with pytest.raises(ValueError, match=r"round.*Interpolate"):
        check_differentiable(denoiser, [500.5, 37.5], (2,), **ADVICE)


def test_a_lookup_s_own_words_are_passed_on():
    denoiser = Denoiser(Timed(COARSE["lookup"]), VP)
    with pytest.raises(ValueError, match=r"refuses a time that is no whole number \(.*[Ii]nd"):
        check_differentiable(denoiser, [500.5, 37.5], (2,), **ADVICE)


# ------------------------------------------------------------------------------ stage two


def tuning_draws(levels, clean, source):
    """Levels drawn, and noise, in the code's order."""
    drawn = torch.randint(len(levels), (len(clean),), generator=source)
    noise = torch.empty_like(clean).normal_(generator=source)
    return drawn, levels[drawn].unsqueeze(1), noise


def predicted(denoiser, x, level):
    """D at levels (N, 1), and what the body says, written out for each prediction."""
    process, log = denoiser.process, level.log()
    alpha, sigma = alpha_sigma(process, log)
    if denoiser.prediction == "edm":
        s, d = level, denoiser.sigma_data
        raw = denoiser.body(x / (s**2 + d**2).sqrt(), (log / 4).squeeze(1))
        return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * raw, raw
    shift = 1 if isinstance(process, DiscreteVP) else 0
    raw = denoiser.body(x, (time_of(process, log) - shift).squeeze(1))
    if denoiser.prediction == "epsilon":
        return (x - sigma * raw) / alpha, raw
    return (raw if denoiser.prediction == "sample" else alpha * x - sigma * raw), raw


TUNED = [("VE", "epsilon"), ("VE", "edm"), ("VE", "sample"), ("VP", "epsilon"), ("VP", "v")]


@pytest.mark.parametrize(("name", "prediction"), TUNED)
@pytest.mark.parametrize(("weights", "last"), [("lambda", 1.0), ("lambda", 0.0), ("original", 0.7)])
def test_the_tuning_loss(weights, last, name, prediction, worlds, draw_clean, generator):
    process, schedule = worlds(name)
    denoiser = Denoiser(Smooth(), process, prediction, sigma_data=1.3)
    levels, clean = logs_of(process, schedule.times).exp(), draw_clean(40)
    loss = tuning_loss(denoiser, levels, clean, weights, last, generator(8))
    drawn, level, noise = tuning_draws(levels, clean, generator(8))
    assert set(drawn.tolist()) == set(range(7))
    alpha, sigma = alpha_sigma(process, level.log())
    D, raw = predicted(denoiser, alpha * clean + sigma * noise, level)
    error = (D - clean).square().mean(1)
    if weights == "lambda":
        each = torch.cat([euler_weights(levels), vector(last)])[drawn] * error
    elif prediction == "edm":
        each = error * ((level**2 + 1.3**2) / (level * 1.3) ** 2).squeeze(1)
    else:
        goal = {"epsilon": noise, "sample": clean, "v": alpha * noise - sigma * clean}[prediction]
        each = (raw - goal).square().mean(1)
    assert float(loss.detach()) == pytest.approx(float(each.mean().detach()), rel=1e-8)
    bodies = list(denoiser.parameters())
    ours = torch.autograd.grad(loss, bodies)
    for mine, reference in zip(ours, torch.autograd.grad(each.mean(), bodies), strict=True):
        assert_close(mine, reference, 1e-7)
