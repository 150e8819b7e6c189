"""Samples that are neither vectors nor images: sequences (L, C), with a user's own networks."""

import numpy as np
import pytest
import torch
from rounds import learn_rounds
from stable_baselines3 import PPO
from torch import nn

from fewstep.agents import (
    DODE,
    SFT,
    SFTPG,
    BehaviorCloning,
    Denoiser,
    DenoiserPolicy,
    SolverPolicy,
)
from fewstep.agents.denoisers.networks import make_body
from fewstep.agents.solvers import make_solver
from fewstep.critics import IPMCritic, make_baseline, make_critic
from fewstep.envs import (
    DiffusionEnv,
    DiffusionMDP,
    DiffusionVectorEnv,
    DiscreteVP,
    SB3VecEnv,
    Schedule,
    Target,
)

SHAPE = (6, 3)
PROCESS = DiscreteVP.linear(8, 0.05, 0.5)


class Body(nn.Module):
    """A user's network over sequences; it insists on their shape and says nothing of it."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(SHAPE[1], SHAPE[1], 3, padding=1)

    def forward(self, sample, time):
        assert sample.shape[1:] == SHAPE
        assert time.shape == (len(sample),)
        return self.mix(sample.transpose(1, 2)).transpose(1, 2)


class Judge(nn.Module):
    """A user's critic network."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(18, 1)

    def forward(self, sample):
        assert sample.shape[1:] == SHAPE
        return self.out(sample.flatten(1)).squeeze(1)


@pytest.fixture
def mdp():
    samples = np.random.default_rng(0).normal(size=(64, *SHAPE)).cumsum(1) / 4
    return DiffusionMDP(
        Target("walks", samples),
        PROCESS,
        Schedule.uniform(PROCESS, 4),
        lambda x: -x[:, -1, 0].abs(),
    )


@pytest.fixture
def denoiser():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser(Body(), PROCESS)


def act(policy, observation, step, steps):
    """Run an episode of NumPy observations to its end."""
    state = None
    for _ in range(steps):
        action, state = policy.predict(observation, state)
        observation = step(action)
    return action


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++-2m"])
def test_a_policy_finishes_the_same_samples_in_every_shell(solver, mdp, denoiser, generator):
    table = make_solver(solver, mdp.schedule)
    policy = SolverPolicy(table, denoiser, shape=mdp.shape)
    noise = torch.randn(4, *SHAPE, generator=generator())
    with torch.no_grad():
        expected = table.sample(denoiser, noise).numpy()

    env = DiffusionVectorEnv(mdp, 4, autoreset_mode="SAME_STEP")
    first, _ = env.reset(seed=0, options={"sample": noise})
    end = act(policy, first, lambda a: env.step(torch.from_numpy(a))[0], 4)
    np.testing.assert_allclose(end, expected, rtol=1e-5, atol=1e-6)

    single = DiffusionEnv(mdp)
    first, _ = single.reset(seed=0, options={"sample": noise[2].numpy()})
    assert first["sample"].shape == SHAPE
    end = act(policy, first, lambda a: single.step(a)[0], 4)
    np.testing.assert_allclose(end, expected[2], rtol=1e-5, atol=1e-6)

    shell = SB3VecEnv(DiffusionVectorEnv(mdp, 4))
    shell.set_options({"sample": noise})
    end = act(policy, shell.reset(), lambda a: shell.step(a)[0], 4)
    np.testing.assert_allclose(end, expected, rtol=1e-5, atol=1e-6)


def test_without_a_shape_the_times_tell_one_sample_from_a_batch(mdp, denoiser):
    policy = SolverPolicy(make_solver("ddim", mdp.schedule), denoiser)
    for sample, time in ((SHAPE, (1,)), (SHAPE, ()), ((5, *SHAPE), (5,)), ((1, *SHAPE), (1, 1))):
        observation = {"sample": np.ones(sample, np.float32), "timestep": np.full(time, 8.0)}
        assert policy.predict(observation)[0].shape == sample
    unclear = {"sample": np.ones((1, *SHAPE), np.float32), "timestep": np.full(1, 8.0)}
    with pytest.raises(
        ValueError, match="one sample or a batch of one: give SolverPolicy the shape"
    ):
        policy.predict(unclear)
    told = SolverPolicy(policy.tableau, denoiser, shape=SHAPE)
    assert told.predict(unclear)[0].shape == (1, *SHAPE)
    with pytest.raises(ValueError, match=r"have shape \(6, 3\), the observation's \(6, 4\)"):
        told.predict({"sample": np.ones((6, 4), np.float32), "timestep": np.full(1, 8.0)})


def test_agents_train_on_them(mdp, denoiser):
    critic = IPMCritic(Judge(), baseline=make_baseline(SHAPE, 4))
    own = {"batch_size": 16, "n_critic": 1, "n_generator": 1}
    for agent in (
        BehaviorCloning(mdp, denoiser, batch_size=16),
        SFTPG(mdp, denoiser, critic=mdp.reward, **own),
        SFTPG(mdp, denoiser, critic=critic, **own),
        SFT(mdp, denoiser, critic=Judge(), **own),
        SFT(mdp, denoiser, **own),
        DODE(mdp, denoiser, solver="ddim", batches=2, batch_size=8, check_teacher=False),
    ):
        before = denoiser.body.mix.weight.clone()
        learn_rounds(agent, 1)
        assert torch.equal(denoiser.body.mix.weight, before) == isinstance(agent, DODE)
        assert agent.sample(5).shape == (5, *SHAPE)
        one, _ = agent.predict({"sample": np.zeros(SHAPE, np.float32), "timestep": np.full(1, 8.0)})
        assert one.shape == SHAPE


def test_sb3_trains_them(mdp, denoiser):
    table = make_solver("ancestral", mdp.schedule, variance="beta", last_std=0.05)
    env = SB3VecEnv(DiffusionVectorEnv(mdp, 8))
    kwargs = {"denoiser": denoiser, "tableau": table}
    model = PPO(
        DenoiserPolicy,
        env,
        n_steps=4,
        batch_size=32,
        n_epochs=1,
        policy_kwargs=kwargs,
        device="cpu",
    )
    before = denoiser.body.mix.weight.clone()
    model.learn(32)
    assert not torch.equal(denoiser.body.mix.weight, before)
    assert model.predict(env.reset())[0].shape == (8, *SHAPE)


def test_default_networks_read_them_as_vectors_and_pictures_are_refused(mdp):
    x = torch.ones(5, *SHAPE)
    assert make_body(SHAPE, 8)(x, torch.ones(5, dtype=torch.int64)).shape == x.shape
    assert make_critic(SHAPE)(x).shape == make_baseline(SHAPE, 4)(x, torch.zeros(5).long()).shape
    env = DiffusionVectorEnv(mdp, 2, render_mode="rgb_array")
    env.reset(seed=0)
    with pytest.raises(
        ValueError, match=r"\(6, 3\) have no picture: vectors \(D,\) have, and images"
    ):
        env.render()
