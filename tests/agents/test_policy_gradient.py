"""Theorem 4.1 (MATH.md S.2): score function, pathwise gradient and closed form are one gradient.

The chain is linear and Gaussian and f quadratic, so E f(x_0) follows from propagating mean and
covariance; autograd of that expression is the closed form. All of it is float64.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fewstep.agents import SFT, SFTPG, SFTV, Denoiser
from fewstep.agents.policy_gradient.buffer import Trajectories
from fewstep.agents.samplers.gaussian import GaussianChain
from fewstep.agents.solvers import ancestral
from fewstep.envs import DiffusionMDP, Schedule

pytestmark = pytest.mark.numeric

CURVATURE = torch.tensor([[-1.0, 0.4], [0.4, -0.5]], dtype=torch.float64)
SLOPE = torch.tensor([1.5, -1.0], dtype=torch.float64)


class Linear(nn.Module):
    """eps(x, time) = (1 + time / 4) (A x + b)."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[0.5, 0.3], [-0.2, 0.7]], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.4, -0.3], dtype=torch.float64))

    def forward(self, sample, time):
        factor = 1 + time.to(sample.dtype) / 4
        return factor.unsqueeze(-1) * (sample @ self.A.T + self.b)


def quadratic(sample):
    curvature, slope = CURVATURE.to(sample), SLOPE.to(sample)
    return ((sample @ curvature) * sample).sum(1) + sample @ slope


@pytest.fixture
def chain(process):
    schedule = Schedule.uniform(process, 4)
    denoiser = Denoiser(Linear(), process)
    return GaussianChain(denoiser, ancestral(schedule, "beta"), learn_std=True).double()


@dataclass(frozen=True, eq=False)
class Squeezed(DiffusionMDP):
    """A decision process that takes each action to a smaller and shifted one, with noise on it."""

    def transition(self, sample, action, step, draw=torch.randn_like):
        return 0.8 * action + 0.1 + 0.3 * draw(action)


# Of the transition x_s = factor action + shift + std z.
TRANSITIONS = {DiffusionMDP: (1.0, 0.0, 0.0), Squeezed: (0.8, 0.1, 0.3)}


def expected_reward(chain, process, transition=(1.0, 0.0, 0.0)):
    """E f(x_0) for the action (x_t - beta e / sigma) / sqrt(1 - beta) + s z."""
    factor, shift, std = transition
    body = chain.denoiser.body
    mean = torch.zeros(2, dtype=torch.float64)
    covariance = torch.eye(2, dtype=torch.float64)
    abar = (1 - process.betas).cumprod(0)
    for step, n in enumerate(reversed(range(4))):
        beta = process.betas[n]
        push = -beta / (1 - abar[n]).sqrt() * (1 + n / 4)
        matrix = (torch.eye(2, dtype=torch.float64) + push * body.A) / (1 - beta).sqrt()
        mean = matrix @ mean + push * body.b / (1 - beta).sqrt()
        noise = torch.eye(2, dtype=torch.float64) * (2 * chain.log_std[step]).exp()
        covariance = factor**2 * (matrix @ covariance @ matrix.T + noise)
        covariance = covariance + std**2 * torch.eye(2, dtype=torch.float64)
        mean = factor * mean + shift
    return (CURVATURE * covariance).sum() + mean @ CURVATURE @ mean + SLOPE @ mean


def gradient(value, module):
    wanted = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, wanted)])


def score_function(chain, states, advantage):
    """Mean over trajectories of sum_j A_j grad log p, with A of shape (K, N)."""
    logs = [chain.log_density(states[j + 1], states[j], j) for j in range(chain.steps)]
    return gradient((advantage * torch.stack(logs)).sum(0).mean(), chain)


def batches(chain, generator, estimate, count=40, size=4000):
    """Independent estimates: their mean and its standard error."""
    rng, values = generator(5), []
    for _ in range(count):
        values.append(estimate(torch.randn(size, 2, generator=rng, dtype=torch.float64), rng))
    values = torch.stack(values)
    return values.mean(0), values.std(0) / count**0.5


def assert_agrees(estimate, exact, sharpness):
    mean, error = estimate
    assert ((mean - exact).abs() <= 4 * error).all(), (mean, exact, error)
    # An estimate that could not tell a wrong answer from a right one would prove nothing.
    assert (error < sharpness * exact.norm()).all(), (error, exact)


def test_policy_pathwise_and_closed_form_gradients_agree(chain, process, play, generator):
    exact = gradient(expected_reward(chain, process), chain)
    assert exact.abs().min() > 0.05

    def by_score(noise, rng):
        with torch.no_grad():
            states = play(chain, noise, rng)
        reward = quadratic(states[-1])
        return score_function(chain, states, reward.expand(chain.steps, -1))

    def by_path(noise, rng):
        return gradient(quadratic(play(chain, noise, rng)[-1]).mean(), chain)

    assert_agrees(batches(chain, generator, by_score), exact, sharpness=0.05)
    assert_agrees(batches(chain, generator, by_path), exact, sharpness=0.01)


def test_any_baseline_leaves_the_expectation_unchanged(chain, play, generator):
    """S.4: E[V(x_t, t) grad log p(x_s | x_t)] = 0, whatever V; but not if V saw the next state."""
    rng = generator(1)
    direction = torch.randn(4, 2, 1, generator=rng, dtype=torch.float64)
    offset = 3 * torch.randn(4, 1, generator=rng, dtype=torch.float64)

    def contribution(first):
        def estimate(noise, rng):
            with torch.no_grad():
                states = play(chain, noise, rng)
                seen = states[first : first + chain.steps]
                values = 3 * torch.sin(2 * seen @ direction).squeeze(-1) + offset
            return score_function(chain, states, values)

        return batches(chain, generator, estimate)

    mean, error = contribution(0)
    assert (mean.abs() <= 4 * error).all(), (mean, error)
    mean, error = contribution(1)
    assert (mean.abs() > 8 * error).any()


class StubCritic:
    """The quadratic f, never learning, with a baseline that is no value function."""

    def __init__(self, baseline=0.0):
        self.baseline = baseline

    def __call__(self, sample):
        return quadratic(sample)

    def value(self, states, steps=None):
        steps = torch.arange(len(states)) if steps is None else steps
        return self.baseline * torch.sin(states.sum(-1) + steps.unsqueeze(1))

    def update(self, real, fake, states=None, steps=None):
        self.states, self.steps, self.fake = states, steps, fake
        return {"critic_fake": self(fake).mean()}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def agent_gradients(agent, rounds):
    """What the agent hands to Adam each round, while a rate of 0 keeps theta where it is."""
    values = []
    for _ in range(rounds):
        agent.train_round()
        values.append(
            torch.cat([p.grad.flatten() for p in agent.optimizer.param_groups[0]["params"]])
        )
    values = torch.stack(values)
    return values.mean(0), values.std(0) / rounds**0.5


@pytest.fixture
def settings():
    return {"batch_size": 4000, "n_critic": 1, "n_generator": 1, "learning_rate": 0.0}


@pytest.mark.parametrize("kind", TRANSITIONS)
@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_sft_pg_descends_that_gradient(clip_range, kind, chain, mdp, process, settings):
    """In an environment of other transitions that of the action's density, not the next state's."""
    agent = SFTPG(
        kind(mdp.target, process, mdp.schedule),
        Denoiser(Linear().float(), process),
        critic=StubCritic(baseline=2.0),
        max_grad_norm=1e9,
        gae_lambda=1,
        normalize_advantage=False,
        learn_std=True,
        clip_range=clip_range,
        **settings,
    )
    # The loss is a mean over transitions, the theorem has a sum over the K steps.
    exact = -gradient(expected_reward(chain, process, TRANSITIONS[kind]), chain) / 4
    assert_agrees(agent_gradients(agent, rounds=40), order_as(agent, exact), sharpness=0.05)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_sft_descends_that_gradient(kind, chain, mdp, process, settings):
    """In an environment of other transitions through them."""
    agent = SFT(
        kind(mdp.target, process, mdp.schedule),
        Denoiser(Linear().float(), process),
        critic=StubCritic(),
        max_grad_norm=1e9,
        learn_std=True,
        **settings,
    )
    exact = -gradient(expected_reward(chain, process, TRANSITIONS[kind]), chain)
    assert_agrees(agent_gradients(agent, rounds=40), order_as(agent, exact), sharpness=0.02)


class ValueCritic(StubCritic):
    """The exact value of the chain's states, in an environment of these transitions."""

    def __init__(self, chain, process, transition):
        super().__init__()
        self.chain, self.process, self.transition = chain, process, transition

    def value(self, states, steps):
        """V by propagating mean and covariance from each state; (1, N) for one row of states."""
        (factor, shift, std), betas = self.transition, self.process.betas
        body, abar = self.chain.denoiser.body, (1 - betas).cumprod(0)
        eye = torch.eye(2, dtype=torch.float64)
        mean, covariance = states[0].double(), torch.zeros(2, 2, dtype=torch.float64)
        for step in range(int(steps[0]), 4):
            n = 3 - step
            beta = betas[n]
            push = -beta / (1 - abar[n]).sqrt() * (1 + n / 4)
            matrix = factor * (eye + push * body.A.detach()) / (1 - beta).sqrt()
            bias = factor * push * body.b.detach() / (1 - beta).sqrt() + shift
            noise = (factor**2 * (2 * self.chain.log_std.detach()[step]).exp() + std**2) * eye
            mean = mean @ matrix.T + bias
            covariance = matrix @ covariance @ matrix.T + noise
        value = ((mean @ CURVATURE) * mean).sum(1) + mean @ SLOPE + (CURVATURE * covariance).sum()
        return value[None].to(states)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_sft_v_descends_that_gradient_where_its_value_is_exact(kind, chain, mdp, process, settings):
    """Step by step: the sum of the K one-step gradients is the whole one."""
    agent = SFTV(
        kind(mdp.target, process, mdp.schedule),
        Denoiser(Linear().float(), process),
        critic=ValueCritic(chain, process, TRANSITIONS[kind]),
        max_grad_norm=1e9,
        learn_std=True,
        **settings,
    )
    # The loss is a mean over the K steps, the theorem has a sum.
    exact = -gradient(expected_reward(chain, process, TRANSITIONS[kind]), chain) / 4
    assert_agrees(agent_gradients(agent, rounds=40), order_as(agent, exact), sharpness=0.02)


def order_as(agent, exact):
    """Check that the agent trains what the chain has: log_std (4), A (4), b (2)."""
    shapes = [tuple(p.shape) for p in agent.optimizer.param_groups[0]["params"]]
    assert shapes == [(4,), (2, 2), (2,)]
    return exact


def make_pg(mdp, make_denoiser, **changes):
    return SFTPG(
        mdp,
        make_denoiser(),
        critic=StubCritic(baseline=2.0),
        batch_size=8,
        n_critic=2,
        normalize_advantage=False,
        **changes,
    )


def kept(agent, states):
    """Put states (K + 1, M, *shape) into a buffer of the agent's."""
    trajectories = Trajectories(len(states) - 1, states.shape[1], agent.device)
    trajectories.begin(agent.mdp)
    for step, sample in enumerate(states):
        trajectories.keep(step, sample)
    return trajectories


def test_advantages_with_lambda_1_are_reward_minus_value(mdp, make_denoiser, generator):
    agent = make_pg(mdp, make_denoiser, gae_lambda=1)
    states = torch.randn(5, 6, 2, generator=generator())
    expected = quadratic(states[-1]) - agent.critic.value(states[:-1])
    torch.testing.assert_close(agent.advantages(kept(agent, states)), expected)


@pytest.mark.parametrize("lam", [0.0, 0.6, 0.95])
def test_advantages_below_lambda_1_are_generalised_ones(lam, mdp, make_denoiser, generator):
    """Sum of lambda^i delta_{j+i}, delta_j = V_{j+1} - V_j, with V after the last step f(x_0)."""
    agent = make_pg(mdp, make_denoiser, gae_lambda=lam)
    states = torch.randn(5, 6, 2, generator=generator())
    values = [*agent.critic.value(states[:-1]), quadratic(states[-1])]
    expected = torch.zeros(4, 6)
    for j in range(4):
        for i in range(j, 4):
            expected[j] += lam ** (i - j) * (values[i + 1] - values[i])
    torch.testing.assert_close(agent.advantages(kept(agent, states)), expected)


def test_the_baseline_sees_the_state_before_the_step(mdp, make_denoiser):
    agent = make_pg(mdp, make_denoiser, gae_lambda=1)
    trajectories = agent.collect()
    agent.train_critic(trajectories)
    buffer = trajectories.states
    assert buffer.shape == (5, 16, 2)
    assert set(agent.critic.steps.tolist()) <= {0, 1, 2, 3}
    assert torch.equal(agent.critic.states, buffer[agent.critic.steps, 8:])
    assert torch.equal(agent.critic.fake, buffer[-1, 8:])
