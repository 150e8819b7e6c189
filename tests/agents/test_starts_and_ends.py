"""Every solver on every process starts and ends right: exact Gaussian data tell.

For data N(MEAN, STD^2) the exact denoiser is linear in the state, and the probability-flow ODE maps
z at t_0 to alpha_1 MEAN + S_1 / S_0 (z - alpha_0 MEAN) at t_1, with S^2 = (alpha STD)^2 + sigma^2.
So a deterministic sampler is an affine map, which two runs in float64 tell exactly.
"""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from solver_names import ODE_SOLVERS

from fewstep.agents import DODE, SFTPG, Denoiser, SolverPolicy
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.denoisers.exact import MixtureBody
from fewstep.agents.solvers import (
    SOLVERS,
    ancestral,
    default_schedule,
    default_solver_options,
    heun,
    make_solver,
    solver_within,
)
from fewstep.envs import VE, DiscreteVP, Schedule, make_mdp, make_process
from fewstep.envs.schedules.ends import EmptyStartWarning, LateStartWarning, UnfinishedWarning

pytestmark = pytest.mark.numeric

MEAN, STD = 0.3, 0.5
PROCESSES = ["linear-1000", "linear-1000/10", "cosine-1000", "ve", "ve-1-80", "sigmoid-10"]
LINEAR, COSINE, EDM = DiscreteVP.linear(1000), DiscreteVP.cosine(1000), VE()


def exact(process):
    means = torch.tensor([[MEAN]], dtype=torch.float64)
    # Where no signal is left the noise says nothing of the data.
    prediction = "epsilon" if process.levels(process.t_max)[0] else "sample"
    return Denoiser(MixtureBody(process, means, STD, prediction), process, prediction)


def affine(tableau):
    """Return intercepts and slopes of the states as functions of z_0, (K + 1,) each."""
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    states = tableau.sample(exact(tableau.process), ends, return_trajectory=True)[..., 0].numpy()
    return states[:, 0], states[:, 1] - states[:, 0]


def moments(tableau):
    """Return the mean and the standard deviation of a deterministic sampler's samples."""
    intercepts, slopes = affine(tableau)
    start = tableau.process.prior_std(float(tableau.times[0]))
    return np.array([intercepts[-1], slopes[-1] * start])


def flow(schedule, to_zero=False):
    """Return the exact mean and standard deviation at the last time.

    A last step to 0 is one call from the last positive time, the posterior mean there, unless
    `to_zero` follows the flow all the way.
    """
    process, times = schedule.process, schedule.times.tolist()
    one_call = times[-1] == 0 and not to_zero
    (a0, s0), (a1, s1) = process.levels(times[0]), process.levels(times[-2 if one_call else -1])
    spread = [math.hypot(a * STD, s) for a, s in ((a0, s0), (a1, s1))]
    # sigma at the first time on VE, else 1: written out, not asked of prior_std.
    prior = times[0] if isinstance(process, VE) else 1.0
    mean, std = a1 * MEAN - spread[1] / spread[0] * a0 * MEAN, spread[1] / spread[0] * prior
    if one_call:
        gain = a1 * STD**2 / spread[1] ** 2
        mean, std = MEAN + gain * (mean - a1 * MEAN), gain * std
    return np.array([mean, std])


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_the_default_grid_gives_the_right_mean_and_std(solver, name):
    process = make_process(name)
    grids = [default_schedule(solver, process, steps) for steps in (50, 100)]
    coarse, fine = (moments(make_solver(solver, grid)) for grid in grids)
    # The linear multistep methods extrapolate over the last step; from the smallest level of
    # ve-1-80 to 0 that is no limit of theirs.
    extrapolates = solver in ("ipndm", "ipndm-v", "lms", "deis", "rho-deis")
    if not (extrapolates and name == "ve-1-80"):
        right = flow(grids[1], to_zero=extrapolates)
        # For a method of order 1 or more, doubling the steps changes more than is left. A floor of
        # a thousandth of STD: polynomials in the time are of lower order next to time 0.
        assert (np.abs(fine - right) <= 1.5 * np.abs(fine - coarse) + 5e-4).all()
        assert (np.abs(fine - right) < 0.02).all()
    if name in ("linear-1000", "cosine-1000", "ve"):
        np.testing.assert_allclose(fine, [MEAN, STD], atol=0.02)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_a_later_start_of_ve_starts_from_its_own_level(solver):
    grids = [Schedule.karras(EDM, steps, start=10.0) for steps in (50, 100)]
    coarse, fine = (moments(make_solver(solver, grid)) for grid in grids)
    right = flow(grids[1], to_zero=True)
    assert (np.abs(fine - right) <= 1.5 * np.abs(fine - coarse) + 1e-3).all()
    # Noise of 10 knows no mean: it is drawn to 0 by the share of STD in 10.
    np.testing.assert_allclose(right, [MEAN, STD], rtol=0, atol=1.01 * MEAN * STD / 10)


def chain_moments(tableau):
    """Return the mean and the standard deviation of the samples of a chain with noise.

    Its last state is affine in z_0 and in every step's noise, which unit impulses tell.
    """
    process, steps = tableau.process, tableau.steps
    impulses = torch.zeros(steps + 2, 1, dtype=torch.float64)  # nothing, z_0, the noise of step j
    impulses[1] = 1

    def transition(_state, moved, j):
        moved = moved.clone()
        moved[j + 2] += tableau.noise[j]
        return moved

    still = tableau.replace(noise=np.zeros(steps))
    ends = still.sample(exact(process), impulses, transition=transition)[:, 0].numpy()
    slopes = ends[1:] - ends[0]
    slopes[0] *= process.prior_std(process.t_max)
    return np.array([ends[0], np.linalg.norm(slopes)])


CHAINS = {
    "small": ("ancestral", {"variance": "small"}),
    "large": ("ancestral", {"variance": "large"}),
    "beta": ("ancestral", {"variance": "beta"}),
    "eta": ("ddim", {"eta": 1.0}),
    "euler": ("euler-ancestral", {}),
    "2s-sde": ("dpm-solver++-2s-sde", {}),
    "2m-sde": ("dpm-solver++-2m-sde", {}),
    "2m-half": ("dpm-solver++-2m-sde", {"eta": 0.5}),
    "3m-sde": ("dpm-solver++-3m-sde", {}),
    "fast-dpm": ("fast-dpm", {}),
}


@pytest.mark.parametrize(
    ("chain", "name"),
    [(c, n) for c in CHAINS for n in ("linear-1000", "cosine-1000", "ve") if c != "fast-dpm"]
    # FastDPM is for chains whose betas rise on a line.
    + [("fast-dpm", "linear-1000")],
)
def test_stochastic_chains_give_the_right_mean_and_std(chain, name):
    process, (solver, options) = make_process(name), CHAINS[chain]
    coarse, fine = (
        chain_moments(make_solver(solver, default_schedule(solver, process, steps), **options))
        for steps in (50, 100)
    )
    right = np.array([MEAN, STD])
    # Of first order; the start is wrong by what the prior lacks, alpha(t_max) MEAN at most.
    missing = np.array([float(process.alpha(process.t_max)) / process.prior_std(process.t_max), 0])
    # On even times the last block of two calls is so long in log-SNR that the order is lower.
    left = 2 if chain == "2s-sde" else 1.5
    assert (np.abs(fine - right) <= left * np.abs(fine - coarse) + missing * MEAN + 1e-3).all()


@pytest.mark.parametrize("name", ["flow", "flow-3", "vp", "linear-1000", "sigmoid-10", "ve"])
def test_the_default_chain_of_a_vector_has_noise_in_every_step_and_the_right_moments(name):
    process = make_process(name)
    options = default_solver_options("ancestral", shape=(2,), process=process)
    assert options == default_solver_options("ancestral", exact(process), shape=(2,))
    grids = [default_schedule("ancestral", process, steps) for steps in (10, 50)]
    few, many = (make_solver("ancestral", grid, **options) for grid in grids)
    assert (few.noise > 0).all()
    if process.discrete or name == "ve":
        assert options == {"variance": "beta"}
        return
    # "beta" would blur the samples of ten steps by 0.1 in the last one.
    assert options == {"variance": "large", "last_std": 0.01}
    assert few.noise[-1] == 0.01
    assert ancestral(grids[0], "beta").noise[-1] > 0.04
    # The variance is that of data with the spread of the prior, an upper bound of first order in
    # the steps; the lower bound, "small", is farther off.
    np.testing.assert_allclose(chain_moments(few), [MEAN, STD], atol=0.08)
    np.testing.assert_allclose(chain_moments(many), [MEAN, STD], atol=0.03)
    small = make_solver("ancestral", grids[0], variance="small", last_std=0.01)
    assert abs(chain_moments(few)[1] - STD) < abs(chain_moments(small)[1] - STD)
    image = default_solver_options("ancestral", shape=(1, 8, 8), process=process)
    assert image == {"variance": "small", "last_std": 0.001}


def test_the_default_options_of_sft_pg_know_the_process():
    mdp = make_mdp("SwissRoll", steps=10, process=make_process("flow"))
    agent = SFTPG(mdp, new_denoiser(mdp), batch_size=8)
    assert agent.solver_options == {"variance": "large", "last_std": 0.01}
    assert (agent.tableau.noise > 0).all()


def test_everything_starts_from_the_schedule_s_first_time():
    schedule = Schedule(EDM, [10, 5, 2, 1, 0.3, 0.05, 0])
    denoiser = exact(EDM).float()
    generator = torch.Generator().manual_seed(0)
    policy = SolverPolicy(heun(schedule), denoiser)
    trajectory = policy.sample(40_000, shape=(1,), generator=generator, return_trajectory=True)
    # The standard deviation of n normal numbers is off by 1 / sqrt(2 n), relative: four of them.
    tolerance = 4 / math.sqrt(2 * 40_000)
    assert float(trajectory[0].std()) == pytest.approx(10, rel=tolerance)
    assert float(trajectory[-1].std()) == pytest.approx(moments(heun(schedule))[1], rel=tolerance)
    tolerance = 4 / math.sqrt(2 * 2 * 3000)
    env = gym.make_vec("fewstep/SwissRoll-v0", 3000, schedule=schedule)
    assert float(env.reset(seed=0)[0]["sample"].std()) == pytest.approx(10, rel=tolerance)
    late = {"schedule": Schedule(EDM, [3.5, 1, 0])}
    observation, _ = env.reset(seed=0, options=late)
    assert float(observation["sample"].std()) == pytest.approx(3.5, rel=tolerance)
    agent = DODE.without_data(denoiser, schedule, (1,), solver="euler", check_teacher=False)
    batch = agent.pool.fitted[0]
    many = 4 / math.sqrt(2 * batch.noise.numel())
    assert float(batch.noise.std()) == pytest.approx(10, rel=many)
    drawn = agent.sample(3000, schedule=Schedule(EDM, [3.5, 1, 0]), return_trajectory=True)[0]
    assert float(drawn.std()) == pytest.approx(3.5, rel=4 / math.sqrt(2 * 3000))


def test_a_late_start_is_told_and_ordinary_grids_are_not(recwarn):
    def start(schedule):
        return schedule.prior_sample((2, 1), torch.Generator().manual_seed(0))

    for process in (LINEAR, COSINE):
        for name, steps in (("leading", 5), ("quad", 10), ("trailing", 4), ("linspace", 10)):
            start(getattr(Schedule, name)(process, steps))
    start(Schedule.fast_dpm(LINEAR, 10))
    start(Schedule.uniform(DiscreteVP.sigmoid(10), 10))
    start(Schedule(EDM, [10, 1, 0]))
    assert not recwarn.list
    # On a variance-preserving process the noise is N(0, 1) all the same.
    with pytest.warns(LateStartWarning, match=r"at time 400 of .* still holds 0\.44"):
        late = start(Schedule.uniform(LINEAR, 4, start=400))
    assert torch.equal(late, start(Schedule.uniform(LINEAR, 4)))
    with pytest.warns(LateStartWarning, match=r"at time 1 of"):
        start(Schedule(EDM, [1, 0.1, 0]))
    # What the warning says of the samples, in the closed form.
    mean, std = flow(Schedule.uniform(LINEAR, 4, start=400), to_zero=True)
    got = moments(make_solver("rho-deis", Schedule.uniform(LINEAR, 50, start=400)))
    np.testing.assert_allclose(got, [mean, std], atol=1e-3)
    assert mean == pytest.approx(0.23, abs=0.005)


def test_unfinished_samples_are_told():
    short = make_process("linear-1000/10")
    denoiser = exact(short).float()
    unfinished = SolverPolicy(make_solver("ddim", Schedule.uniform(short, 9, end=1.0)), denoiser)
    with pytest.warns(UnfinishedWarning, match=r"noise of standard deviation 0\.34 left"):
        unfinished.sample(3, shape=(1,))
    for process in ("linear-1000", "cosine-1000", "ve", "sigmoid-10"):
        process = make_process(process)
        Schedule.log_snr(process, 4).prior_sample((1, 1))


@pytest.mark.parametrize("name", ["linear-1000/10", "linear-1000/100", "ve-1-80"])
@pytest.mark.parametrize("solver", [n for n, s in SOLVERS.items() if s.to_t_min])
def test_default_grids_of_short_chains_end_with_a_first_order_step_to_0(solver, name):
    process = make_process(name)
    table = solver_within(solver, 10, denoiser=exact(process))
    assert table.nfe == 10
    assert table.times[-1] == 0
    assert table.times[-2] == process.t_min
    # The last state is the predicted clean sample: first order, in whichever output.
    z = torch.tensor([[0.7]], dtype=torch.float64)
    denoiser = exact(process)
    states = table.sample(denoiser, z, return_trajectory=True)
    torch.testing.assert_close(states[-1], denoiser.denoised(states[-2], process.t_min))


@pytest.mark.parametrize(
    ("solver", "worst"), [("heun", 0.3), ("dpm-solver-2", 0.4), ("dpm-solver-3", 0.7)]
)
def test_cosine_betas_start_where_there_is_a_signal(solver, worst):
    """Ten calls from t_max have standard deviations of 37, 15 and 2583, where 0.5 is right."""
    table = solver_within(solver, 10 - (solver == "heun"), denoiser=exact(COSINE))
    assert float(COSINE.log_snr(table.times[0])) == pytest.approx(-5.1, abs=1e-9)
    assert abs(moments(table)[1] - STD) < worst
    with pytest.warns(EmptyStartWarning, match=rf"{solver} starts at time 1000 .* time 996\.077"):
        table = make_solver(solver, Schedule.uniform(COSINE, 10, end=1.0))
    assert table.times[0] == 1000
    assert abs(moments(table)[1]) > 1.5  # what the user asked for


def test_an_agent_on_an_id_takes_its_solver_s_default_grid():
    process = DiscreteVP.sigmoid(10)
    denoiser = Denoiser(MixtureBody(process, torch.zeros(1, 2), STD), process)
    for solver, end in (("dpm-solver++-2m", 1.0), ("ddim", 0.0)):
        agent = DODE("fewstep/SwissRoll-v0", denoiser, solver=solver, check_teacher=False)
        assert agent.schedule == Schedule.uniform(process, 10, end=end)
    process = make_process("ve-1-80")
    assert make_mdp("SwissRoll", process=process).schedule == Schedule.karras(process, 10)
