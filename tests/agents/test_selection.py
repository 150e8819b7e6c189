"""No learner returns something worse than what it was given, and each says what it returns."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from rounds import learn_rounds
from torch import nn

from fewstep.agents import (
    DODE,
    SFT,
    SFTPG,
    BehaviorCloning,
    Denoiser,
    ScheduleLearning,
    VarianceLearning,
)
from fewstep.agents.denoisers.exact import mixture
from fewstep.agents.denoisers.networks import ResidualMLP
from fewstep.agents.selection import best_of, coordinate_errors, is_better
from fewstep.agents.solver_learning.scheduling.amplification import (
    _Costs,
    _Products,
    adjoints,
    amplified_programmes,
)
from fewstep.agents.solver_learning.scheduling.rollout import path_of
from fewstep.agents.solvers import make_solver
from fewstep.common.optimisation import TrainingDivergedError
from fewstep.envs import VE, DiffusionMDP, DiscreteVP, Schedule
from fewstep.runs.cli import main

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:Distillation made"),
    # The teacher of a rough network may be no better than what it teaches.
    pytest.mark.filterwarnings("ignore:The teacher"),
]

VP, EDM = DiscreteVP.linear(1000), VE()


class Rough(nn.Module):
    """An exact noise prediction, and an error of high frequency in the sample and in the time.

    What an under-trained network has: the solver's order holds for no step that is affordable.
    """

    def __init__(self, body, size):
        super().__init__()
        self.body, self.size = body, size
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, sample, time):
        phase = 7 * (time.double() + 3).log().to(sample).unsqueeze(1)
        return self.body(sample, time) + self.size * torch.sin(5 * sample + phase) + self.shift


def network(process=VP, size=0.0, seed=0):
    """A denoiser of a mixture in the plane with an error, and the target."""
    return _network(process == VP, size, seed)


@functools.cache
def _network(discrete, size, seed):
    process = VP if discrete else EDM
    denoiser, target = mixture(process, dimension=2, components=3, seed=seed)
    return Denoiser(Rough(denoiser.body, size), process), target


def world(denoiser, target, schedule):
    return DiffusionMDP(target, denoiser.process, schedule, lambda sample: -sample.norm(dim=1))


def given_schedule(process, solver, steps=6):
    to_t_min = solver == "dpm-solver++-2m"
    if process == EDM:
        return Schedule.karras(process, steps, append_zero=not to_t_min)
    return Schedule.uniform(process, steps, end=process.t_min if to_t_min else 0.0)


# -- the choice ------------------------------------------------------------------------------------


def test_errors_are_mean_squares_of_a_coordinate():
    one, other = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    other[1] *= 2
    other[2, 0, 0] = 0
    assert coordinate_errors(one, other).tolist() == [1.0, 4.0, 0.5]


def test_better_is_in_the_mean_and_not_by_chance():
    # As many above as below 0, standard deviation 1 / 20: the standard error is 1 / 400.
    gain = torch.tensor([-1.0, 1.0] * 200, dtype=torch.float64)
    gain = gain / gain.std() / 20
    before = torch.ones(400, dtype=torch.float64)
    for mean, better in ((0.0026, True), (0.0024, False), (-1.0, False)):
        assert is_better(before - gain - mean, before) == better
    # Two noises in 400 make up all the uncertainty.
    gain = torch.full((400,), 0.001, dtype=torch.float64)
    gain[:179], gain[0], gain[399] = -0.001, -0.8, 0.9
    assert is_better(before - gain, before)  # 221 of 400
    gain[1:181] = -0.001
    assert not is_better(before - gain, before)  # 219
    gain[1:], gain[0] = 0.001, -0.8
    assert not is_better(before - gain, before)  # nearly all are better, but not the mean
    bad = before.clone()
    bad[3] = math.nan
    assert is_better(before, bad) and not is_better(bad, before) and not is_better(bad, bad)


def test_the_least_of_the_better_ones_is_kept():
    ones = torch.ones(10, dtype=torch.float64)
    errors = {"given": ones, "a": 0.5 * ones, "b": 0.2 * ones, "c": ones * math.inf}
    assert best_of(errors) == "b"
    assert best_of({"given": ones, "a": ones}) == "given"
    assert best_of({"given": ones}) == "given"


# -- learners --------------------------------------------------------------------------------------

FEW = {"batch_size": 50, "scale": 5, "check_teacher": False}
STAGE_ONE = {**FEW, "schedule_rounds": 6, "tuning_rounds": 0}


def fresh_errors(agent, tableau, denoiser):
    """Errors on noise that the agent never saw, to its own teacher."""
    generator = torch.Generator().manual_seed(4321)
    noise = agent.mdp.initial(1000, generator)
    original = getattr(agent, "_original", agent.denoiser)
    with torch.no_grad():
        goal = agent.teacher.states(original, noise)[-1]
        return coordinate_errors(tableau.sample(denoiser, noise), goal)


def assert_no_worse(agent, given):
    """On fresh noise: no worse by more than three standard errors of the difference."""
    before = fresh_errors(agent, given, getattr(agent, "_original", agent.denoiser))
    after = fresh_errors(agent, agent.tableau, agent.sampling_denoiser)
    change = after - before
    assert float(change.mean()) <= 3 * float(change.std()) / math.sqrt(len(change))
    assert agent.errors["returned"] == agent.errors[agent.returned]
    return float(after.mean() / before.mean())


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.0, 0.1])
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++-2m"])
@pytest.mark.parametrize("process", [VP, EDM], ids=["VP", "VE"])
def test_schedule_learning_returns_nothing_worse(process, solver, size):
    """Exact networks and rough ones: before, the default start was far worse on the latter."""
    for seed in range(3):
        denoiser, target = network(process, size, seed)
        schedule = given_schedule(process, solver)
        agent = ScheduleLearning(
            world(denoiser, target, schedule), denoiser, solver=solver, seed=seed, **STAGE_ONE
        )
        agent.learn()
        ratio = assert_no_worse(agent, make_solver(solver, schedule))
        assert agent.returned in ("given", "programme", "learned")
        assert (ratio == 1.0) == (agent.returned == "given")
        assert agent.verdict.startswith("Returned, as the best on held-out noise: the")
        if agent.returned == "given":
            assert agent.schedule == schedule
            assert agent.tableau.to_json() == make_solver(solver, schedule).to_json()


def test_a_stage_two_of_no_use_leaves_the_network_as_it_was():
    denoiser, target = network(VP, 0.1)
    denoiser = copy.deepcopy(denoiser)
    before = {name: w.clone() for name, w in denoiser.body.state_dict().items()}
    agent = ScheduleLearning(
        world(denoiser, target, given_schedule(VP, "ddim")),
        denoiser,
        solver="ddim",
        start="environment",
        tuning_learning_rate=3,
        **{**FEW, "schedule_rounds": 0, "tuning_rounds": 60, "tuning_batch_size": 30},
    )
    agent.learn()
    assert not agent.tuned and agent.returned == "given"
    assert agent.errors["tuned"] > agent.errors["returned"] == agent.errors["given"]
    for module in (agent.denoiser, agent.sampling_denoiser):
        for name, weight in module.body.state_dict().items():
            assert torch.equal(weight, before[name])
    assert_no_worse(agent, agent.starting_tableau(denoiser))


def test_the_target_of_data_says_that_nothing_was_compared():
    denoiser, target = network()
    agent = ScheduleLearning(
        world(denoiser, target, given_schedule(VP, "ddim")),
        denoiser,
        solver="ddim",
        target="data",
        collapse=0.0,
        **STAGE_ONE,
    )
    agent.learn()
    assert agent.returned == "learned"
    assert agent.verdict.startswith("Returned without comparison, as target='data' asks")


@pytest.mark.parametrize("size", [0.0, 0.1])
def test_d_ode_returns_nothing_worse(size):
    """The fit is the first round of the refinement."""
    for seed in range(3):
        denoiser, target = network(VP, size, seed)
        mdp = world(denoiser, target, given_schedule(VP, "dpm-solver++-2m"))
        settings = {**FEW, "refine": "end-to-end", "refine_steps": 1, "batches": 2}
        agent = DODE(mdp, denoiser, seed=seed, **settings)
        for rounds in (1, 2):
            learn_rounds(agent, rounds, reset_num_timesteps=False)
            assert agent.returned in ("given", "distilled", "refined")[: rounds + 1]
            assert agent.errors["returned"] == agent.errors[agent.returned]
            assert_no_worse(agent, agent.base)


def test_a_fit_to_misplaced_states_is_not_returned():
    """The teacher's states of other times are no goals: the fit is worse, and the base is kept."""
    denoiser, target = network()
    mdp = world(denoiser, target, Schedule.karras(VP, 8, append_zero=False))
    agent = DODE(mdp, denoiser, teacher="ddim", **FEW)
    # All but the end where the first step should lead.
    first, *_, last = agent.teacher.targets
    targets = (first,) * (len(agent.teacher.targets) - 1)
    agent.pool.teacher = dataclasses.replace(agent.teacher, targets=(*targets, last))
    with pytest.warns(UserWarning, match=r"Distillation made ddim no better, and it is kept"):
        agent.learn()
    assert agent.returned == "given" and "base solver" in agent.verdict
    assert agent.tableau.to_json() == agent.base.to_json()
    assert agent.errors["distilled"] > agent.errors["given"] == agent.errors["returned"]


@pytest.mark.parametrize("kind", ["gamma", "sn"])
def test_variance_learning_returns_nothing_worse(kind):
    """From few samples, after a long training: what there was is better, and stays."""
    process = DiscreteVP([0.05, 0.2, 0.4, 0.6])
    denoiser, target = mixture(process, dimension=2, components=3)
    denoiser = Denoiser(Shown(denoiser.body), process, sigma_data=target.std)
    mdp = world(denoiser, target, Schedule.uniform(process, 4))
    settings = {"kind": kind, "hidden": 16, "rounds": 60}
    long = VarianceLearning(
        mdp,
        denoiser,
        batch_size=500,
        samples_per_time=5000,
        learning_rate=1e-2,
        **settings,
    )
    long.learn()
    assert long.returned == "learned"
    assert long.errors["returned"] == long.errors["learned"] < long.errors["given"]
    good = known(denoiser)
    short = VarianceLearning(
        mdp,
        denoiser,
        batch_size=4,
        samples_per_time=1,
        learning_rate=1,
        seed=1,
        **settings,
    )
    short.learn(5 * short.timesteps_per_round)
    assert short.returned == "given" and short.errors["returned"] == short.errors["given"]
    for ours, theirs in zip(known(denoiser), good, strict=True):
        assert torch.equal(ours, theirs)


class Shown(nn.Module):
    """An exact body that shows what its last layer reads."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact
        self.out = nn.Linear(4, 2, bias=False)
        self.out.weight.data = torch.eye(4)[2:]

    def forward(self, sample, time):
        return self.out(torch.cat([sample, self.exact(sample, time)], dim=1))


def known(denoiser):
    """Copies of what a variance is made of."""
    parts = list(denoiser.head.parameters()) if denoiser.head is not None else [denoiser.gamma]
    return [part.detach().clone() for part in parts]


# -- resuming --------------------------------------------------------------------------------------


def test_the_best_network_survives_an_interruption(tmp_path):
    """Judged after 50 updates; steps that grow worse later."""

    def make():
        torch.manual_seed(0)
        denoiser = Denoiser(ResidualMLP((2,), 16, 1), VP)
        settings = {"schedule_rounds": 0, "tuning_rounds": 120, "tuning_batch_size": 20}
        return ScheduleLearning(
            world(denoiser, network()[1], given_schedule(VP, "ddim")),
            denoiser,
            solver="ddim",
            start="environment",
            tuning_learning_rate=1e-2,
            **{**FEW, **settings},
        )

    whole, path = make(), tmp_path / "agent"
    learn_rounds(whole, 75)
    whole.save(path)
    whole.learn(reset_num_timesteps=False)
    resumed = ScheduleLearning.load(path, whole.mdp)
    resumed.learn(reset_num_timesteps=False)
    assert resumed.errors == whole.errors and resumed.tuned == whole.tuned
    for ours, theirs in zip(
        resumed.sampling_denoiser.parameters(), whole.sampling_denoiser.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


# -- the programme that sees the end ---------------------------------------------------------------


def test_the_adjoints_are_those_of_the_flow():
    """Of N(0, s^2) the flow from level l_j to l shrinks by sqrt((s^2 + l^2) / (s^2 + l_j^2))."""
    std = 0.5
    denoiser, _ = mixture(EDM, components=1, dimension=2, std=std)
    levels = torch.logspace(1.9, -2, 1000, dtype=torch.float64)
    table = make_solver("euler", Schedule(EDM, levels))
    noise = 80 * torch.randn(3, 2, dtype=torch.float64)
    run = path_of(table, denoiser, noise)
    end = torch.tensor([[1.0, -1.0]] * 3, dtype=torch.float64)
    ours = adjoints(run, table.times, denoiser, end)
    shrinks = ((std**2 + levels[-1] ** 2) / (std**2 + levels**2)).sqrt()
    expected = shrinks[None, :, None] * end[:, None]
    # Euler's steps of h = 0.009 in the level's logarithm err by at most h / 2 in relation.
    torch.testing.assert_close(ours, expected, rtol=0.005, atol=0)


@pytest.mark.parametrize("output", ["epsilon", "sample"])
def test_the_costs_are_those_of_the_solver_s_jumps(output):
    """Against the solver itself, on triples of nodes of a linear network's trajectories."""
    denoiser, _ = network(EDM, 0.1)
    denoiser = copy.deepcopy(denoiser).double()
    grid = Schedule(EDM, [80.0, 30.0, 11.0, 4.0, 1.5, 0.5, 0.1])
    teacher = make_solver("euler", grid)
    noise = 80 * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = path_of(teacher, denoiser, noise)
    costs = _Costs(7, True)
    adjoint = torch.randn(5, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    costs.add(run.levels, output, _Products.of(run, adjoint), 1.0)
    for h, i, j in ((0, 1, 2), (1, 2, 4), (0, 3, 5)):
        start, slope = run.states[i], (run.states[i] - run.outputs[i]) / run.levels[i]
        earlier = (run.states[h] - run.outputs[h]) / run.levels[h]
        level = run.levels
        if output == "epsilon":  # Adams-Bashforth in the level
            r = (level[j] - level[i]) / (level[i] - level[h])
            end = start + (level[j] - level[i]) * (slope + r / 2 * (slope - earlier))
        else:  # DPM-Solver++ 2M, MATH.md 1.6
            r0 = (level[h] / level[i]).log() / (level[i] / level[j]).log()
            hat = (1 + 1 / (2 * r0)) * run.outputs[i] - run.outputs[h] / (2 * r0)
            end = level[j] / level[i] * start + (1 - level[j] / level[i]) * hat
        missed = (adjoint[:, j] * (end - run.states[j])).sum(1).square().mean()
        assert costs.second[h, i, j] == pytest.approx(float(missed), rel=1e-9)
    one = run.states[1] + (level[3] - level[1]) / level[1] * (run.states[1] - run.outputs[1])
    missed = (adjoint[:, 3] * (one - run.states[3])).sum(1).square().mean()
    assert costs.first[1, 3] == pytest.approx(float(missed), rel=1e-9)
    # The cheapest of all paths of five nodes.
    orders = [1, 2, 2, 1]

    def cost(path):
        total = costs.first[path[0], path[1]]
        for h, i, j, order in zip(path, path[1:], path[2:], orders[1:], strict=False):
            total += costs.second[h, i, j] if order > 1 else costs.first[i, j]
        return total

    paths = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), 3)]
    assert cost(costs.cheapest(orders)) == pytest.approx(min(map(cost, paths)), rel=1e-12)


def test_a_programme_that_sees_the_end_leaves_the_noisy_levels_alone():
    """An error at a level of 80 shrinks a hundredfold: few of the nodes belong there."""
    denoiser, _ = network(EDM, 0.1)
    grid = Schedule.karras(EDM, 80, append_zero=False)
    noise = EDM.prior_sample((200, 2), torch.Generator().manual_seed(0), t=EDM.t_max)
    for levels in amplified_programmes(
        make_solver("dpm-solver-2m", grid),
        "epsilon",
        denoiser,
        noise,
        [1] * 9,
        torch.Generator().manual_seed(1),
    ):
        assert len(levels) == 10 and (levels.diff() < 0).all()
        assert int((levels > 10).sum()) <= 5


def test_how_many_trajectories_are_stored_does_not_change_what_the_programme_finds(monkeypatch):
    """One at a time is no reason to take it for the median one."""
    denoiser, _ = network(EDM, 0.1)
    teacher = make_solver("dpm-solver-2m", Schedule.karras(EDM, 30, append_zero=False))
    noise = EDM.prior_sample((60, 2), torch.Generator().manual_seed(0), t=EDM.t_max)
    answers = []
    for stored in (2**22, 1):
        where = "fewstep.agents.solver_learning.scheduling.rollout.STORED_NUMBERS"
        monkeypatch.setattr(where, stored)
        signs = torch.Generator().manual_seed(1)
        answers.append(
            amplified_programmes(teacher, "sample", denoiser, noise, [1, 2, 2, 2], signs)
        )
    assert not torch.equal(*answers[0])
    for whole, apart in zip(*answers, strict=True):
        torch.testing.assert_close(apart, whole, rtol=1e-12, atol=0)


# -- rates that explode ----------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    return Denoiser(ResidualMLP((2,), 16, 1), VP)


EXPLODING = {
    "levels": lambda mdp: ScheduleLearning(
        mdp, tiny(), schedule_rounds=5, schedule_learning_rate=1e30, **FEW
    ),
    "levels, sigma": lambda mdp: ScheduleLearning(
        mdp, tiny(), space="sigma", start="karras", schedule_learning_rate=1e30, **FEW
    ),
    "levels, eq14": lambda mdp: ScheduleLearning(
        mdp, tiny(), solver="ddim", gradient="eq14", schedule_learning_rate=1e30, **FEW
    ),
    "tuning": lambda mdp: ScheduleLearning(
        mdp, tiny(), schedule_rounds=0, start="environment", tuning_learning_rate=1e30, **FEW
    ),
    "cloning": lambda mdp: BehaviorCloning(mdp, tiny(), learning_rate=1e30),
    "sft-pg": lambda mdp: SFTPG(mdp, tiny(), learning_rate=1e30, batch_size=16, minibatch_size=16),
    "sft": lambda mdp: SFT(mdp, tiny(), learning_rate=1e30, batch_size=16),
    "variance": lambda mdp: VarianceLearning(mdp, tiny(), kind="sn", learning_rate=1e30),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_absurd_rates_end_in_one_sentence(name):
    _, target = network()
    mdp = world(tiny(), target, Schedule.trailing(VP, 4))
    agent = EXPLODING[name](mdp)
    with pytest.raises(TrainingDivergedError, match=r"non-finite|diverged.*schedule_learning_rate"):
        learn_rounds(agent, agent.budget or 30)


def test_the_command_ends_with_one_sentence_and_2(tmp_path, capsys):
    flags = ["--env", "SwissRoll", "--steps", "4", "--pretrain.rounds", "2", "--batch-size", "20"]
    flags += ["--evaluation-samples", "200", "--evaluations", "1"]
    flags += ["--schedule-learning-rate", "1e30", "--log-dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--agent", "schedule", *flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err  # among the progress bars
    assert said.count("fewstep: ") - said.count("fewstep: warning: ") == 1
    assert "fewstep: Schedule learning diverged: after update 1" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("scale", "misleads"), [(2, True), (60, False)])
def test_a_teacher_that_errs_as_much_as_what_it_taught_is_named(scale, misleads):
    process = DiscreteVP.linear(1000)
    denoiser, _ = mixture(process, dimension=2)
    schedule = Schedule.uniform(process, 5)
    agent = DODE.without_data(
        denoiser, schedule, (2,), solver="ddim", form="all", scale=scale, batch_size=200, seed=1
    )
    agent.learn()
    assert (agent.errors["teacher"] > agent.errors["returned"] / 4) == misleads
    assert ("take a larger scale" in agent.verdict) == misleads
