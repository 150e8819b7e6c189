"""The ODE solvers against diffusers, loops written from the papers, and known numbers.

The recipes, and the traps in diffusers that they step around, are those of MATH.md 4; the loops
follow MATH.md 1. Everything runs in float64 on an exact denoiser of a Gaussian mixture.
"""

import sys
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from conditioning import rounding
from covering import alternating, options_at_places
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_ipndm import IPNDMScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from numpy.polynomial import Polynomial
from scipy.integrate import quad
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.solvers import (
    ddim,
    deis,
    dpm_solver,
    dpm_solver_multistep,
    dpm_solver_pp,
    dpm_solver_sde,
    euler,
    euler_ancestral,
    heun,
    ipndm,
    lms,
    singlestep_orders,
    unipc,
)
from fewstep.envs import VE, DiscreteVP, Schedule

# diffusers calls its noise prediction deprecated, and NumPy calls diffusers deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.numeric,
]
VP = DiscreteVP.linear(1000)
EDM = VE(0.002, 80.0)
PROCESSES = pytest.mark.parametrize("process", [VP, EDM], ids=["VP", "VE"])
# Step counts of every remainder by 2 and 3; all end at t_min.
GRID_STEPS = [("uniform", 7), ("log_snr", 8), ("karras", 9), ("quadratic", 12), ("irregular", 6)]
GRIDS = pytest.mark.parametrize(("name", "steps"), GRID_STEPS)
# Some three or four for each set of options: both processes, and in turn all grids.
PLACES = [(process, *grid) for process, grid in alternating([VP, EDM], GRID_STEPS)]
TYPES = pytest.mark.parametrize("solver_type", ["dpmsolver", "taylor"])
IN_DIFFUSERS = {"dpmsolver": "midpoint", "taylor": "heun"}
COMPOSITION = {  # MATH.md 1.4
    2: "1 | 2 | 2,1 | 2,2 | 2,2,1 | 2,2,2 | 2,2,2,1 | 2,2,2,2 | 2,2,2,2,1 | 2,2,2,2,2 "
    "| 2,2,2,2,2,1 | 2,2,2,2,2,2",
    3: "1 | 2 | 2,1 | 3,1 | 3,2 | 3,2,1 | 3,3,1 | 3,3,2 | 3,3,2,1 | 3,3,3,1 | 3,3,3,2 | 3,3,3,2,1",
}


def composition(budget, order, to_zero=False):
    """The official block orders; into time 0 only a first-order block can step."""
    orders = [int(k) for k in COMPOSITION[order].split("|")[budget - 1].split(",")]
    return [*composition(budget - 1, order), 1] if to_zero and orders[-1] > 1 else orders


def levels(schedule):
    alpha, sigma = schedule.levels()
    with np.errstate(divide="ignore"):
        return alpha, sigma, sigma / alpha, np.log(alpha / sigma)


def check(table, denoiser, noise, expected, tolerance=1e-12, generator=None):
    """The solver's sample is the expected one, to `tolerance` of the largest state."""
    with torch.no_grad():
        ours = table.sample(denoiser, noise, generator=generator)
    assert ours.isfinite().all()
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * scale)


# ---------------------------------------------------------------------------------- diffusers


@torch.no_grad()
def run_vp_scheduler(scheduler, schedule, denoiser, noise, *, orders=None, switch=False, **options):
    """Run a DPM or DEIS scheduler on this schedule; its state is x scaled to alpha^2 + sigma^2 = 1.

    `orders` are the blocks of a singlestep solver. `switch` corrects its third order: the second
    stage of a block of three needs the type "heun", or diffusers does not run DPM-Solver-3.
    `options` go to its step.
    """
    process, times = schedule.process, schedule.times
    alpha, rho = process.alpha(times), process.sigma(times) / process.alpha(times)
    to_theirs = 1 / (alpha * (1 + rho**2).sqrt())
    scheduler.set_timesteps(schedule.steps)
    scheduler.set_begin_index(0)
    scheduler.sigmas = rho
    if orders is not None:
        scheduler.order_list = [k for block in orders for k in range(1, block + 1)]
        block_of = [block for block in orders for _ in range(block)]
    state = noise[..., None, None] * to_theirs[0]
    for i in range(schedule.steps):
        if switch:
            inside = block_of[i] == 3 and scheduler.order_list[i] == 2
            scheduler.register_to_config(solver_type="heun" if inside else "midpoint")
        epsilon = denoiser.epsilon(state[..., 0, 0] / to_theirs[i], float(times[i]))
        # The multistep scheduler casts its state to float32 on purpose; undo that.
        with mock.patch.object(torch, "float32", torch.float64):
            state = scheduler.step(epsilon[..., None, None], None, state, **options).prev_sample
    return state[..., 0, 0] / to_theirs[-1]


@options_at_places(
    "data, solver_type, order, process, name, steps",
    [(False, True), ("dpmsolver", "taylor"), (2, 3)],
    PLACES,
    each=5,
)
def test_singlestep_is_diffusers(
    data, process, name, steps, solver_type, order, grid, mixture, prior
):
    schedule, denoiser, noise = grid(name, process, steps), mixture(process), prior(process)
    scheduler = DPMSolverSinglestepScheduler(
        solver_order=order,
        algorithm_type="dpmsolver++" if data else "dpmsolver",
        solver_type=IN_DIFFUSERS[solver_type],
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    expected = run_vp_scheduler(
        scheduler,
        schedule,
        denoiser,
        noise,
        orders=composition(steps, order),
        switch=order == 3 and solver_type == "dpmsolver",
    )
    options = {"method": "singlestep"} if data else {}
    build = dpm_solver_pp if data else dpm_solver
    table = build(schedule, order, solver_type=solver_type, **options)
    np.testing.assert_array_equal(table.times, schedule.times)
    check(table, denoiser, noise, expected)


@pytest.mark.parametrize(("order", "steps"), [(2, 6), (2, 7), (3, 6), (3, 7), (3, 8)])
@PROCESSES
def test_singlestep_data_prediction_into_time_0_is_diffusers(
    process, order, steps, grid, mixture, prior
):
    schedule, denoiser = grid("irregular-to-0", process, steps), mixture(process)
    scheduler = DPMSolverSinglestepScheduler(
        solver_order=order,
        algorithm_type="dpmsolver++",
        solver_type="heun",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    orders = composition(steps, order, to_zero=True)
    expected = run_vp_scheduler(scheduler, schedule, denoiser, prior(process), orders=orders)
    table = dpm_solver_pp(schedule, order, method="singlestep", solver_type="taylor")
    check(table, denoiser, prior(process), expected)


@options_at_places(
    "data, solver_type, lower, order, process, name, steps",
    [(False, True), ("dpmsolver", "taylor"), (False, True), (2, 3)],
    PLACES,
    each=3,
)
def test_multistep_is_diffusers(
    data, process, name, steps, solver_type, lower, order, grid, mixture, prior
):
    schedule, denoiser, noise = grid(name, process, steps), mixture(process), prior(process)
    scheduler = DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type="dpmsolver++" if data else "dpmsolver",
        solver_type=IN_DIFFUSERS[solver_type],
        final_sigmas_type="sigma_min",
        lower_order_final=lower,
    )
    expected = run_vp_scheduler(scheduler, schedule, denoiser, noise)
    build = dpm_solver_pp if data else dpm_solver_multistep
    table = build(schedule, order, solver_type=solver_type, compat=True, lower_order_final=lower)
    np.testing.assert_array_equal(table.times, schedule.times)
    check(table, denoiser, noise, expected, 1e-11)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("lower", [False, True], ids=["full", "lowered"])
@pytest.mark.parametrize("name", ["uniform-to-0", "karras-to-0", "irregular-to-0"])
@PROCESSES
def test_multistep_data_prediction_into_time_0_is_diffusers(
    process, name, lower, order, grid, mixture, prior
):
    schedule, denoiser = grid(name, process, 7), mixture(process)
    scheduler = DPMSolverMultistepScheduler(
        solver_order=order, final_sigmas_type="zero", lower_order_final=lower
    )
    expected = run_vp_scheduler(scheduler, schedule, denoiser, prior(process))
    table = dpm_solver_pp(schedule, order, compat=True, lower_order_final=lower)
    check(table, denoiser, prior(process), expected)


@pytest.mark.parametrize(("order", "least"), [(2, 10), (3, 15)])
@pytest.mark.parametrize("missing", [1, 0])
def test_multistep_lowers_its_last_steps_by_default_on_few_steps(order, least, missing):
    schedule = Schedule.log_snr(VP, least - missing)
    for build in (dpm_solver_pp, dpm_solver_multistep):
        default = build(schedule, order).weights
        lowered, full = (build(schedule, order, lower_order_final=x).weights for x in (True, False))
        np.testing.assert_array_equal(default, lowered if missing else full)
        assert not np.array_equal(lowered, full)


@pytest.mark.parametrize("order", [2, 3])
@GRIDS
@PROCESSES
def test_exact_noise_multistep_is_the_deis_of_diffusers(
    process, name, steps, order, grid, mixture, prior
):
    """What diffusers calls DEIS is Adams-Bashforth in log rho: MATH.md 1.7 with c = 2."""
    schedule, denoiser, noise = grid(name, process, steps), mixture(process), prior(process)
    scheduler = DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    expected = run_vp_scheduler(scheduler, schedule, denoiser, noise)
    table = dpm_solver_multistep(schedule, order, solver_type="taylor", lower_order_final=False)
    # Both have coefficients that are differences of larger terms, which costs a digit.
    check(table, denoiser, noise, expected, 10 * rounding(table, denoiser, noise))


@torch.no_grad()
def run_edm_scheduler(scheduler, process, rho, asked, denoiser, noise, **options):
    """Run a scheduler whose state is x / alpha: step i asks the network at rho `asked[i]`.

    `options` go to its step.
    """
    scheduler.set_timesteps(len(asked))
    scheduler.timesteps = torch.arange(len(asked), dtype=torch.float64)
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True
    scheduler.sigmas = rho
    times = process.time_of_log_snr(-asked.log()).tolist()
    state = noise / process.alpha(process.t_max)
    for i, t in enumerate(times):
        epsilon = denoiser.epsilon(state * process.alpha(t), t)
        with mock.patch.object(torch, "float32", torch.float64):
            state = scheduler.step(epsilon, scheduler.timesteps[i], state, **options).prev_sample
    return state


@pytest.mark.parametrize("output", ["sample", "epsilon"])
@pytest.mark.parametrize("name", ["uniform-to-0", "karras-to-0", "irregular-to-0"])
@PROCESSES
def test_heun_and_euler_are_diffusers(process, name, output, grid, mixture, prior):
    schedule, denoiser, noise = grid(name, process, 6), mixture(process), prior(process)
    rho = torch.from_numpy(levels(schedule)[2])
    twice = torch.cat([rho[:1], rho[1:-1].repeat_interleave(2), rho[-1:]])
    expected = run_edm_scheduler(
        HeunDiscreteScheduler(), process, twice, twice[:-1], denoiser, noise
    )
    table = heun(schedule, output=output)
    assert table.nfe == 11 and table.output == output
    check(table, denoiser, noise, expected)

    expected = run_edm_scheduler(EulerDiscreteScheduler(), process, rho, rho[:-1], denoiser, noise)
    check(euler(schedule), denoiser, noise, expected)
    check(ddim(schedule, output=output), denoiser, noise, expected)


@options_at_places(
    "data, lower, solver_type, order, process, name, steps",
    [(False, True), (False, True), ("bh1", "bh2"), (1, 2, 3)],
    PLACES,
    each=3,
)
def test_unipc_is_diffusers(
    data, process, name, steps, lower, solver_type, order, grid, mixture, prior
):
    schedule, denoiser, noise = grid(name, process, steps), mixture(process), prior(process)
    scheduler = UniPCMultistepScheduler(
        solver_order=order,
        solver_type=solver_type,
        predict_x0=data,
        final_sigmas_type="sigma_min",
        lower_order_final=lower,
    )
    expected = run_vp_scheduler(scheduler, schedule, denoiser, noise)
    output = "sample" if data else "epsilon"
    table = unipc(schedule, order, solver_type, lower_order_final=lower, output=output)
    np.testing.assert_array_equal(table.times, schedule.times)
    assert table.linear
    check(table, denoiser, noise, expected, max(1e-12, rounding(table, denoiser, noise)))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["uniform-to-0", "karras-to-0", "irregular-to-0"])
@PROCESSES
def test_unipc_into_time_0_is_diffusers(process, name, order, grid, mixture, prior):
    """Their "bh1" divides infinity by infinity there, so that it is told by the steps before."""
    schedule, denoiser = grid(name, process, 7), mixture(process)
    scheduler = UniPCMultistepScheduler(solver_order=order, solver_type="bh2")
    expected = run_vp_scheduler(scheduler, schedule, denoiser, prior(process))
    check(unipc(schedule, order), denoiser, prior(process), expected)
    for solver_type in ("bh1", "bh2"):
        table, before = (
            unipc(times, order, solver_type, lower_order_final=False)
            for times in (schedule, Schedule(process, schedule.times[:-1]))
        )
        np.testing.assert_array_equal(table.weights[:-1, :-1], before.weights)
        assert table.row(6).weights == ((6, 1.0),)
        assert table.scale[6] == 0


@options_at_places(
    "lower, order, solver_type, process, name, steps",
    [(False, True), (1, 2), ("dpmsolver", "taylor")],
    PLACES,
    each=3,
)
def test_sde_multistep_is_diffusers(
    process, name, steps, lower, order, solver_type, grid, mixture, prior, generator
):
    schedule, denoiser, noise = grid(name, process, steps), mixture(process), prior(process)
    scheduler = DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type="sde-dpmsolver++",
        solver_type=IN_DIFFUSERS[solver_type],
        final_sigmas_type="sigma_min",
        lower_order_final=lower,
    )
    expected = run_vp_scheduler(scheduler, schedule, denoiser, noise, generator=generator(3))
    table = dpm_solver_sde(schedule, order, solver_type=solver_type, lower_order_final=lower)
    check(table, denoiser, noise, expected, 1e-11, generator(3))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["uniform-to-0", "karras-to-0", "irregular-to-0"])
@PROCESSES
def test_sde_multistep_into_time_0_is_diffusers(
    process, name, order, grid, mixture, prior, generator
):
    schedule, denoiser = grid(name, process, 7), mixture(process)
    scheduler = DPMSolverMultistepScheduler(
        solver_order=order, algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
    )
    expected = run_vp_scheduler(
        scheduler, schedule, denoiser, prior(process), generator=generator(3)
    )
    table = dpm_solver_sde(schedule, order, lower_order_final=True)
    assert table.noise[-1] == 0 and (table.noise[:-1] > 0).all()
    check(table, denoiser, prior(process), expected, generator=generator(3))


class OneWienerProcess:
    """The noise that k-diffusion's DPM++ SDE asks for, (rho, rho') -> (7, 2), of unit variance.

    On the way from rho the noise so far shrinks by (rho'' / rho')^2 from rho' to rho'' and more is
    added; k-diffusion's own is Brownian in rho instead, with the same variances.
    """

    def __init__(self, generator):
        self.generator, self.start, self.level, self.so_far = generator, None, None, None

    def __call__(self, start, level):
        start, level = float(start), float(level)
        if start != self.start:
            self.start, self.level, self.so_far = start, start, 0.0
        fresh = torch.empty(7, 2, dtype=torch.float64).normal_(generator=self.generator)
        share = level / self.level
        self.so_far = share**2 * self.so_far + level * (1 - share**2) ** 0.5 * fresh
        self.level = level
        return self.so_far / (level * (1 - (level / start) ** 2) ** 0.5)


@pytest.mark.parametrize("name", ["log_snr", "karras", "irregular", "karras-to-0"])
@PROCESSES
def test_singlestep_sde_is_diffusers(process, name, grid, mixture, prior, generator):
    # They import a library for their own noise.
    with mock.patch.dict(sys.modules, {"torchsde": mock.Mock()}):
        from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
    schedule, denoiser, noise = grid(name, process, 6), mixture(process), prior(process)
    to_zero = name.endswith("0")
    rho = torch.from_numpy(levels(schedule)[2])
    blocks = rho[:-1] if to_zero else rho
    middle = (blocks[:-1] * blocks[1:]).sqrt()
    asked = torch.stack([blocks[:-1], middle], 1).flatten()
    sigmas = torch.cat([blocks[:1], blocks[1:].repeat_interleave(2)])
    if to_zero:
        asked, sigmas = torch.cat([asked, rho[-2:-1]]), torch.cat([sigmas, rho[-1:]])
    scheduler = DPMSolverSDEScheduler()
    scheduler.noise_sampler = OneWienerProcess(generator(3))
    with mock.patch.object(scheduler, "set_timesteps"):
        expected = run_edm_scheduler(scheduler, process, sigmas, asked, denoiser, noise)
    orders = [2] * (len(blocks) - 1) + [1] * to_zero
    table = dpm_solver_sde(schedule, 2, method="singlestep", orders=orders)
    assert table.nfe == len(asked) and table.times[-1] == schedule.times[-1]
    expected *= process.alpha(schedule.times[-1])
    check(table, denoiser, noise, expected, 1e-11, generator(3))


@pytest.mark.parametrize("name", ["uniform-to-0", "karras-to-0", "irregular"])
@PROCESSES
def test_euler_ancestral_is_diffusers(process, name, grid, mixture, prior, generator):
    schedule, denoiser, noise = grid(name, process, 7), mixture(process), prior(process)
    rho = torch.from_numpy(levels(schedule)[2])
    scheduler = EulerAncestralDiscreteScheduler()
    expected = run_edm_scheduler(
        scheduler, process, rho, rho[:-1], denoiser, noise, generator=generator(3)
    )
    alpha = float(process.alpha(schedule.times[-1]))
    table = euler_ancestral(schedule)
    check(table, denoiser, noise, alpha * expected, generator=generator(3))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["uniform-to-0", "log_snr", "karras-to-0", "irregular"])
@PROCESSES
def test_lms_is_diffusers(process, name, order, grid, mixture, prior):
    schedule, denoiser, noise = grid(name, process, 7), mixture(process), prior(process)
    rho = torch.from_numpy(levels(schedule)[2])
    expected = run_edm_scheduler(
        LMSDiscreteScheduler(), process, rho, rho[:-1], denoiser, noise, order=order
    )
    expected *= process.alpha(schedule.times[-1])
    table = lms(schedule, order)
    check(table, denoiser, noise, expected, max(1e-12, rounding(table, denoiser, noise)))


@pytest.mark.parametrize("name", ["log_snr", "karras", "irregular"])
@PROCESSES
def test_dpm_solver_2_with_its_own_middle_is_kdpm2(process, name, grid, mixture, prior):
    schedule, denoiser, noise = grid(name, process, 5), mixture(process), prior(process)
    rho = torch.from_numpy(levels(schedule)[2])
    middle = (rho[:-1] * rho[1:]).sqrt()
    scheduler = KDPM2DiscreteScheduler()
    # Steps alternate: predict at the middle from sigmas[i], then land on sigmas[i + 1].
    asked = torch.stack([rho[:-1], middle], 1).flatten()
    sigmas = torch.cat([rho[:1], rho[1:].repeat_interleave(2)])
    scheduler.sigmas_interpol = torch.cat([rho[:1], middle.repeat_interleave(2)])
    with mock.patch.object(scheduler, "set_timesteps"):
        expected = run_edm_scheduler(scheduler, process, sigmas, asked, denoiser, noise)
    table = dpm_solver(schedule, 2, orders=[2] * 5)
    np.testing.assert_allclose(table.times[2::2], schedule.times[1:], rtol=1e-15)
    check(table, denoiser, noise, expected * process.alpha(process.t_min))


@GRIDS
def test_ipndm_is_diffusers(name, steps, grid, mixture, prior):
    schedule, denoiser, noise = grid(name, VP, steps), mixture(VP), prior(VP)
    scheduler = IPNDMScheduler(num_train_timesteps=steps)
    scheduler.alphas, scheduler.betas = map(torch.from_numpy, schedule.levels())
    state = noise
    with torch.no_grad():
        for i, t in enumerate(schedule.times[:-1].tolist()):
            epsilon = denoiser.epsilon(state, t)
            # Their network predicts alpha eps - sigma x_0; its eps is then our epsilon.
            output = (epsilon - scheduler.betas[i] * state) / scheduler.alphas[i]
            state = scheduler.step(output, scheduler.timesteps[i], state).prev_sample
    check(ipndm(schedule), denoiser, noise, state)


# --------------------------------------------------------------------- loops from the formulas


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["uniform-to-0", "log_snr", "irregular"])
@PROCESSES
def test_ipndm_of_every_order(process, name, order, grid, mixture, prior):
    """MATH.md 1.3 in EDM form."""
    schedule, denoiser, noise = grid(name, process, 7), mixture(process), prior(process)
    alpha, _, rho, _ = levels(schedule)
    rules = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    rules.append([55 / 24, -59 / 24, 37 / 24, -9 / 24])
    state, slopes = noise / alpha[0], []
    with torch.no_grad():
        for i in range(7):
            slopes.insert(0, denoiser.epsilon(state * alpha[i], float(schedule.times[i])))
            rule = rules[min(i + 1, order) - 1]
            state = state + (rho[i + 1] - rho[i]) * sum(
                c * d for c, d in zip(rule, slopes, strict=False)
            )
    check(ipndm(schedule, order), denoiser, noise, state * alpha[-1])


def E(k, h):
    """E_k of MATH.md 1.4; its functions P_k are -E_1, -E_2 and E_3 of -h."""
    if k == 1:
        return np.expm1(h)
    return E(k - 1, h) / h - 1 / (k - 1)


def exponential_step(data, state, derivatives, here, there):
    """One update from level `here` to `there`, (alpha, sigma, log-SNR) each (MATH.md 1.4, 1.6)."""
    (alpha, sigma, start), (next_alpha, next_sigma, end) = here, there
    if next_sigma == 0 and not data:
        assert len(derivatives) == 1  # DDIM, which returns the predicted sample
        return (state - sigma * derivatives[0]) / alpha
    h = end - start
    if data:  # The same with signal and noise exchanged and the clock reversed.
        alpha, next_alpha, next_sigma, h = sigma, next_sigma, next_alpha, -h
    terms = sum(E(k, h) * g for k, g in enumerate(derivatives, 1))
    return next_alpha / alpha * state - next_sigma * terms


def ask(denoiser, data, state, t):
    return (denoiser.denoised if data else denoiser.epsilon)(state, float(t))


@torch.no_grad()
def run_blocks(denoiser, data, solver_type, blocks, state):
    """DPM-Solver and DPM-Solver++ singlestep; a block is its start, inner stages and end."""
    process = denoiser.process
    for times in blocks:
        functions = (process.alpha, process.sigma, process.log_snr)
        nodes = [tuple(float(f(t)) for f in functions) for t in times]
        here, there = nodes[0], nodes[-1]
        h = there[2] - here[2]
        first = ask(denoiser, data, state, times[0])
        derivatives = [first]
        if len(times) > 2:
            r1 = (nodes[1][2] - here[2]) / h
            inner = exponential_step(data, state, [first], here, nodes[1])
            d1 = (ask(denoiser, data, inner, times[1]) - first) / r1
            # In order 2 "dpmsolver" replaces E2 by E1 / 2.
            signed = -h if data else h
            factor = 1 if solver_type == "taylor" else E(1, signed) / 2 / E(2, signed)
            derivatives = [first, factor * d1]
        if len(times) > 3:
            r2 = (nodes[2][2] - here[2]) / h
            inner = exponential_step(data, state, [first, r2 * d1], here, nodes[2])
            d2 = (ask(denoiser, data, inner, times[2]) - first) / r2
            derivatives = [first, d2]
            if solver_type == "taylor":
                derivatives = [first, (r2 * d1 - r1 * d2) / (r2 - r1), 2 * (d2 - d1) / (r2 - r1)]
        state = exponential_step(data, state, derivatives, here, there)
    return state


@TYPES
@pytest.mark.parametrize("orders", [[3, 2, 1, 3, 2, 3], [2, 3, 2, 1]], ids=str)
@pytest.mark.parametrize("name", ["uniform", "log_snr", "irregular", "karras-to-0"])
@PROCESSES
@pytest.mark.parametrize("data", [False, True], ids=["noise", "data"])
def test_blocks_with_their_own_inner_stages(
    data, process, name, orders, solver_type, grid, mixture, prior
):
    """One block a step of the schedule, with r = 1/2, or 1/3 and 2/3."""
    if name.endswith("0"):
        orders = [*orders, 1]
    schedule, denoiser = grid(name, process, len(orders)), mixture(process)
    blocks = []
    for (t, s), order in zip(pairwise(schedule.times.tolist()), orders, strict=True):
        inner = []
        if order > 1:
            fractions = torch.arange(1, order, dtype=torch.float64) / order
            inner = process.time_of_log_snr(
                torch.lerp(process.log_snr(t), process.log_snr(s), fractions)
            ).tolist()
        blocks.append([t, *inner, s])
    expected = run_blocks(denoiser, data, solver_type, blocks, prior(process))
    options = {"method": "singlestep"} if data else {}
    build = dpm_solver_pp if data else dpm_solver
    table = build(schedule, 3, solver_type=solver_type, orders=orders, **options)
    asked = [t for block in blocks for t in block[:-1]]
    np.testing.assert_allclose(table.times[:-1], asked, rtol=1e-11)
    check(table, denoiser, prior(process), expected)


@TYPES
@pytest.mark.parametrize(("order", "budget"), [(2, 6), (2, 7), (3, 6), (3, 7), (3, 8)])
@PROCESSES
@pytest.mark.parametrize("data", [False, True], ids=["noise", "data"])
def test_budget_that_ends_in_time_0(
    data, process, order, budget, solver_type, grid, mixture, prior
):
    schedule, denoiser = grid("irregular-to-0", process, budget), mixture(process)
    times, blocks = schedule.times.tolist(), []
    for k in composition(budget, order, to_zero=True):
        blocks.append(times[: k + 1])
        times = times[k:]
    expected = run_blocks(denoiser, data, solver_type, blocks, prior(process))
    options = {"method": "singlestep"} if data else {}
    build = dpm_solver_pp if data else dpm_solver
    table = build(schedule, order, solver_type=solver_type, **options)
    np.testing.assert_array_equal(table.times, schedule.times)
    check(table, denoiser, prior(process), expected)


@TYPES
@GRIDS
@PROCESSES
@pytest.mark.parametrize("data", [False, True], ids=["noise", "data"])
@torch.no_grad()
def test_exact_third_order_multistep(data, process, name, steps, solver_type, grid, mixture, prior):
    """MATH.md 1.7 with c = 2, after a first- and a second-order step."""
    schedule, denoiser, noise = grid(name, process, steps), mixture(process), prior(process)
    alpha, sigma, _, log_snr = levels(schedule)
    h, state, outputs = np.diff(log_snr), noise, []
    for i in range(steps):
        outputs.append(ask(denoiser, data, state, schedule.times[i]))
        derivatives = outputs[i:]
        if i > 0:
            r0 = h[i - 1] / h[i]
            derivatives = [outputs[i], (outputs[i] - outputs[i - 1]) / r0]
        if i == 1 and solver_type == "dpmsolver":
            signed = -h[i] if data else h[i]
            derivatives[1] = derivatives[1] * E(1, signed) / 2 / E(2, signed)
        if i > 1:
            r1, d0 = h[i - 2] / h[i], derivatives[1]
            d1 = (outputs[i - 1] - outputs[i - 2]) / r1
            second = (d0 - d1) / (r0 + r1)
            derivatives = [outputs[i], d0 + r0 * second, 2 * second]
        here, there = ((alpha[k], sigma[k], log_snr[k]) for k in (i, i + 1))
        state = exponential_step(data, state, derivatives, here, there)
    build = dpm_solver_pp if data else dpm_solver_multistep
    table = build(schedule, 3, solver_type=solver_type, lower_order_final=False)
    check(table, denoiser, noise, state, 1e-11)


@pytest.mark.parametrize("output", ["sample", "epsilon"])
@pytest.mark.parametrize("name", ["karras", "irregular", "karras-to-0", "irregular-to-0"])
@PROCESSES
def test_heun_with_churn(process, name, output, grid, mixture, prior, generator):
    """MATH.md 1.9: the first level is not churned, nor levels outside [s_min, s_max]."""
    churn = {"s_churn": 2.5, "s_min": 0.05, "s_max": 20.0, "s_noise": 1.007}
    schedule, denoiser, noise = grid(name, process, 8), mixture(process), prior(process)
    rho = levels(schedule)[2]
    count = int((rho[:-1] > 0).sum())
    gamma = min(churn["s_churn"] / count, np.sqrt(2) - 1)
    state, rng, churned = noise / process.alpha(process.t_max), generator(5), 0

    def slope(state, rho):
        t = float(process.time_of_log_snr(-np.log(rho)))
        return denoiser.epsilon(state * process.alpha(t), t)

    with torch.no_grad():
        for i, (here, there) in enumerate(pairwise(rho.tolist())):
            hat = here
            if i > 0 and churn["s_min"] <= here <= churn["s_max"]:
                hat, churned = here * (1 + gamma), churned + 1
                fresh = torch.empty_like(state).normal_(generator=rng)
                state = state + (hat**2 - here**2) ** 0.5 * churn["s_noise"] * fresh
            first = slope(state, hat)
            ahead = state + (there - hat) * first
            if there > 0:
                ahead = state + (there - hat) * (first + slope(ahead, there)) / 2
            state = ahead
    assert 0 < churned < count - 1
    table = heun(schedule, output=output, **churn)
    assert (table.noise > 0).sum() == churned
    check(table, denoiser, noise, state * process.alpha(schedule.times[-1]), generator=generator(5))
    # Without a level inside the window churning is off.
    table = heun(schedule, output=output, s_churn=2.5, s_min=1e3)
    np.testing.assert_array_equal(table.weights, heun(schedule, output=output).weights)
    assert not table.noise.any()


def lagrange(nodes, j):
    """The basis polynomial that is 1 at nodes[j] and 0 at the others."""
    basis = Polynomial([1.0])
    for node in np.delete(nodes, j):
        basis = basis * Polynomial([-node, 1.0]) / (nodes[j] - node)
    return basis


def in_pieces(function, low, high, kinks):
    """The integral over [low, high] of a function that is smooth between its kinks."""
    inside = kinks[(kinks > low) & (kinks < high)]
    edges = [low, *inside, high]
    return sum(quad(function, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in pairwise(edges))


def deis_weight_over_time(process, nodes, end, j, kinks, slope):
    """The first integral of MATH.md 1.8, over time; `slope` is -d log abar / dt."""
    basis, target = lagrange(nodes, j), float(process.alpha(end))

    def integrand(t):
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        return target / alpha * 0.5 * slope(t) / sigma * basis(t)

    return -in_pieces(integrand, end, nodes[0], kinks)


def deis_weight_over_rho(process, nodes, end, j, kinks):
    """The second integral of MATH.md 1.8, over rho."""

    def rho(t):
        return float(process.sigma(t) / process.alpha(t))

    basis, target = lagrange(nodes, j), float(process.alpha(end))
    kinks = np.sort([rho(t) for t in kinks])
    return -target * in_pieces(
        lambda r: basis(float(process.time_of_log_snr(-np.log(r)))), rho(end), rho(nodes[0]), kinks
    )


def slope_of(process):
    if isinstance(process, VE):
        return None
    if isinstance(process, DiscreteVP):
        return lambda t: float(-torch.log1p(-process.betas[int(np.ceil(t)) - 1]))
    return lambda t: 0.1 + 19.9 * t


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["smooth", "discrete"])
def test_deis_is_the_integral_over_time_and_over_rho(kind, order, smooth_vp):
    if kind == "smooth":
        process, times, kinks = smooth_vp, [1.0, 0.81, 0.5, 0.32, 0.1, 0.004], np.array([])
    else:
        process, times = DiscreteVP.linear(40), [40.0, 29.5, 22.0, 9.25, 3.0, 1.0]
        kinks = np.arange(1.0, 40.0)
    table = deis(Schedule(process, times), order)
    for i, end in enumerate(times[1:]):
        nodes = times[i::-1][: order + 1]
        for j in range(len(nodes)):
            ours = table.weights[i, i - j]
            over_rho = deis_weight_over_rho(process, nodes, end, j, kinks)
            over_time = deis_weight_over_time(process, nodes, end, j, kinks, slope_of(process))
            assert over_time == pytest.approx(over_rho, rel=1e-9, abs=1e-11)
            assert ours == pytest.approx(over_rho, rel=1e-10, abs=1e-11)
    assert np.count_nonzero(table.weights) == sum(min(i, order) + 1 for i in range(5))


def test_deis_on_a_thousand_betas_steps_into_time_0():
    """The integrand is smooth in sqrt(t) near 0, and its kinks are the integers."""
    times = [1000.0, 700.0, 333.3, 120.0, 15.0, 0.0]
    table, kinks = deis(Schedule(VP, times), 3), np.arange(1.0, 1000.0)
    points, weights = np.polynomial.legendre.leggauss(12)
    for i, end in enumerate(times[1:]):
        nodes = times[i::-1][:4]
        edges = np.sqrt([end, *kinks[(kinks > end) & (kinks < nodes[0])], nodes[0]])
        half = np.diff(edges)[:, None] / 2
        root = edges[:-1, None] + half * (1 + points)
        t = torch.from_numpy(root**2)
        slope = -np.log1p(-VP.betas.numpy()[np.ceil(root**2).astype(int) - 1])
        weight = slope / 2 / (VP.alpha(t) * VP.sigma(t)).numpy() * 2 * root * half * weights
        for j in range(len(nodes)):
            expected = -float(VP.alpha(end)) * (weight * lagrange(nodes, j)(root**2)).sum()
            assert table.weights[i, i - j] == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["uniform-to-0", "karras", "irregular"])
@PROCESSES
def test_rho_deis_is_the_polynomial_integral(process, name, order, grid):
    schedule = grid(name, process, 6)
    alpha, _, rho, _ = levels(schedule)
    table = deis(schedule, order, basis="rho")
    for i in range(6):
        # In units of rho_i, or the powers overflow their digits.
        nodes = rho[i::-1][: order + 1] / rho[i] - 1
        end = rho[i + 1] / rho[i] - 1
        exact = [lagrange(nodes, j).integ()(end) for j in range(len(nodes))]
        ours = table.weights[i, i - len(nodes) + 1 : i + 1][::-1]
        scale = alpha[i + 1] * rho[i]
        np.testing.assert_allclose(ours, scale * np.array(exact), rtol=1e-9, atol=1e-12 * scale)
        if order in (1, 2) and i >= order:  # the closed forms of MATH.md 1.5
            h, h1, h2 = rho[i + 1] - rho[i], rho[i] - rho[i - 1], rho[i - 1] - rho[i - 2]
            half, third = h / (2 * h1), 0.0
            if order == 2:
                third = 0.5 * (1 - h / (3 * (h + h1))) * h * (h + h1) / (h1 * (h1 + h2))
            closed = [1 + half + third, -half - (1 + h1 / h2) * third, h1 / h2 * third]
            closed = alpha[i + 1] * h * np.array(closed[: order + 1])
            np.testing.assert_allclose(ours, closed, rtol=1e-10)


# -------------------------------------------------------------------------- numbers of MATH.md


def test_composition_of_a_budget():
    for order, table in COMPOSITION.items():
        for budget in range(1, len(table.split("|")) + 1):
            orders = singlestep_orders(budget, order)
            assert orders == composition(budget, order)
            theirs = DPMSolverSinglestepScheduler(
                solver_order=order, final_sigmas_type="sigma_min", lower_order_final=True
            ).get_order_list(budget)
            if order == 2 and budget % 2 == 0:
                theirs[-1] = 2  # they split the last block of an even budget
            assert [k for block in orders for k in range(1, block + 1)] == theirs
    assert singlestep_orders(5, 1) == [1] * 5


@pytest.mark.parametrize(
    ("build", "value"),
    [
        (lambda s: ddim(s), 0.347735411852),
        (lambda s: euler(s), 0.347735411852),
        (lambda s: dpm_solver(s, 1), 0.347735411852),
        (lambda s: dpm_solver(s, 2, orders=[2] * 3), 0.619593271531),
        (lambda s: dpm_solver(s, 2, "taylor", orders=[2] * 3), 0.540695910314),
        (lambda s: dpm_solver(s, 3, orders=[3] * 3), 0.520342250631),
        (lambda s: dpm_solver(s, 3, "taylor", orders=[3] * 3), 0.517149671161),
        (lambda s: dpm_solver_pp(s, 2, "singlestep", orders=[2] * 3), 0.457513761184),
        (lambda s: dpm_solver_pp(s, 2, "singlestep", "taylor", orders=[2] * 3), 0.488839985694),
        (lambda s: dpm_solver_pp(s, 3, "singlestep", orders=[3] * 3), 0.513699793016),
        (lambda s: dpm_solver_pp(s, 3, "singlestep", "taylor", orders=[3] * 3), 0.515123362310),
        (lambda s: dpm_solver_pp(s, 2, lower_order_final=False), 0.435624000867),
        (lambda s: dpm_solver_pp(s, 2), 0.357338395064),
    ],
)
def test_three_blocks_on_a_gaussian(build, value, gaussian):
    assert gaussian(build, 3) == pytest.approx(value, abs=2e-12)


@pytest.mark.parametrize(
    ("build", "value"),
    [
        (lambda s: dpm_solver_pp(s, 2, lower_order_final=False), 0.494717063895),
        (lambda s: dpm_solver_pp(s, 3, compat=True, lower_order_final=False), 0.545109141507),
        (lambda s: ipndm(s), 0.533365915453),
    ],
)
def test_five_steps_on_a_gaussian(build, value, gaussian):
    assert gaussian(build, 5) == pytest.approx(value, abs=2e-12)


@pytest.fixture
def gaussian():
    """The sample of a solver for data N(0, 0.25) from x = 1, log-SNR -3 to 2 (MATH.md A.1)."""

    class Exact(nn.Module):
        def forward(self, sample, time):
            alpha, sigma = VP.alpha(time + 1), VP.sigma(time + 1)
            return sample * (sigma / (0.25 * alpha**2 + sigma**2))[:, None]

    def run(build, steps):
        log_snr = torch.linspace(-3, 2, steps + 1, dtype=torch.float64)
        table = build(Schedule(VP, VP.time_of_log_snr(log_snr)))
        return float(table.sample(Denoiser(Exact(), VP), torch.ones(1, 1, dtype=torch.float64)))

    return run


def test_coefficients_of_deis_on_the_vp_sde(smooth_vp):
    """MATH.md A.3."""
    times = np.linspace(1, np.sqrt(1e-3), 6) ** 2
    table = deis(Schedule(smooth_vp, times), 3)
    psi = [17.98475062, 4.11992209, 1.746415415, 1.158029791, 1.015418765]
    rows = [
        [-16.99137107],
        [-4.106789692, 0.8891861258],
        [-1.514936824, 0.6736787694, -0.1579610837],
        [-0.6970106058, 0.3856631912, -0.1469715287, 0.02290466512],
        [-0.226888236, 0.08171813762, -0.02404412752, 0.003106290077],
    ]
    np.testing.assert_allclose(table.scale, psi, rtol=1e-9)
    for i, row in enumerate(rows):
        ours = table.weights[i, i - len(row) + 1 : i + 1][::-1]
        np.testing.assert_allclose(ours, row, rtol=1e-8)
