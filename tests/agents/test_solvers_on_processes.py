"""Every solver on every kind of process, those without signal at their last time among them.

The denoisers are exact, so all error is the solver's: on a Gaussian, whose ODE has a closed
solution, and on a mixture, against a fine solution.
"""

import functools
import math
import warnings
from itertools import pairwise, product
from unittest import mock

import numpy as np
import pytest
import torch
from covering import in_turn
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from gaussian_moments import moments
from solver_names import ODE_SOLVERS, STOCHASTIC
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.exact import mixture as exact_mixture
from fewstep.agents.samplers.tableau import std_of
from fewstep.agents.solvers import (
    analytic_dpm,
    ancestral,
    ddim,
    default_schedule,
    deis,
    dpm_solver,
    dpm_solver_multistep,
    dpm_solver_pp,
    dpm_solver_sde,
    euler,
    euler_ancestral,
    flow_heun,
    flow_sde,
    heun,
    ipndm,
    lms,
    make_solver,
    per_pixel_dpm,
    sa_solver,
    unipc,
)
from fewstep.envs import ContinuousVP, CustomProcess, RectifiedFlow, Schedule, make_process

pytestmark = pytest.mark.numeric

MEAN, STD = 0.4, 0.5
PROCESSES = {
    "linear": make_process("linear-1000"),
    "cosine": make_process("cosine-1000"),
    "zero-snr": make_process("linear-1000-zero-snr"),
    "continuous VP": ContinuousVP(),
    "VE": make_process("ve"),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(shift=3.0, time_scale=1000.0),
    "trigonometric": CustomProcess(
        "trigonometric",
        lambda t: (1.5 * t).cos(),
        lambda t: (1.5 * t).sin(),
        0.99,
    ),
}
# Consistency models predict where the ODE ends. An exact denoiser predicts the mean instead, from
# which that sampler makes other samples.
NOISY = [name for name in STOCHASTIC if name != "consistency"]


def with_all_others(quick, names):
    """The quick cases (solver, process), and all others as slow tests."""
    others = [case for case in product(names, PROCESSES) if case not in quick]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


class Gaussian(nn.Module):
    """The exact prediction of the clean sample for data N(MEAN, STD^2)."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, sample, time):
        t = self.process.time_of_network(time)
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (sample - alpha * MEAN)


def gaussian(process):
    return Denoiser(Gaussian(process), process, "sample")


def exact(table, start):
    """Where the probability-flow ODE of the Gaussian leads, from the table's first time to last."""
    (alpha, sigma), (alpha_s, sigma_s) = (
        table.process.levels(float(time)) for time in (table.times[0], table.times[-1])
    )
    spread = math.hypot(alpha_s * STD, sigma_s) / math.hypot(alpha * STD, sigma)
    return alpha_s * MEAN + spread * (start - alpha * MEAN)


def orders(build, order, **options):
    return lambda s: build(s, order, orders=[1] + [order] * (s.steps - 1), **options)


def multistep(build, order):
    return lambda s: build(s, order, solver_type="taylor", lower_order_final=False)


BUILDERS = {
    "ddim": (ddim, 1),
    "euler": (euler, 1),
    "heun": (heun, 2),
    "flow-heun": (flow_heun, 2),
    "ipndm-2": (lambda s: ipndm(s, 2), 2),
    "ipndm-4": (ipndm, 2),
    "deis": (deis, 2),
    "rho-deis": (lambda s: deis(s, basis="rho"), 2),
    "dpm-2": (orders(dpm_solver, 2), 2),
    "dpm-3": (orders(dpm_solver, 3), 2),
    "++2s": (orders(dpm_solver_pp, 2, method="singlestep"), 2),
    "++3s": (orders(dpm_solver_pp, 3, method="singlestep"), 2),
    "2m": (multistep(dpm_solver_multistep, 2), 2),
    "3m": (multistep(dpm_solver_multistep, 3), 2),
    "++2m": (multistep(dpm_solver_pp, 2), 2),
    "++3m": (multistep(dpm_solver_pp, 3), 2),
    "unipc-2": (unipc, 2),
    "unipc-3": (lambda s: unipc(s, 3, "bh1"), 2),
    "unipc-3 of noise": (lambda s: unipc(s, 3, output="epsilon"), 2),
    "lms-2": (lambda s: lms(s, 2), 2),
    "lms": (lms, 2),
    "ipndm-v": (lambda s: make_solver("ipndm-v", s), 2),
    "sa-solver-2": (lambda s: sa_solver(s, tau=0.0), 2),
    "sa-solver-3": (lambda s: sa_solver(s, 3, 4, 0.0, solver_type="bh1"), 2),
}
ABOVE_SECOND = ("ipndm-4", "deis", "rho-deis", "dpm-3", "++3s", "3m", "++3m", "unipc-2")
ABOVE_SECOND += ("unipc-3", "unipc-3 of noise", "lms", "ipndm-v", "sa-solver-2", "sa-solver-3")


# Of processes that begin alike one for each: discrete betas with a rest of signal, none without a
# rest, and the same on a straight path. Between times of the trigonometric one a level is found by
# bisection: slow, and tested elsewhere.
@pytest.mark.parametrize(
    ("name", "process"),
    with_all_others(
        [
            *in_turn(list(BUILDERS), ["linear", "cosine"], 1),
            *in_turn(list(BUILDERS), ["zero-snr", "continuous VP"], 1),
            *in_turn(list(BUILDERS), ["flow", "shifted flow"], 1),
            *((name, "VE") for name in BUILDERS),
        ],
        BUILDERS,
    ),
)
def test_convergence_from_the_last_time_of_the_process(name, process):
    # Above second order the first step, which is of first order, is what remains: with a constant
    # so small that the others' higher orders may hide it.
    build, order = BUILDERS[name]
    errors = []
    # There the error of this one changes its sign between 40 and 160 steps.
    crosses = (name, process) == ("sa-solver-2", "VE")
    for steps in (640, 1280) if crosses else (80, 160):
        forward = PROCESSES[process]
        if process == "VE":
            times = Schedule.karras(forward, steps, append_zero=False).times
        else:
            times = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64) * forward.t_max
            times = times.round() if forward.discrete else times
        with warnings.catch_warnings():
            # That high orders start where next to no signal is left is what is tested.
            warnings.simplefilter("ignore")
            table = build(Schedule(forward, times))
            start = torch.tensor([[-0.7], [1.3]], dtype=torch.float64)
            start *= forward.prior_std(float(times[0]))
            error = table.sample(gaussian(forward), start) - exact(table, start)
        errors.append(float(error.square().mean().sqrt()))
    measured = math.log2(errors[0] / errors[1])
    hidden = name in ABOVE_SECOND and errors[1] < 1e-5
    assert measured > order - 0.25 or hidden
    if order == 1:
        assert measured < 1.25


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_default_grids_give_the_moments(name, process):
    for steps in (1, 2, 3, 5):
        check_moments(name, process, steps)
    # test_starts_and_ends.py has these, more sharply.
    if process not in ("linear", "cosine", "VE"):
        check_moments(name, process, 120)


def check_moments(name, process, steps):
    forward = PROCESSES[process]
    denoiser = gaussian(forward)
    try:
        schedule = default_schedule(name, forward, steps)
        table = make_solver(name, schedule, denoiser)
    except ValueError as error:
        assert steps < 5 and "take a lower order or more steps" in str(error)
        return
    start = torch.tensor([[0.0], [1.0]], dtype=torch.float64) * forward.prior_std(table.times[0])
    low, high = table.sample(denoiser, start).flatten().tolist()
    assert math.isfinite(low) and math.isfinite(high)
    if steps == 120:
        # The starts lack the signal's share at the first time, at most exp(-5.1) of it.
        assert abs(low - MEAN) < 0.04
        assert abs(high - low - STD) < 0.04


@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "VE"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noisy_steps_keep_the_marginals(process, eta):
    forward = PROCESSES[process]
    schedule = Schedule.uniform(forward, 200)
    moments_of(ddim(schedule, eta))
    moments_of(euler_ancestral(schedule, eta))
    moments_of(ancestral(schedule))
    moments_of(dpm_solver_sde(schedule, 1, eta=eta))


@pytest.mark.parametrize("rule", ["flow-grpo", "dance-grpo"])
@pytest.mark.parametrize("process", ["flow", "shifted flow"])
def test_flow_sde_keeps_the_marginals(process, rule):
    moments_of(flow_sde(Schedule.uniform(PROCESSES[process], 400), rule))


# One process of each kind, the solvers in turn, and all others as slow tests.
@pytest.mark.parametrize(
    ("name", "process"), with_all_others(in_turn(NOISY, list(PROCESSES), 1), NOISY)
)
def test_every_stochastic_solver_keeps_the_marginals_on_its_own_grid(name, process):
    forward = PROCESSES[process]
    # Twice the steps for Euler-Maruyama's, whose last one is as noisy as the others.
    schedule = default_schedule(name, forward, 400 if name == "flow-sde" else 200)
    if name == "flow-sde" and "flow" not in process:
        with pytest.raises(ValueError, match="needs a straight path"):
            make_solver(name, schedule)
        return
    moments_of(make_solver(name, schedule, gaussian(forward)))


def moments_of(table):
    """The samples have the data's mean and deviation, exactly propagated.

    The bound 0.02 is that of a first-order method of 200 steps: the samplers err by about 1 / steps
    of what a step adds, and the starts lack the signal's share at the first time.
    """
    start = table.process.prior_std(float(table.times[0]))
    mean, std = moments(table, gaussian(table.process), std=start)
    assert abs(mean - MEAN) < 0.02
    assert abs(std - STD) < 0.02


def levels_of(process):
    """Times of a few steps that end short of clean data; whole ones on a chain of noisings."""
    forward = PROCESSES[process]
    if process == "VE":
        return Schedule.karras(forward, 6, append_zero=False)
    times = torch.linspace(1, 0.1, 7, dtype=torch.float64) * forward.t_max
    return Schedule(forward, times.round() if forward.discrete else times)


def check_exact(table, eta):
    """With the best variance a Gaussian's chain of any steps has its moments, to rounding.

    x_0 given x_t is Gaussian there, and so is each transition; MATH.md 1.11.
    """
    process, times = table.process, table.times
    (alpha, sigma), (alpha_s, sigma_s) = (process.levels(float(times[k])) for k in (0, -1))
    first, last = math.hypot(alpha * STD, sigma), math.hypot(alpha_s * STD, sigma_s)
    mean, std = moments(table, gaussian(process), alpha * MEAN, first)
    # Levels of the discrete chains come from sums of a thousand logarithms.
    assert mean == pytest.approx(alpha_s * MEAN, rel=1e-9, abs=1e-9)
    assert std == pytest.approx(last, rel=1e-9), eta


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("process", PROCESSES)
def test_variances_of_each_pixel_are_exact_on_a_gaussian(process, eta):
    """SN-DDPM and NPR-DDPM, also where no signal is left, with what a perfect head would say."""
    schedule = levels_of(process)
    table = per_pixel_dpm(schedule, "npr", eta, clip=False, late_clip=None)
    alpha, sigma = (torch.from_numpy(level[:-1]) for level in schedule.levels())
    covariance = (sigma * STD) ** 2 / ((alpha * STD) ** 2 + sigma**2)
    noise, weight, cap = (
        torch.from_numpy(getattr(table, name).copy()) for name in ("noise", "covariance", "cap")
    )
    std = std_of(covariance, noise, weight, cap).numpy()
    check_exact(table.replace(noise=std, covariance=None, cap=None), eta)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("process", ["linear", "cosine", "zero-snr"])
def test_analytic_dpm_is_exact_on_a_gaussian(process, eta):
    forward, schedule = PROCESSES[process], levels_of(process)
    if process == "zero-snr":
        # Without signal Gamma is 1 for all data, and the bound 1 stands for Cov0.
        first = analytic_dpm(schedule, np.ones(1000), eta, clip=False, late_clip=None)
        alpha, sigma = forward.levels(float(schedule.times[1]))
        assert first.noise[0] == pytest.approx(math.hypot(alpha, eta * sigma), rel=1e-12)
        schedule = Schedule(forward, schedule.times[1:])
    whole = torch.arange(1, 1001, dtype=torch.float64)
    alpha, sigma = forward.alpha(whole).numpy(), forward.sigma(whole).numpy()
    # The mean square of the predicted noise, whose mean is 0.
    gamma = sigma**2 / ((alpha * STD) ** 2 + sigma**2)
    check_exact(analytic_dpm(schedule, gamma, eta, clip=False, late_clip=None), eta)


def test_analytic_dpm_is_of_chains_of_noisings():
    for process in ("flow", "VE", "continuous VP"):
        with pytest.raises(ValueError, match="one Gamma a noising of a DiscreteVP"):
            analytic_dpm(levels_of(process), np.ones(1000))


@functools.cache
def fine_samples(process, times):
    """A mixture's exact denoiser on a process, starts, and where a finer solver leads from them."""
    forward = PROCESSES[process]
    denoiser, _ = exact_mixture(forward, prediction="sample", dimension=2, std=0.4)
    start = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start *= forward.prior_std(times[0])
    between = [(a + b) / 2 for a, b in pairwise(times)]
    fine = flow_heun(Schedule(forward, sorted({*times, *between}, reverse=True)))
    return denoiser, start, fine.sample(denoiser, start)


# Four of the eight processes for each solver, and the other four for the next one.
@pytest.mark.parametrize(
    ("name", "process"),
    with_all_others(in_turn(ODE_SOLVERS, [*PROCESSES][::2] + [*PROCESSES][1::2], 4), ODE_SOLVERS),
)
def test_a_mixture_is_sampled_as_by_a_fine_solver(name, process):
    schedule = default_schedule(name, PROCESSES[process], 80)
    # The same ends for both, so that they differ by nothing but the steps.
    denoiser, start, goal = fine_samples(process, tuple(schedule.times.tolist()))
    away = make_solver(name, schedule, denoiser).sample(denoiser, start) - goal
    assert away.isfinite().all()
    assert float(away.square().sum(1).mean().sqrt()) < 0.1


def energy_distance(one, other):
    """The unbiased square of the energy distance of two sets of samples (N, D)."""
    far, count = torch.cdist(one, other).mean(), len(one)
    near = sum(torch.cdist(x, x).sum() for x in (one, other)) / (count * (count - 1))
    return float(2 * far - near)


@pytest.mark.parametrize(
    ("name", "process"), with_all_others(in_turn(NOISY, list(PROCESSES), 1), NOISY)
)
def test_a_mixture_is_sampled_with_noise(name, process):
    if name == "flow-sde" and "flow" not in process:
        return  # refused, see above
    forward, count = PROCESSES[process], 2000
    denoiser, target = exact_mixture(forward, prediction="sample", dimension=2, std=0.4)
    table = make_solver(name, default_schedule(name, forward, 80), denoiser)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    start *= forward.prior_std(float(table.times[0]))
    with torch.no_grad():
        samples = table.sample(denoiser, start, generator=generator)
    # A shift of all samples by some 0.1, or 8 / steps; sampling alone gives some 2 / count.
    real = target.sample_fresh(count, 1).double()
    assert energy_distance(samples, real) < 0.005


def test_flow_heun_is_the_trapezoidal_rule_for_the_velocity():
    process = PROCESSES["flow"]
    denoiser, _ = exact_mixture(process, prediction="sample", dimension=2)
    start = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = [1.0, 0.7, 0.45, 0.1, 0.0]

    def velocity(sample, level):
        return (sample - denoiser.denoised(sample, level)) / level

    state = start
    for level, following in pairwise(levels):
        slope = velocity(state, level)
        ahead = state + (following - level) * slope
        if following > 0:
            slope = (slope + velocity(ahead, following)) / 2
        state = state + (following - level) * slope
    ours = flow_heun(Schedule(process, levels)).sample(denoiser, start)
    torch.testing.assert_close(ours, state, rtol=0, atol=1e-12)


def test_flow_grpo_s_step_is_the_published_formula():
    process, level, a = RectifiedFlow(), [1.0, 0.8, 0.5, 0.2], 0.7
    table = flow_sde(Schedule(process, level), level=a)
    state, clean = torch.randn(2, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    for j, (u, following) in enumerate(pairwise(level)):
        s = a * math.sqrt(u / (1 - (u if u < 1 else level[1])))
        velocity, step = (state - clean) / u, following - u
        mean = state * (1 + s**2 / (2 * u) * step)
        mean = mean + velocity * (1 + s**2 * (1 - u) / (2 * u)) * step
        row = table.row(j)
        ours = row.scale * state + dict(row.weights)[j] * clean
        torch.testing.assert_close(ours, mean, rtol=1e-12, atol=1e-12)
        assert row.noise == pytest.approx(s * math.sqrt(-step), rel=1e-12)
    for j, (u, following) in enumerate(pairwise(level)):
        table = flow_sde(Schedule(process, level), "dance-grpo", 0.3)
        step, score = following - u, -(state - (1 - u) * clean) / u**2
        mean = state + step * (state - clean) / u - 0.3**2 / 2 * score * step
        row = table.row(j)
        ours = row.scale * state + dict(row.weights)[j] * clean
        torch.testing.assert_close(ours, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ipndm", "deis", "dpm-solver-3"])
def test_data_prediction_is_the_same_sampler_from_where_no_signal_is_left(name):
    # Beside a start just short of it, whose rows stay in noise prediction.
    process, times = PROCESSES["flow"], torch.linspace(1, 0.05, 10, dtype=torch.float64)
    denoiser = gaussian(process)
    table = make_solver(name, Schedule(process, times), denoiser)
    assert table.output == "sample"
    near = RectifiedFlow(t_min=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orders = {"orders": [1, 3, 3, 3]} if name == "dpm-solver-3" else {}
        grid = times[[0, 1, 3, 6, 9]] if orders else times
        ours = make_solver(name, Schedule(process, grid), denoiser, **orders)
        grid = torch.cat([torch.tensor([1 - 1e-7], dtype=torch.float64), grid[1:]])
        theirs = make_solver(name, Schedule(near, grid), gaussian(near), **orders)
    assert (ours.output, theirs.output) == ("sample", "epsilon")
    start = torch.tensor([[0.3], [-1.1]], dtype=torch.float64)
    # Noise prediction divides by alpha = 1e-7 there.
    torch.testing.assert_close(
        ours.sample(denoiser, start), theirs.sample(gaussian(near), start), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_and_heun_of_flow_matching_are_diffusers(shift):
    process = RectifiedFlow(shift, 1000.0)
    denoiser, _ = exact_mixture(process, prediction="sample", dimension=2)
    start = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scheduler, build in (
        (FlowMatchEulerDiscreteScheduler(shift=shift), euler),
        (FlowMatchHeunDiscreteScheduler(shift=shift), flow_heun),
    ):
        scheduler.set_timesteps(8)
        # Their levels are float32; both run on exactly these.
        levels = scheduler.sigmas.double()
        scheduler.sigmas = levels
        times = process.time_of_network(1000 * levels).unique().flip(0)
        state = start
        with mock.patch.object(torch, "float32", torch.float64):
            for i, t in enumerate(scheduler.timesteps):
                level = float(levels[i])
                at = float(process.time_of_network(torch.tensor(1000 * level, dtype=torch.float64)))
                velocity = (state - denoiser.denoised(state, at)) / level
                state = scheduler.step(velocity, t, state).prev_sample
        table = build(Schedule(process, times))
        assert table.nfe == len(scheduler.timesteps)
        ours = table.sample(denoiser, start)
        torch.testing.assert_close(ours, state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++-2m"])
def test_rescaled_betas_are_sampled_as_by_diffusers(name):
    process = PROCESSES["zero-snr"]
    denoiser, _ = exact_mixture(process, prediction="sample", dimension=2)
    start = torch.randn(50, 2, 1, 1, dtype=torch.float64, generator=torch.manual_seed(0))
    shared = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 2e-2,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    if name == "ddim":
        scheduler = DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=True)
        scheduler.alphas_cumprod = process.abar[1:]
        scheduler.final_alpha_cumprod = process.abar[0]
    else:
        scheduler = DPMSolverMultistepScheduler(
            **shared, lower_order_final=True, final_sigmas_type="zero"
        )
    scheduler.set_timesteps(8)
    schedule = Schedule.trailing(process, 8)
    assert (schedule.times[:-1] - 1).tolist() == scheduler.timesteps.tolist()

    def theirs(first):
        if name != "ddim":
            # They replace an alpha of 0 by 2^-12, and their formula has no limit.
            alpha, sigma = process.alpha(schedule.times), process.sigma(schedule.times)
            scheduler.set_timesteps(8)
            scheduler.sigmas = torch.cat([torch.tensor([first]).double(), (sigma / alpha)[1:]])
        state = start
        with mock.patch.object(torch, "float32", torch.float64):
            for j, t in enumerate(scheduler.timesteps):
                time = float(schedule.times[j])
                clean = denoiser.denoised(state[..., 0, 0], time)[..., None, None]
                alpha, sigma = process.levels(time)
                velocity = (alpha * state - clean) / sigma
                state = scheduler.step(velocity, t, state).prev_sample
        return state[..., 0, 0]

    ours = make_solver(name, schedule, denoiser).sample(denoiser, start[..., 0, 0])
    if name == "ddim":
        torch.testing.assert_close(ours, theirs(None), rtol=0, atol=1e-12)
    else:
        # Their second step is linear in the inverse of the first one's length in log-SNR.
        second = float(process.log_snr(schedule.times[1]))
        lengths = [second + math.log(first) for first in (1e15, 1e30)]
        near, far = theirs(1e15), theirs(1e30)
        limit = (lengths[1] * far - lengths[0] * near) / (lengths[1] - lengths[0])
        assert float((near - ours).abs().max()) > 1e-5
        torch.testing.assert_close(ours, limit, rtol=0, atol=1e-7)
