"""What the agents promise that distil a fine solver into the network: SFD, PD, CD."""

import copy
import itertools

import numpy as np
import pytest
import torch
from distilled import FEW, Smooth, cluster, gradients_of, in_float64, weights_of, world
from rounds import learn_rounds
from torch import nn

from fewstep.agents import (
    SFD,
    CheckpointError,
    ConsistencyDistillation,
    Denoiser,
    ProgressiveDistillation,
)
from fewstep.agents.network_distillation.pairs import OnTrajectories
from fewstep.agents.solver_learning.distillation.teacher import make_teacher
from fewstep.agents.solvers import make_solver
from fewstep.envs import VE, DiffusionMDP, DiscreteVP, Schedule, Target
from fewstep.envs.mdp import no_reward

numeric = pytest.mark.numeric
AGENTS = {
    "sfd": (SFD, {}),
    "pd": (ProgressiveDistillation, {"rounds": 2, "teacher_steps": 16}),
    "pd, data": (ProgressiveDistillation, {"rounds": 4, "teacher_steps": 8, "states": "data"}),
    "cd": (ConsistencyDistillation, {"scale": 2}),
    "cd, data": (ConsistencyDistillation, {"scale": 2, "states": "data", "weights": "gap"}),
}


# -- SFD -------------------------------------------------------------------------------------------


@numeric
@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("micro", [None, 3])
def test_sfd_s_gradients_are_those_of_its_losses(distance, micro, monkeypatch):
    """By an own implementation of Euler's steps in data prediction, on a flow."""
    in_float64(monkeypatch)
    mdp, denoiser = world()
    settings = {"distance": distance, "micro_batch_size": micro, "max_grad_norm": None}
    agent = SFD(mdp, denoiser, solver="euler", **{**FEW, "batch_size": 7, **settings})
    theirs = gradients_of(agent, monkeypatch)
    source = torch.Generator().manual_seed(0)
    state = mdp.initial(7, source)
    fine = make_teacher(make_solver("euler", mdp.schedule), mdp.schedule, "dpm-solver++-3m", {}, 8)
    goals = fine.states(denoiser, state)
    times = mdp.schedule.times.tolist()
    for t, s, goal, theirs_now in zip(times, times[1:], goals, theirs, strict=False):
        # dx / dt = v.
        after = state + (s - t) * denoiser.body(state, torch.full((7,), t, dtype=torch.float64))
        missed = after - goal
        loss = missed.abs().mean() if distance == "l1" else missed.square().mean()
        ours = torch.autograd.grad(loss, list(denoiser.parameters()))
        for mine, its in zip(ours, theirs_now, strict=True):
            torch.testing.assert_close(its, mine, rtol=1e-9, atol=1e-12)
        state = after.detach()
    assert len(theirs) == 4


def test_sfd_comes_closer_to_the_fine_solver_and_says_so():
    mdp, denoiser = world()
    before = weights_of(denoiser)
    agent = SFD(mdp, denoiser, **{**FEW, "rounds": 60, "learning_rate": 5e-3, "ema": 0.8})
    agent.learn()
    errors = agent.errors
    assert errors["returned"] < errors["given"] / 4 and errors["teacher"] < errors["given"] / 30
    assert agent.returned == "distilled" and "the distilled network" in agent.verdict
    assert not torch.equal(weights_of(denoiser), before)
    assert torch.equal(weights_of(agent.teacher), before)
    # The reported error is that of the sampler that is returned.
    held_out = agent._held_out.reported
    ends = agent.sample(16, noise=held_out.states[0])
    found = (ends.double() - held_out.states[-1].double()).square().mean()
    assert errors["returned"] == pytest.approx(float(found), rel=1e-5)


def test_what_makes_it_worse_is_not_returned():
    mdp, denoiser = world()
    before = weights_of(denoiser)
    agent = SFD(mdp, denoiser, **{**FEW, "learning_rate": 0.3, "looks": 1})
    agent.learn()
    assert agent.returned == "given" and agent.errors["distilled"] > agent.errors["given"]
    assert agent.errors["returned"] == agent.errors["given"]
    assert torch.equal(weights_of(agent.sampling_denoiser), before)


@pytest.mark.parametrize("afs", [False, True])
def test_a_learned_table_is_followed(afs, tmp_path):
    """Its times are the student's; a step that is not asked teaches nothing."""
    mdp, denoiser = world(steps=3)
    times = [0.95, 0.7, 0.5, 0.2, 0.01]
    table = make_solver("dpm-solver++-2m", Schedule(mdp.process, times), afs=afs)
    table = table.replace(name="learned", weights=table.weights * 1.01)
    agent = SFD(mdp, denoiser, tableau=table, **FEW)
    assert agent.tableau is table and agent.schedule.times.tolist() == times
    assert agent.fine.tableau.steps == 32
    steps = []
    agent.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    agent.learn()
    assert len(steps) == 4 * (3 if afs else 4)
    with pytest.raises(ValueError, match="'learned' is a finished table"):
        agent.sample(2, schedule=mdp.schedule)
    agent.save(tmp_path / "agent")
    there = mdp.with_schedule(agent.schedule)
    loaded = SFD.load(tmp_path / "agent", there, body=Smooth())
    assert loaded.tableau.to_json() == table.to_json()
    noise = torch.randn(3, 2)
    assert torch.equal(loaded.sample(3, noise=noise), agent.sample(3, noise=noise))
    table.save(tmp_path / "table.json")
    named = SFD(mdp, copy.deepcopy(denoiser), table=str(tmp_path / "table.json"), **FEW)
    assert named.tableau.to_json() == table.to_json()
    assert named.schedule.times.tolist() == times
    with pytest.raises(CheckpointError, match="/agent was trained with another table"):
        SFD(there, copy.deepcopy(denoiser), solver="ddim", **FEW).resume(tmp_path / "agent")


@pytest.mark.parametrize("solver", ["heun", "unipc-2", "dpm-solver++-2m"])
def test_any_deterministic_table_is_a_student(solver):
    mdp, denoiser = world(end=0.01)
    agent = SFD(mdp, denoiser, solver=solver, **FEW)
    agent.learn()
    assert agent.done and set(agent.errors) == {"teacher", "given", "distilled", "returned"}


# -- PD --------------------------------------------------------------------------------------------


def flow_step(denoiser, state, t, s):
    """DDIM on a flow, written again: x_s = x_t + (s - t) v."""
    with torch.no_grad():
        return state + (s - t) * denoiser.body(state, torch.full((len(state),), t).double())


def levels_seen(agent, steps, count):
    """Which first time each trajectory has in each step, as the agent draws it."""
    source = torch.Generator().manual_seed(0)
    noise = agent.mdp.initial(count, source)
    return noise, torch.rand(steps, count, generator=source).argsort(0)


@numeric
@pytest.mark.parametrize("weights", ["truncated-snr", "snr"])
def test_pd_s_gradients_are_those_of_its_losses(weights, monkeypatch):
    """The target by two explicit steps of the teacher."""
    in_float64(monkeypatch)
    mdp, denoiser = world()
    settings = {**FEW, "batch_size": 7, "max_grad_norm": None, "weights": weights}
    agent = ProgressiveDistillation(mdp, denoiser, teacher_steps=8, **settings)
    theirs = gradients_of(agent, monkeypatch)
    times = [1 - j / 8 for j in range(9)]
    state, levels = levels_seen(agent, 4, 7)
    states = [state]
    for t, s in itertools.pairwise(times):
        states.append(flow_step(denoiser, states[-1], t, s))
    for level, its in zip(levels.tolist(), theirs, strict=True):
        loss = 0.0
        for n, j in enumerate(level):
            t, s = times[2 * j], times[2 * j + 2]
            start, end = states[2 * j][n : n + 1], states[2 * j + 2][n : n + 1]
            # One step with x~ ends where the two do.
            target = (end - s / t * start) / ((1 - s) - (1 - t) * s / t)
            one_step = (1 - s) * target + s * (start - (1 - t) * target) / t
            torch.testing.assert_close(one_step, end, rtol=1e-12, atol=1e-12)
            clean = start - t * denoiser.body(start, torch.tensor([t]).double())
            snr = (1 - t) ** 2 / t**2
            weight = max(snr, 1) if weights == "truncated-snr" else snr
            loss = loss + weight * (clean - target).square().mean() / 7
        for mine, other in zip(
            torch.autograd.grad(loss, list(denoiser.parameters())), its, strict=True
        ):
            torch.testing.assert_close(other, mine, rtol=1e-9, atol=1e-12)
    assert len(theirs) == 4


def test_pd_halves_and_comes_closer_to_the_fine_solver():
    mdp, denoiser = world()
    agent = ProgressiveDistillation(
        mdp,
        denoiser,
        **{**FEW, "rounds": 25, "learning_rate": 5e-3, "teacher_steps": 16, "ema": 0.8},
    )
    before, seen = weights_of(agent.teacher), []
    agent.learn(callback=lambda *_: seen.append((agent.halving, len(agent._times))) or True)
    assert agent.halvings == 2 and seen[0] == (0, 9) and seen[-1] == (1, 5)
    assert not torch.equal(weights_of(agent.teacher), before)  # the student of the first halving
    assert agent.errors["returned"] < agent.errors["given"] / 3


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_a_last_step_that_cannot_be_split_stays_whole(name):
    process = VE(sigma_min=0.01, sigma_max=5.0)
    schedule = Schedule.karras(process, 4)
    target = Target.from_sampler(cluster, "Cluster", 300)
    mdp = DiffusionMDP(target, process, schedule, no_reward)
    agent = ProgressiveDistillation(
        mdp, Denoiser(Smooth(), process), solver=name, teacher_steps=8, **FEW
    )
    assert agent._times.tolist() == schedule.times.tolist()
    assert agent._solvers[1].tableau.steps == 7
    agent.settings = agent.settings.replace(states="data")
    agent.learn()
    assert agent.finished


# -- CD --------------------------------------------------------------------------------------------


class GaussianBody(nn.Module):
    """For data N(m, s^2) on a flow: the mean of the clean sample, or where the ODE ends."""

    mean, std = torch.tensor([0.5, -0.5], dtype=torch.float64), 0.3

    def __init__(self, jumps):
        super().__init__()
        self.jumps, self.unused = jumps, nn.Parameter(torch.zeros(()))

    def forward(self, sample, time):
        alpha, sigma = 1 - time.double()[:, None], time.double()[:, None]
        spread = (alpha * self.std) ** 2 + sigma**2
        gain = self.std / spread.sqrt() if self.jumps else alpha * self.std**2 / spread
        return self.mean + gain * (sample - alpha * self.mean) + 0 * self.unused


@numeric
def test_cd_s_fixed_point_on_a_gaussian_is_its_consistency_function(monkeypatch):
    in_float64(monkeypatch)
    mdp, _ = world()
    mean, jump = (Denoiser(GaussianBody(jumps), mdp.process, "sample") for jumps in (False, True))
    # From t = 1 trajectories keep (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2).
    agent = ConsistencyDistillation(mdp, mean, **{**FEW, "scale": 40, "solver": "consistency"})
    found = agent._trajectories_on_grid()
    first = torch.arange(16) * 10 % 160
    for gap in (1, 4):
        last = (first + gap).clamp(max=160)
        pair = OnTrajectories(found).pair(first, last, slice(None))
        of_mean, of_jump = (agent.losses(each, pair) for each in (mean, jump))
        assert of_jump.max() < of_mean.mean() / 10_000
    # Up to the fine solver's own error, whose first and last steps are of first order.
    with torch.no_grad():
        ends = jump.denoised(found.states[0], 1.0)
    torch.testing.assert_close(ends, found.states[-1], rtol=0, atol=2e-3)


@numeric
@pytest.mark.parametrize("weights", ["even", "gap"])
def test_cd_s_gradients_are_those_of_its_losses(weights, monkeypatch):
    in_float64(monkeypatch)
    mdp, denoiser = world(start=0.9)
    settings = {**FEW, "batch_size": 7, "max_grad_norm": None, "scale": 2, "huber": 0.1}
    agent = ConsistencyDistillation(mdp, denoiser, weights=weights, stages=2, **settings)
    theirs = gradients_of(agent, monkeypatch)
    times = torch.linspace(0.9, 0, 9, dtype=torch.float64)
    state, levels = levels_seen(agent, 8, 7)
    table = make_solver("dpm-solver++-3m", Schedule(mdp.process, times))
    with torch.no_grad():
        states = table.sample(denoiser, state, return_trajectory=True)
    rho = times / (1 - times)
    mean = (1 / (rho[:-1] - rho[1:])).mean()
    for level, its in zip(levels, theirs, strict=True):
        last, which = (level + 2).clamp(max=8), torch.arange(7)  # the first stage's jumps
        t, r = times[level, None], times[last, None]
        start, end = states[level, which], states[last, which]
        jump = start - t * denoiser.body(start, t[:, 0])
        with torch.no_grad():
            # At r = 0 the function is the identity, and so is x - r v.
            goal = end - r * denoiser.body(end, r[:, 0])
        weight = 1 / ((rho[level] - rho[last]) * mean) if weights == "gap" else torch.ones(7)
        loss = (((jump - goal).square().mean(1) + 0.01).sqrt() - 0.1) * weight
        ours = torch.autograd.grad(loss.mean(), list(denoiser.parameters()))
        for mine, other in zip(ours, its, strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-9, atol=1e-12)


def test_the_end_is_the_boundary_of_the_consistency_function():
    """Also of a network that is none: one that predicts the clean sample."""
    mdp, denoiser = world(prediction="sample", end=0.1)
    agent = ConsistencyDistillation(mdp, denoiser, **FEW)
    states = torch.randn(3, 2)
    end = len(agent._times) - 1
    found = agent.function(denoiser, states, torch.tensor([0, end - 1, end]))
    assert torch.equal(found[2], states[2])
    torch.testing.assert_close(found[0], denoiser.denoised(states, 1.0)[0])


@numeric
def test_a_consistency_model_s_samples_have_the_data_s_moments(generator):
    """The exact function of a Gaussian, by the table: jump, and noise again."""
    mdp, _ = world(steps=3)
    jump = Denoiser(GaussianBody(True), mdp.process, "sample")
    table = make_solver("consistency", mdp.schedule)
    assert not table.linear and table.one_step and table.noise[-1] == 0
    noise = torch.randn(40_000, 2, generator=generator(), dtype=torch.float64)
    with torch.no_grad():
        samples = table.sample(jump, noise, generator=generator(1))
    assert (samples.mean(0) - GaussianBody.mean).abs().max() < 5 * 0.3 / 200
    assert (samples.std(0) - 0.3).abs().max() < 5 * 0.3 / 200 / 2**0.5
    # By hand, a step: alpha D + sigma noise.
    fresh = torch.randn(40_000, 2, generator=generator(1), dtype=torch.float64)
    with torch.no_grad():
        (_, first, *_), by_hand = (
            table.sample(jump, noise, generator=generator(1), return_trajectory=True),
            (1 / 3) * jump.denoised(noise, 1.0) + (2 / 3) * fresh,
        )
    torch.testing.assert_close(first, by_hand)


def test_cd_comes_closer_to_the_trajectories_ends():
    mdp, denoiser = world()
    settings = {**FEW, "rounds": 20, "learning_rate": 5e-3, "ema": 0.8, "scale": 4}
    # 16 steps: jumps of 16, that is to the end, 8, ...
    agent = ConsistencyDistillation(mdp, denoiser, **settings)
    gaps = []
    agent.learn(callback=lambda *_: gaps.append(agent._gap) or True)
    assert agent.errors["returned"] < agent.errors["given"] / 3
    assert sorted(set(gaps)) == [1, 2, 4, 8, 16] and gaps[-1] == 1


# -- what all promise ------------------------------------------------------------------------------


@pytest.fixture
def make():
    """`make(name, **changes)`: a small agent of each kind in a world of its own."""

    def built(name, conditional=False, guidance=None, **changes):
        kind, settings = AGENTS[name]
        mdp, denoiser = world(conditional=conditional)
        if guidance:
            denoiser = denoiser.given(guidance=guidance)
        return kind(mdp, denoiser, **{**FEW, **settings, **changes})

    return built


@pytest.mark.parametrize("name", AGENTS)
def test_a_killed_training_goes_on_bit_for_bit(name, make, tmp_path):
    """By a new agent or a loaded one, counters and all; PD's second halving is about to begin."""
    guided = {"conditional": True, "guidance": 2.0, "absorb_guidance": True}
    whole = make(name, **guided)
    whole.learn()
    first = make(name, **guided)
    learn_rounds(first, 2)
    first.save(tmp_path / "agent")
    resumed = make(name, **guided)
    resumed.resume(tmp_path / "agent")
    loaded = type(first).load(tmp_path / "agent", resumed.mdp, body=Smooth(3))
    for agent in (resumed, loaded):
        agent.learn(reset_num_timesteps=False)
        assert torch.equal(weights_of(agent.sampling_denoiser), weights_of(whole.sampling_denoiser))
        assert torch.equal(weights_of(agent.denoiser), weights_of(whole.denoiser))
        assert (agent.errors, agent.returned) == (whole.errors, whole.returned)
        assert agent.num_timesteps == whole.num_timesteps


@pytest.mark.parametrize("name", AGENTS)
def test_guidance_is_absorbed(name, make):
    """The student costs one evaluation a call; the teacher is guided as by hand."""
    agent = make(name, conditional=True, guidance=3.0, absorb_guidance=True)
    assert agent.denoiser.conditioning.guidance == 1 and agent.nfe == 4
    assert make(name, conditional=True, guidance=3.0).nfe == 8
    label = torch.tensor([0, 1, 2, 0])
    noise, time = torch.randn(4, 2), torch.full((4,), 0.5)
    body = agent.teacher.body
    without, given = body(noise, time, torch.full((4,), 3)), body(noise, time, label)
    guided = agent.teacher.under(label)(noise, 0.5)
    torch.testing.assert_close(guided, (without + 3 * (given - without)).float())
    torch.testing.assert_close(agent.denoiser.under(label)(noise, 0.5), given.float())


def test_bad_input():
    mdp, denoiser = world()
    with pytest.raises(ValueError, match=r"adds noise or clamps"):
        SFD(mdp, denoiser, solver="ancestral")
    with pytest.raises(ValueError, match="no guidance to absorb"):
        SFD(mdp, denoiser, absorb_guidance=True)
    with pytest.raises(FileNotFoundError, match=r"No tableau at there\.json"):
        SFD(mdp, denoiser, table="there.json")
    other = make_solver("euler", Schedule.uniform(DiscreteVP.linear(1000), 4))
    with pytest.raises(ValueError, match="is made for DiscreteVP"):
        SFD(mdp, denoiser, tableau=other)


def test_halvings_that_have_nothing_to_halve_are_refused():
    whole, chain = {"integer_times": True}, DiscreteVP.linear(100)
    mdp = DiffusionMDP(world()[0].target, chain, Schedule.uniform(chain, 4), no_reward)
    denoiser = Denoiser(Smooth(), chain)
    with pytest.raises(ValueError, match=r"no more than 100 steps there: take teacher_steps=128 "):
        ProgressiveDistillation(mdp, denoiser, teacher_steps=256, fine=whole)
    assert ProgressiveDistillation(mdp, denoiser, teacher_steps=128, fine=whole).halvings == 5
    every = mdp.with_schedule(Schedule.uniform(chain, 100))
    with pytest.raises(ValueError, match=r"no more than 100 steps there: take fewer steps"):
        ProgressiveDistillation(every, denoiser, teacher_steps=200, fine=whole)
    single = mdp.with_schedule(Schedule.karras(chain, 1))
    with pytest.raises(ValueError, match=r"does not split a step to time 0: take more steps"):
        ProgressiveDistillation(single, denoiser, fine={"solver": "ddim"})


def test_a_table_that_asks_nothing_and_one_for_an_agent_that_has_its_own_are_refused():
    mdp, denoiser = world()
    process = DiscreteVP.linear(1000)
    mdp = DiffusionMDP(mdp.target, process, Schedule.uniform(process, 4), reward=no_reward)
    denoiser = Denoiser(denoiser.body, process)
    table = make_solver("ddim", mdp.schedule)
    silent = table.replace(asked=np.zeros(table.steps, dtype=bool))
    with pytest.raises(ValueError, match="'ddim' never asks the network"):
        SFD(mdp, denoiser, tableau=silent)
    for kind in (ProgressiveDistillation, ConsistencyDistillation):
        with pytest.raises(ValueError, match="chooses its sampler by solver="):
            kind(mdp, denoiser, tableau=table)
    with pytest.raises(ValueError, match=r"The teacher .ancestral"):
        SFD(mdp, denoiser, solver="dpm-solver++-2m", fine={"solver": "ancestral"})
    with pytest.raises(ValueError, match=r"4 steps times a power of two.*; got 12"):
        ProgressiveDistillation(mdp, denoiser, teacher_steps=12)
    with pytest.raises(ValueError, match=r"halves DDIM's steps.*not 'ipndm"):
        ProgressiveDistillation(mdp, denoiser, solver="ipndm")
    with pytest.raises(ValueError, match=r"solver='consistency', not 'ddim'"):
        ConsistencyDistillation(mdp, denoiser, solver="ddim")
    for kind in (ProgressiveDistillation, ConsistencyDistillation):
        with pytest.raises(ValueError, match="needs real samples"):
            kind.without_data(denoiser, mdp.schedule, (2,), states="data")
    with pytest.warns(UserWarning, match="is no better than"):
        SFD(mdp, denoiser, **{**FEW, "fine": {"solver": "ddim", "scale": 1}}).learn()


@pytest.mark.parametrize("how", ["resume", "load"])
def test_a_halving_goes_on_with_its_own_rounds(how, tmp_path):
    mdp, denoiser = world()
    settings = {**FEW, "rounds": 2, "teacher_steps": 16}
    agent = learn_rounds(ProgressiveDistillation(mdp, denoiser, **settings), 3)
    agent.save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=r"/agent is in halving 2 of 2, of 2 rounds each; wi"):
        if how == "load":
            ProgressiveDistillation.load(tmp_path / "agent", mdp, body=Smooth(), rounds=4)
        else:
            settings["rounds"] = 4
            ProgressiveDistillation(*world(), **settings).resume(tmp_path / "agent")
