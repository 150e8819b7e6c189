"""Agents act in their environment: they call its methods, obey its transition and its reward."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from fewstep.agents import SFT, SFTPG, SFTV, Denoiser
from fewstep.agents.denoisers.networks import ResidualMLP
from fewstep.agents.policy_gradient.buffer import Trajectories
from fewstep.agents.samplers.sampling import sample
from fewstep.agents.solvers import ddim, make_solver
from fewstep.common.optimisation import seeded
from fewstep.critics import IPMCritic, MLPCritic, MMDCritic, RewardCritic
from fewstep.envs import DiffusionMDP, DiffusionVectorEnv, Schedule, make_mdp
from fewstep.envs.mdp import no_reward

SMALL = {"batch_size": 16, "n_critic": 2, "n_generator": 2}
AGENTS = pytest.mark.parametrize("kind", [SFTPG, SFTV, SFT])


@dataclass(frozen=True, eq=False)
class Spied(DiffusionMDP):
    """Counts the calls of its methods, also those of what `with_reward` makes of it."""

    calls: Counter = field(default_factory=Counter)

    def initial(self, n, generator=None):
        self.calls["initial"] += n
        return super().initial(n, generator)

    def observe(self, sample, step):
        self.calls["observe"] += len(sample)
        return super().observe(sample, step)

    def transition(self, sample, action, step, draw=torch.randn_like):
        self.calls["transition"] += len(sample)
        return super().transition(sample, action, step, draw)

    def terminal_reward(self, sample):
        self.calls["terminal_reward"] += len(sample)
        return super().terminal_reward(sample)


@dataclass(frozen=True, eq=False)
class Shrinking(DiffusionMDP):
    """Its next state is half of the action."""

    def transition(self, sample, action, step, draw=torch.randn_like):
        return 0.5 * action


def made(kind, mdp):
    """The same decision process of another class."""
    return kind(mdp.target, mdp.process, mdp.schedule, mdp.reward)


@AGENTS
def test_a_spy_sees_every_step_of_every_round(kind, mdp, make_denoiser):
    spy = made(Spied, mdp)
    agent = kind(spy, make_denoiser(), **SMALL)
    for _ in range(3):
        agent.train_round()
    # 2 critic batches of 16. For theta SFT plays 2 new ones, SFT-V looks at every step of 2 kept
    # ones again; these alone are rewarded there.
    episodes = 3 * 16 * (4 if kind is SFT else 2)
    steps = 4 * 3 * 16 * (2 if kind is SFTPG else 4)
    assert spy.calls == {
        "initial": episodes,
        "observe": steps,
        "transition": steps,
        "terminal_reward": 3 * 16 * 2,
    }


@AGENTS
def test_another_transition_changes_what_is_learned(kind, mdp, make_denoiser):
    weights = []
    for environment in (mdp, made(Spied, mdp), made(Shrinking, mdp)):
        agent = kind(environment, make_denoiser(), **SMALL)
        agent.learn(3 * agent.timesteps_per_round)
        weights.append(torch.cat([w.detach().flatten() for w in agent.denoiser.parameters()]))
    plain, spied, shrunk = weights
    assert torch.equal(plain, spied)
    assert not torch.equal(plain, shrunk)


@dataclass(frozen=True, eq=False)
class Elsewhere(DiffusionMDP):
    """Its episodes begin far away."""

    def initial(self, n, generator=None):
        return super().initial(n, generator) + 50


@AGENTS
def test_samples_begin_where_the_environment_says(kind, mdp, make_denoiser, generator):
    here, there = (kind(made(cls, mdp), make_denoiser(), **SMALL) for cls in (Spied, Elsewhere))
    start, far = (
        agent.sample(5, generator=generator(), return_trajectory=True)[0] for agent in (here, there)
    )
    assert torch.equal(far, start + 50)
    plain = kind(mdp, make_denoiser(), **SMALL)
    assert torch.equal(
        plain.sample(5, generator=generator()), here.sample(5, generator=generator())
    )
    assert float(there.collect().states[0].mean()) > 40


def test_actions_are_kept_only_where_they_are_not_the_next_states(mdp, make_denoiser):
    for environment in (mdp, made(Spied, mdp)):
        assert SFTPG(environment, make_denoiser(), **SMALL).collect().actions is None
    kept = SFTPG(made(Shrinking, mdp), make_denoiser(), **SMALL, buffer="float16").collect()
    assert kept.actions.dtype == torch.float16
    assert torch.equal(kept.states[1:], 0.5 * kept.actions)


def test_a_buffer_knows_actions_from_before_the_first_that_differed(mdp):
    kept = Trajectories(3, 2, torch.device("cpu"))
    kept.begin(mdp)
    states = [torch.full((2, 1), float(j)) for j in range(4)]
    kept.keep(0, states[0])
    kept.keep(1, states[1], states[1])
    kept.keep(2, states[2], states[2] + 10)
    kept.keep(3, states[3], states[3])
    assert kept.actions[:, 0, 0].tolist() == [1, 12, 3]
    (piece,) = kept.pieces(torch.arange(6))
    assert piece.action[:, 0].tolist() == [1, 1, 12, 12, 3, 3]
    assert piece.sample[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 7}, {"buffer": "float16"}])
def test_the_first_ratio_is_1_in_any_environment(settings, mdp, make_denoiser):
    agent = SFTPG(made(Shrinking, mdp), make_denoiser(), **SMALL, clip_range=0.1, **settings)
    agent.will_log = True
    assert float(agent.train_round()["train/ratio_first_batch"]) == 1.0


# -- the reward ----------------------------------------------------------------------------------


def test_a_reward_of_the_environment_is_maximised(make_mdp, make_denoiser, reward):
    for environment in (make_mdp(reward=reward), DiffusionVectorEnv(make_mdp(reward=reward), 4)):
        agent = SFTPG(environment, make_denoiser(), **SMALL)
        assert isinstance(agent.critic, RewardCritic)
        assert agent.critic.baseline is not None
        assert agent.critic.reward is reward
    # The same as giving it to the agent.
    weights = []
    for mdp, settings in ((make_mdp(reward=reward), {}), (make_mdp(), {"critic": reward})):
        agent = SFTPG(mdp, make_denoiser(), **SMALL, **settings)
        agent.learn(2 * agent.timesteps_per_round)
        weights.append(torch.cat([w.detach().flatten() for w in agent.denoiser.parameters()]))
    assert torch.equal(*weights)


@AGENTS
def test_without_a_reward_of_its_own_a_critic_is_learned(kind, make_mdp, make_denoiser, reward):
    for given in (None, no_reward):
        agent = kind(make_mdp(reward=given), make_denoiser(), **SMALL)
        assert isinstance(agent.critic, IPMCritic)
        assert agent.mdp.reward is agent.critic
        other = make_mdp(reward=given).with_schedule(agent.mdp.schedule)
        assert not other.has_own_reward
    critic = IPMCritic(MLPCritic((2,), hidden=8), "none")
    assert kind(make_mdp(reward=reward), make_denoiser(), critic=critic).critic is critic


@AGENTS
def test_the_environments_own_reward_is_left_as_it_is(kind, make_mdp, make_denoiser):
    """Whether it learns from what it judges, or was learned before."""
    judge = MMDCritic(make_mdp().target.take(64))
    trained = IPMCritic(MLPCritic((2,), hidden=8), "none").requires_grad_(True)
    before = [weight.clone() for weight in trained.parameters()]
    for given in (judge, trained):
        mdp = make_mdp(reward=given)
        agent = kind(mdp, make_denoiser(), **SMALL)
        start = torch.cat([w.detach().flatten() for w in agent.denoiser.parameters()])
        agent.learn(2 * agent.timesteps_per_round)
        end = torch.cat([w.detach().flatten() for w in agent.denoiser.parameters()])
        assert not torch.equal(start, end)
        assert mdp.reward is given
    assert judge.reference is None
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_a_reward_without_a_gradient_is_for_sft_pg(make_mdp, make_denoiser):
    mdp = make_mdp(reward=lambda x: x.detach().numpy().sum(1).astype(np.float32))
    SFTPG(mdp, make_denoiser(), **SMALL).train_round()
    for kind in (SFT, SFTV):
        with pytest.raises(ValueError, match="train with SFTPG"):
            kind(mdp, make_denoiser(), **SMALL).train_round()


# -- inpainting ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return make_mdp("Digits", steps=4, inpaint="half")


def small(mdp):
    with seeded(0):
        return Denoiser(ResidualMLP(mdp.shape, hidden=16, blocks=1), mdp.process, "sample")


def known_are_real(samples, mdp):
    """Whether the upper halves of all samples are those of training samples."""
    real = mdp.target.samples[..., :4, :].flatten(1)
    return all(bool((real == one.flatten()).all(1).any()) for one in samples[..., :4, :])


@AGENTS
def test_trajectories_and_samples_of_an_agent_hold_the_known_pixels(kind, digits):
    agent = kind(digits, small(digits), **SMALL)
    assert known_are_real(agent.collect().states[-1], digits)
    agent.learn(2 * agent.timesteps_per_round)
    assert known_are_real(agent.sample(9), digits)
    states = agent.sample(3, return_trajectory=True)
    assert states.shape == (5, 3, 1, 8, 8)
    assert known_are_real(states[-1], digits)
    mine = torch.rand(3, 1, 8, 8)
    filled = agent.sample(3, known=mine)
    assert torch.equal(filled[..., :4, :], mine[..., :4, :])
    shorter = agent.sample(5, schedule=Schedule(digits.process, [1000, 400, 0]))
    assert known_are_real(shorter, digits)
    with pytest.raises(TypeError, match="no option 'known'"):
        SFTPG(make_mdp("Digits", steps=4), small(digits), **SMALL).sample(3, known=mine)


def test_a_value_gradient_moves_each_state_with_its_own_known_pixels(digits):
    agent = SFTV(digits, small(digits), **SMALL, micro_batch_size=5)
    trajectories = agent.collect()
    last = [
        episodes.transition(states, states, step)
        for step, episodes, states in trajectories.starts(1)
        if step == 3
    ]
    assert [len(part) for part in last] == [5, 5, 5, 1]
    assert known_are_real(torch.cat(last), digits)


def test_micro_batches_see_the_same_known_pixels(digits):
    whole, pieces = (
        SFTPG(digits, small(digits), **SMALL, micro_batch_size=size).collect().states
        for size in (None, 7)
    )
    torch.testing.assert_close(whole, pieces)
    assert known_are_real(pieces[-1], digits)


def test_chunks_of_samples_keep_their_own_known_pixels(digits, monkeypatch, generator):
    monkeypatch.setattr("fewstep.agents.samplers.sampling.CHUNK", 4)
    denoiser = small(digits)
    table = ddim(digits.schedule)
    mine = torch.rand(10, 1, 8, 8)
    found = sample(
        table, denoiser, 10, shape=(1, 8, 8), generator=generator(), mdp=digits, known=mine
    )
    assert torch.equal(found[..., :4, :], mine[..., :4, :])


def test_any_sampler_of_single_times_acts_there(digits, generator):
    denoiser = small(digits)
    for name in ("dpm-solver++-2m", "ipndm"):
        table = make_solver(name, digits.schedule, denoiser)
        found = sample(table, denoiser, 6, shape=(1, 8, 8), generator=generator(), mdp=digits)
        assert known_are_real(found, digits)
    table = make_solver("heun", digits.schedule, denoiser)
    with pytest.raises(ValueError, match="'heun' asks the network twice at one time"):
        sample(table, denoiser, 6, shape=(1, 8, 8), mdp=digits)
