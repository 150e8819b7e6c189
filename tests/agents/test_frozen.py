"""Values do not change behind one's back, and building an agent changes nothing of the caller's."""

import dataclasses

import numpy as np
import pytest
import torch
from rounds import learn_rounds
from torch import nn

from fewstep.agents import (
    DODE,
    RDPO,
    SFT,
    SFTPG,
    SFTV,
    BehaviorCloning,
    Denoiser,
    ScheduleLearning,
    SolverLearning,
    Tableau,
)
from fewstep.agents.solvers import make_solver
from fewstep.agents.variance.learning import VarianceLearning
from fewstep.envs import VE, DiffusionMDP, DiffusionVectorEnv, DiscreteVP, Schedule, Target

PROCESS = DiscreteVP.linear(6, 0.1, 0.4)


def test_a_tableau_is_read_only_and_owns_its_arrays():
    given = {"times": np.array([2.0, 1.0, 0.0]), "scale": np.ones(2), "noise": np.zeros(2)}
    weights, anchors = np.eye(2), np.array([0, 1])
    table = Tableau("made up", PROCESS, weights=weights, anchors=anchors, **given)
    before = table.to_json()
    for array in (weights, anchors, *given.values()):
        array += 1
    assert table.to_json() == before
    names = [f.name for f in dataclasses.fields(Tableau)]
    arrays = [getattr(table, n) for n in names if isinstance(getattr(table, n), np.ndarray)]
    assert len(arrays) == 10
    sparse = table.sparse_weights
    for array in (*arrays, sparse.values, sparse.columns, sparse.starts, table.times[1:]):
        with pytest.raises(ValueError, match="read-only"):
            array += 5
    with pytest.raises(ValueError, match="read-only"):
        table.weights[0, 0] += 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.times = np.zeros(3)
    assert table.to_json() == before


def test_schedules_and_processes_keep_their_numbers():
    given = torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64)
    options = {"end": 0.0}
    schedule = Schedule(PROCESS, given, recipe=("uniform", options))
    table = make_solver("ddim", schedule)
    given[0], options["end"] = 5.0, 3.0
    schedule.times[1] = 3.0
    schedule.times.numpy()[1] = 3.0
    schedule.recipe[1]["end"] = 1.0
    assert schedule.times.tolist() == table.times.tolist() == [4.0, 2.0, 0.0]
    assert schedule.recipe == ("uniform", {"end": 0.0})
    for name in ("times", "process", "recipe"):
        with pytest.raises(AttributeError):
            setattr(schedule, name, None)

    betas = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    process = DiscreteVP(betas)
    betas[0] = process.betas[1] = process.abar[1] = 0.5
    assert process.betas.tolist() == [0.1, 0.2, 0.3]
    torch.testing.assert_close(process.abar, process.alpha(torch.arange(4.0)) ** 2)
    for name in ("betas", "abar"):
        with pytest.raises(AttributeError):
            setattr(process, name, betas)


class Inpainting(DiffusionMDP):
    """A decision process of a user's own."""


def test_a_decision_process_is_replaced_not_changed():
    target = Target.from_samples(np.random.default_rng(0).normal(size=(50, 2)))
    mdp = Inpainting(target, PROCESS, Schedule.uniform(PROCESS, 3), lambda x: x[:, 0])
    for name in ("target", "process", "schedule", "reward"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(mdp, name, getattr(mdp, name))
    other = mdp.with_reward(lambda x: x[:, 1])
    shorter = mdp.with_schedule(Schedule.uniform(PROCESS, 2))
    assert type(other) is type(shorter) is Inpainting
    x = torch.tensor([[1.0, 2.0]])
    assert [float(one.terminal_reward(x)) for one in (mdp, other, shorter)] == [1.0, 2.0, 1.0]
    assert [float(shorter.observe(x, j)["timestep"]) for j in range(3)] == [6.0, 3.0, 0.0]
    assert float(mdp.observe(x, 1)["timestep"]) == 4.0
    with pytest.raises(TypeError, match="reward must be callable"):
        mdp.with_reward(3)

    env = DiffusionVectorEnv(mdp, 1)
    env.reset(seed=0)
    env.reward = other.reward
    for _ in range(3):
        _, reward, *_ = env.step(x)
    assert float(reward) == 2.0
    assert mdp.terminal_reward(x) == 1.0


class Wave(nn.Module):
    """A network of images with a layer `out` for second heads, and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, sample, time):
        phase = 0.1 * time.to(sample).view(-1, 1, 1, 1)
        return self.out(self.drop(torch.sin(self.first(sample) + phase)))


EXECUTION = {"precision": "bf16", "channels_last": True, "compile": True}
NOISE = {"solver_options": {"last_std": 0.1}}
BUILDERS = {
    "cloning": lambda *where: BehaviorCloning(*where, **EXECUTION),
    "sft": lambda *where: SFT(*where, **EXECUTION, **NOISE),
    "sft-pg": lambda *where: SFTPG(*where, **EXECUTION, **NOISE),
    "sft-v": lambda *where: SFTV(*where, **EXECUTION, **NOISE),
    "dode": lambda *where: DODE(*where, batches=2, batch_size=4),
    "schedule": lambda *where: ScheduleLearning(*where, batches=1, batch_size=4),
    "solver": lambda *where: SolverLearning(
        *where, batches=1, batch_size=4, rounds=1, optimizer="adam", start="given"
    ),
    "rdpo": lambda *where: RDPO(*where),
    "gamma": lambda *where: VarianceLearning(*where, kind="gamma"),
    "sn": lambda *where: VarianceLearning(*where, kind="sn", batch_size=4),
}


def held(mdp, denoiser):
    """What the caller holds, and what is global."""
    weights = {name: (w.requires_grad, w.stride()) for name, w in denoiser.named_parameters()}
    return {
        "mdp": (mdp.target, mdp.process, mdp.schedule, mdp.reward),
        "flags": (denoiser.precision, denoiser.gamma, denoiser.head, denoiser.clip),
        "training": [module.training for module in denoiser.modules()],
        "compiled": [module._compiled_call_impl for module in denoiser.modules()],
        "weights": weights,
        "numbers": [w.tolist() for w in denoiser.parameters()],
        "threads": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "seeds": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


@pytest.mark.parametrize("name", BUILDERS)
def test_building_an_agent_changes_nothing_of_the_callers(name):
    samples = np.random.default_rng(0).normal(size=(60, 1, 8, 8)).clip(-1, 1)
    target = Target("blobs", samples, held_out=samples[:20])
    mdp = DiffusionMDP(target, PROCESS, Schedule.uniform(PROCESS, 5), lambda x: x.mean((1, 2, 3)))
    denoiser = Denoiser(Wave(), PROCESS, "sample")
    before = held(mdp, denoiser)
    agent = BUILDERS[name](DiffusionVectorEnv(mdp, 4), denoiser)
    assert held(mdp, denoiser) == before
    assert agent.mdp.schedule is mdp.schedule
    if "sft" in name:
        assert agent.mdp.reward is agent.critic


def test_training_leaves_the_precision_and_hands_over_what_it_learned():
    """`learn` changes the weights; how the body is run is the caller's again afterwards."""
    samples = np.random.default_rng(0).normal(size=(60, 1, 8, 8)).clip(-1, 1)
    mdp = DiffusionMDP(Target("blobs", samples), PROCESS, Schedule.uniform(PROCESS, 3))
    denoiser = Denoiser(Wave(), PROCESS, "sample")
    seen = []
    denoiser.body.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    weight = denoiser.body.first.weight.clone()
    agent = BehaviorCloning(mdp, denoiser, batch_size=8, precision="bf16")
    learn_rounds(agent, 2)
    assert seen == [True, True]
    assert denoiser.precision == "float32"
    assert not torch.equal(denoiser.body.first.weight, weight)
    learner = VarianceLearning(mdp, denoiser, kind="gamma", batch_size=8)
    assert denoiser.gamma is None
    learn_rounds(learner, 1)
    assert torch.equal(denoiser.gamma, learner.denoiser.gamma)


def test_a_process_of_noise_levels_shares_nothing_with_its_callers():
    level = torch.tensor(3.0, dtype=torch.float64)
    VE().sigma(level).add_(1)
    assert float(level) == 3.0
