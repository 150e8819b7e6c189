"""What the agents promise that distil a fine solver into the network: SFD, PD, CD."""

import copy

import pytest
import torch
from rounds import learn_rounds
from torch import nn

from fewstep.agents import SFD, CheckpointError, Denoiser
from fewstep.agents.solver_learning.distillation.teacher import make_teacher
from fewstep.agents.solvers import make_solver
from fewstep.envs import DiffusionMDP, DiscreteVP, RectifiedFlow, Schedule, Target
from fewstep.envs.mdp import no_reward

numeric = pytest.mark.numeric
FEW = {"batch_size": 16, "rounds": 5, "size": 16, "looks": 2, "learning_rate": 1e-3, "ema": 0.5}
AGENTS = {"sfd": (SFD, {})}


class Smooth(nn.Module):
    """A small network in float64, smooth in its sample and in its time, conditional on request."""

    def __init__(self, classes=None):
        super().__init__()
        source = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return nn.Parameter(torch.randn(*shape, generator=source, dtype=torch.float64))

        self.first, self.phase, self.last = drawn(2, 8), drawn(8), drawn(8, 2)
        self.embedding = drawn(classes + 1, 8) if classes else None

    def forward(self, sample, time, label=None):
        hidden = sample.double() @ self.first / 2 + (2 * time.double()).unsqueeze(1) * self.phase
        if label is not None:
            hidden = hidden + self.embedding[label] / 2
        return torch.tanh(hidden) @ self.last / 3


def cluster(n, seed):
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([0.2, 0.3]) + torch.tensor([0.5, -0.5])


def world(process=None, steps=4, prediction="flow", conditional=False, **ends):
    """A decision process and a denoiser, both small and smooth."""
    process = process or RectifiedFlow()
    target = Target.from_sampler(cluster, "Cluster", 300)
    if conditional:
        labels = torch.arange(300) % 3
        target = Target("Cluster", cluster(300, 0), labels=labels)
    schedule = Schedule.uniform(process, steps, **ends)
    mdp = DiffusionMDP(target, process, schedule, no_reward, conditional=conditional)
    known = {"classes": 3, "drops": True} if conditional else {}
    return mdp, Denoiser(Smooth(3 if conditional else None), process, prediction, **known)


def in_float64(monkeypatch):
    """Let noise come in float64, for gradients to many digits."""
    initial = DiffusionMDP.initial
    monkeypatch.setattr(DiffusionMDP, "initial", lambda *a, **k: initial(*a, **k).double())


def gradients_of(agent, monkeypatch):
    """The gradients at each optimizer step of a round, with the weights held."""
    seen = []

    def keep(*_):
        seen.append([weight.grad.clone() for weight in agent.denoiser.parameters()])

    monkeypatch.setattr(agent.optimizer, "step", keep)
    learn_rounds(agent, 1)
    return seen


def weights_of(denoiser):
    return torch.cat([weight.detach().flatten() for weight in denoiser.parameters()])


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
    fine = make_teacher(make_solver("euler", mdp.schedule), mdp.schedule, "dpm-solver++-3m", {}, 4)
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
    assert agent.fine.tableau.steps == 16
    steps = []
    agent.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    agent.learn()
    assert len(steps) == 5 * (3 if afs else 4)
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
    with pytest.raises(CheckpointError, match="another table"):
        SFD(there, copy.deepcopy(denoiser), solver="ddim", **FEW).resume(tmp_path / "agent")


@pytest.mark.parametrize("solver", ["heun", "unipc-2", "dpm-solver++-2m"])
def test_any_deterministic_table_is_a_student(solver):
    mdp, denoiser = world(end=0.01)
    agent = SFD(mdp, denoiser, solver=solver, **FEW)
    agent.learn()
    assert agent.done and set(agent.errors) == {"teacher", "given", "distilled", "returned"}


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
@pytest.mark.parametrize("conditional", [False, True])
def test_a_killed_training_goes_on_bit_for_bit(name, conditional, make, tmp_path):
    """From a checkpoint of any round, by a new agent or a loaded one, counters and all."""
    guided = {"conditional": True, "guidance": 2.0, "absorb_guidance": True} if conditional else {}
    whole = make(name, **guided)
    whole.learn()
    for rounds in (0, 2):
        first = make(name, **guided)
        learn_rounds(first, rounds)
        first.save(tmp_path / "agent")
        resumed = make(name, **guided)
        resumed.resume(tmp_path / "agent")
        body = Smooth(3 if guided else None)
        loaded = type(first).load(tmp_path / "agent", resumed.mdp, body=body)
        for agent in (resumed, loaded):
            agent.learn(reset_num_timesteps=False)
            assert torch.equal(
                weights_of(agent.sampling_denoiser), weights_of(whole.sampling_denoiser)
            )
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
    with pytest.raises(ValueError, match=r"The teacher .ancestral"):
        SFD(mdp, denoiser, solver="dpm-solver++-2m", fine={"solver": "ancestral"})
    with pytest.warns(UserWarning, match="is no better than"):
        SFD(mdp, denoiser, **{**FEW, "fine": {"solver": "ddim", "scale": 1}}).learn()
