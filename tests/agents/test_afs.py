"""AFS, the first network call for nothing: the samples, the price, and whoever runs tables."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from solver_names import ODE_SOLVERS
from torch import nn

from fewstep.agents import DODE, SFTPG, Denoiser, ScheduleLearning, SolverPolicy, Tableau
from fewstep.agents.denoisers.exact import mixture as exact_mixture
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.agents.samplers.gaussian import GaussianChain
from fewstep.agents.solver_learning.scheduling.adjoint import backpropagate, by_log_level
from fewstep.agents.solvers import (
    afs,
    ancestral,
    build_solver,
    ddim,
    heun,
    ipndm,
    make_solver,
    solver_within,
)
from fewstep.envs import VE, DiscreteVP, RectifiedFlow, Schedule, make_mdp

pytestmark = pytest.mark.numeric

VP, EDM = DiscreteVP.linear(1000), VE()
PROCESSES = pytest.mark.parametrize("process", [VP, EDM], ids=["VP", "VE"])


@torch.no_grad()
def test_ipndm_without_its_first_call_is_the_loop_by_hand(mixture, prior, grid):
    schedule, denoiser = grid("uniform", VP, 6), mixture(VP)
    table = make_solver("ipndm", schedule, afs=True)
    alpha, sigma = schedule.levels()
    state = prior(VP)
    outputs = [state]  # of unit length on a VP chain: the noise itself
    for i in range(6):
        if i:
            outputs.append(denoiser.epsilon(state, float(schedule.times[i])))
        order = min(i + 1, 4)
        weights = {
            1: [1.0],
            2: [1.5, -0.5],
            3: [23 / 12, -16 / 12, 5 / 12],
            4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
        }[order]
        mixed = sum(w * o for w, o in zip(weights, outputs[::-1], strict=False))
        ratio = alpha[i + 1] / alpha[i]
        state = ratio * state + (sigma[i + 1] - sigma[i] * ratio) * mixed
    torch.testing.assert_close(table.sample(denoiser, prior(VP)), state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("output", ["sample", "epsilon"])
@torch.no_grad()
def test_heun_on_ve_starts_with_the_direction_of_edm(output, mixture, prior):
    """d = x / sqrt(1 + t^2) in the first of its calls."""
    levels = [80.0, 20.0, 3.0, 0.5, 0.0]
    denoiser, table = (
        mixture(EDM),
        make_solver("heun", Schedule(EDM, levels), afs=True, output=output),
    )
    state = prior(EDM)
    for i, (t, s) in enumerate(pairwise(levels)):
        slope = denoiser.epsilon(state, t) if i else state / (1 + t**2) ** 0.5
        ahead = state + (s - t) * slope
        if s > 0:
            slope = (slope + denoiser.epsilon(ahead, s)) / 2
        state = state + (s - t) * slope
    assert (table.steps, table.nfe) == (7, 6)
    torch.testing.assert_close(table.sample(denoiser, prior(EDM)), state, rtol=1e-10, atol=1e-10)


class First(nn.Module):
    """A noise predictor that answers its first call with the sample itself, by its length."""

    def __init__(self, body, length):
        super().__init__()
        self.body, self.length, self.called = body, length, False

    def forward(self, sample, time):
        if self.called:
            return self.body(sample, time)
        self.called = True
        return sample / self.length


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@PROCESSES
@torch.no_grad()
def test_every_ode_solver_spares_one_call(solver, process, grid, mixture, prior, count_calls):
    schedule, denoiser = grid("log_snr", process, 6), mixture(process)
    whole, table = make_solver(solver, schedule), make_solver(solver, schedule, afs=True)
    assert (table.nfe, table.steps) == (whole.nfe - 1, whole.steps)
    np.testing.assert_array_equal(table.times, whole.times)
    calls = count_calls(denoiser.body)
    noise = prior(process)
    samples = table.sample(denoiser, noise)
    assert len(calls) == table.nfe
    # The whole table, with a network that says the same in its first call.
    first = Denoiser(First(denoiser.body, float(np.hypot(*process.levels(process.t_max)))), process)
    assert not torch.equal(whole.sample(denoiser, noise), samples)
    expected = whole.sample(first, noise)
    torch.testing.assert_close(samples, expected, rtol=1e-8, atol=1e-8)
    again = Tableau.from_json(table.to_json())
    assert again.to_json() == table.to_json() and again.name.endswith(" (afs)")
    assert torch.equal(again.sample(denoiser, noise), samples)


@pytest.mark.parametrize("output", ["sample", "epsilon"])
def test_the_guess_of_the_sample_is_that_of_the_noise(output, generator):
    for process in (VP, EDM, RectifiedFlow()):
        t = 0.90005 * process.t_max  # between two noisings
        table = ddim(Schedule(process, [t, 0.3 * process.t_max]), output=output)
        table = table.replace(asked=np.array([False]))
        state = torch.randn(5, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
        alpha, sigma = process.levels(t)
        expected = state / np.hypot(alpha, sigma)
        if output == "sample":
            expected = (state - sigma * expected) / alpha
        ours = table.evaluate(None, state, 0)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        (slope,) = torch.autograd.grad(ours.sum(), state)
        torch.testing.assert_close(slope, (expected / state).detach(), rtol=1e-9, atol=1e-12)
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        ours = table.evaluate(None, state, 0, time).sum()
        (by_time,) = torch.autograd.grad(ours, time)
        step = 1e-5 * process.t_max
        ahead, behind = (
            table.evaluate(None, state, 0, torch.tensor(t + d, dtype=torch.float64)).sum()
            for d in (step, -step)
        )
        quotient = float((ahead - behind).detach()) / (2 * step)
        assert float(by_time) == pytest.approx(quotient, rel=1e-4, abs=1e-9)


class Smooth(nn.Module):
    """A network that is smooth in the sample and in the level, with a weight to learn."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, sample, level):
        return torch.tanh(self.weight * sample) / (1 + 0.3 * level[:, None])


@pytest.mark.parametrize("solver", ["euler", "ipndm", "heun"])
def test_the_adjoint_is_the_difference_quotient(solver, prior):
    denoiser, noise = Denoiser(Smooth(), EDM), prior(EDM)
    target = noise.flip(0) / 80
    schedule = Schedule(EDM, [80.0, 30.0, 10.0, 3.0, 0.9, 0.2])

    def build(where):
        return make_solver(solver, where, afs=True)

    def loss(where):
        missed = build(where).sample(denoiser, noise) - target
        return missed.square().flatten(1).sum(1).mean()

    table, weight = build(schedule), denoiser.body.weight
    error, _, found = backpropagate(table, denoiser, noise, target, table.steps, [weight])
    ours = float(weight.grad)
    weight.grad = None
    whole = loss(schedule)
    (expected,) = torch.autograd.grad(whole, weight)
    assert error == pytest.approx(float(whole.detach()), rel=1e-10)
    assert ours == pytest.approx(float(expected), rel=1e-8)
    gradient = by_log_level(build, schedule, found)
    with torch.no_grad():
        for i in range(1, 5):
            ends = []
            for move in (1e-4, -1e-4):
                times = schedule.times
                times[i] *= np.exp(move)
                ends.append(float(loss(Schedule(EDM, times))))
            quotient = (ends[0] - ends[1]) / 2e-4
            assert float(gradient[i]) == pytest.approx(quotient, rel=1e-5)


def test_a_budget_counts_what_is_asked():
    def to_zero(steps):
        return Schedule.karras(EDM, steps)

    def above(steps):
        return Schedule.karras(EDM, steps, append_zero=False)

    for nfe in (5, 6):
        for solver in ("ddim", "ipndm", "dpm-solver++-2m", "unipc-2"):
            table = solver_within(solver, nfe, to_zero, afs=True)
            assert (table.nfe, table.steps) == (nfe, nfe + 1)
    assert solver_within("heun", 6, to_zero, afs=True).nfe == 6
    assert solver_within("heun", 7, above, afs=True).nfe == 7
    with pytest.raises(ValueError, match="heun cannot spend exactly 7 network calls"):
        solver_within("heun", 7, to_zero, afs=True)


def test_a_budget_is_met_where_heun_s_first_step_is_of_first_order():
    def flow(steps):
        return Schedule.uniform(RectifiedFlow(), steps)

    for nfe in (4, 8):
        assert solver_within("heun", nfe, flow).nfe == nfe
    assert solver_within("flow-heun", 9, flow).nfe == 9


def test_the_file_is_of_the_next_version_only_where_a_step_is_not_asked(grid):
    schedule = grid("uniform", VP, 4)
    assert json.loads(ddim(schedule).to_json())["version"] == 4
    assert "asked" not in json.loads(ddim(schedule).to_json())
    table = json.loads(afs(ddim(schedule)).to_json())
    assert (table["version"], table["asked"]) == (5, [False, True, True, True])
    for asked, complaint in (
        ([0, 1, 1, 1], "true or false"),
        (["no", "yes", "yes", "yes"], "text"),
        ([False, True], "shape"),
        ([], "asked"),
        (False, "shape"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Tableau.from_json(json.dumps({**table, "asked": asked}))


def test_a_table_that_is_not_asked_never_changes(grid):
    table = afs(ddim(grid("uniform", VP, 4)))
    with pytest.raises(ValueError, match="read-only"):
        table.asked[0] = True
    assert not table.is_default("asked")
    assert table.replace(asked=None).nfe == 4


def test_steps_of_a_policy_and_of_a_pipeline_are_the_table_s(grid, prior):
    schedule = grid("uniform", VP, 5)
    denoiser, table = exact_mixture(VP, dimension=2)[0].float(), afs(ipndm(schedule))
    noise = prior(VP).float()
    with torch.no_grad():
        expected = table.sample(denoiser, noise)
        policy, memory = SolverPolicy(table, denoiser, shape=(2,)), None
        state = noise.numpy()
        for t in table.times[:-1]:
            seen = {"sample": state, "timestep": np.full(len(state), t, dtype=np.float32)}
            state, memory = policy.predict(seen, memory)
        np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5)
        assert policy.nfe == 4
        scheduler = TableauScheduler(json.loads(table.to_json()))
        assert scheduler.num_inference_steps == len(scheduler.timesteps) == 5
        state = noise
        for t, time in zip(scheduler.timesteps, table.times[:-1], strict=True):
            # A pipeline asks in every step.
            answer = denoiser.epsilon(state, float(time))
            state = scheduler.step(answer, t, state).prev_sample
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


@PROCESSES
@pytest.mark.parametrize("refine", [False, True])
def test_d_ode_distils_what_is_left(process, refine):
    schedule = Schedule.karras(process, 5)
    options = {"refine": "end-to-end", "refine_steps": 2} if refine else {}
    agent = DODE.without_data(
        exact_mixture(process, dimension=2)[0].float(),
        schedule,
        (2,),
        solver="ddim",
        solver_options={"afs": True},
        batch_size=50,
        batches=2,
        **options,
    )
    agent.learn()
    table = agent.tableau
    assert agent.returned != "given"
    assert (table.nfe, agent.nfe, table.steps) == (4, 4, 5)
    assert not table.asked[0] and table.name == "d-ddim (afs)"
    assert agent.errors["distilled"] < agent.errors["given"]
    assert agent.teacher.tableau.nfe == agent.teacher.tableau.steps


def test_schedule_learning_moves_the_times_of_such_a_sampler():
    agent = ScheduleLearning.without_data(
        exact_mixture(EDM, dimension=2)[0].float(),
        Schedule.karras(EDM, 5),
        (2,),
        solver="ipndm",
        solver_options={"afs": True, "order": 2},
        batch_size=40,
        batches=1,
        schedule_rounds=10,
        tuning_rounds=0,
    )
    agent.learn()
    assert agent.nfe == 4 and not agent.tableau.asked[0]
    assert agent.errors["returned"] <= agent.errors["given"]


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda s: make_solver("ancestral", s, afs=True), "'ancestral .small.' adds noise"),
        (lambda s: make_solver("ddim", s, eta=0.5, afs=True), "adds noise"),
        (lambda s: make_solver("ddim", s, clip=True, afs=True), "clamps"),
        (lambda s: make_solver("ddim", s, afs=1), "afs must be True or False, got 1"),
        (lambda s: make_solver("ddim", s, afs="yes"), "afs must be True or False, got 'yes'"),
        (lambda s: make_solver("ddim", s, asf=True), "did you mean 'afs'"),
        (lambda s: afs(afs(ddim(s))), "no call to spare"),
        (lambda _s: make_solver("ddim", Schedule(VP, [1000, 0]), afs=True), "no call to spare"),
        (
            lambda _s: make_solver("euler", Schedule.uniform(RectifiedFlow(), 4), afs=True),
            "No signal is left at time 1 of .*RectifiedFlow",
        ),
        (
            lambda s: GaussianChain(
                Denoiser(nn.Linear(2, 2), VP),
                ancestral(s, "beta").replace(asked=np.array([False, True, True, True])),
            ),
            "build the sampler without afs",
        ),
        (
            lambda s: ancestral(s).replace(
                asked=np.array([False] + [True] * 3), covariance=np.ones(4)
            ),
            "covariance comes from the network",
        ),
        (lambda s: ddim(s).replace(asked=np.ones(4)), "true or false"),
        (lambda s: ddim(s).replace(asked=np.ones(3, dtype=bool)), "shape"),
    ],
)
def test_what_makes_no_sense_is_refused(build, complaint, grid):
    with pytest.raises(ValueError, match=complaint):
        build(grid("uniform-to-0", VP, 4))


def test_a_policy_gradient_has_no_use_for_it():
    mdp = make_mdp("SwissRoll", steps=4)
    with pytest.raises(ValueError, match="afs is for deterministic solvers"):
        SFTPG(mdp, Denoiser(nn.Linear(2, 2), mdp.process), solver_options={"afs": True})


def test_the_first_call_of_heun_is_the_only_one_that_goes():
    schedule = Schedule.karras(EDM, 4)
    table = build_solver("heun", schedule, afs=True)
    assert table.asked.tolist() == [False] + [True] * 6
    assert table.replace(name="heun", asked=None).to_json() == heun(schedule).to_json()
