import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.common.distributed import Processes
from fewstep.envs import (
    VE,
    DiffusionMDP,
    DiffusionVectorEnv,
    DiscreteVP,
    Schedule,
    make_mdp,
    make_target,
)
from fewstep.envs.mdp import no_reward

pytestmark = pytest.mark.numeric


@pytest.fixture
def mdp(reward):
    process = DiscreteVP.sigmoid(10)
    return DiffusionMDP(make_target("SwissRoll"), process, Schedule.quadratic(process, 5), reward)


def test_initial_is_the_prior_and_follows_the_generator(mdp):
    draws = [mdp.initial(3, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert draws[0].shape == (3, 2)
    assert draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_observe_tells_the_time_of_each_state(mdp):
    sample = torch.zeros(3, 2)
    for step in range(mdp.steps + 1):
        observation = mdp.observe(sample, step)
        assert observation["sample"] is sample
        assert observation["timestep"].dtype == torch.float32
        assert observation["timestep"].tolist() == [float(mdp.schedule.times[step].float())] * 3


def test_transition_is_the_identity_and_keeps_the_gradient(mdp):
    action = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    after = mdp.transition(torch.zeros(3, 2), action, 0)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, action.float())
    mdp.terminal_reward(after).sum().backward()
    torch.testing.assert_close(action.grad, -2 * action.detach())


@pytest.mark.parametrize("action", [None, [[0.0, 0.0]] * 3, torch.zeros(3, 2, dtype=torch.int64)])
def test_actions_of_the_wrong_type_are_refused(mdp, action):
    with pytest.raises(TypeError, match="action must be a floating torch tensor"):
        mdp.check_action(torch.zeros(3, 2), action)


@pytest.mark.parametrize("shape", [(2, 2), (3,), (3, 2, 1), (6,)])
def test_actions_of_the_wrong_shape_are_refused(mdp, shape):
    with pytest.raises(ValueError, match=r"action must have shape \(3, 2\)"):
        mdp.check_action(torch.zeros(3, 2), torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_actions_that_are_not_finite_are_refused(mdp, value):
    action = torch.zeros(3, 2)
    action[1] = value
    with pytest.raises(ValueError, match=r"action holds NaN or infinity for 1 of 3 .* index 1"):
        mdp.check_action(torch.zeros(3, 2), action)


def test_a_finite_action_whose_sum_overflows_is_accepted(mdp):
    action = torch.full((3, 2), 3e38)
    mdp.check_action(torch.zeros(3, 2), action)
    assert torch.equal(mdp.transition(torch.zeros(3, 2), action, 0), action)


def test_actions_on_another_device_are_refused(mdp):
    with pytest.raises(ValueError, match="action is on meta, the environment on cpu"):
        mdp.check_action(torch.zeros(3, 2), torch.zeros(3, 2, device="meta"))


@pytest.mark.parametrize(
    ("reward", "error", "complaint"),
    [
        (
            lambda x: x[:, :1],
            ValueError,
            r"shape \(3,\); it returned shape \(3, 1\); drop the last",
        ),
        (lambda x: x[:, :1].numpy(), ValueError, r"it returned shape \(3, 1\)"),
        (lambda x: 0.0, TypeError, "the reward '<lambda>' must return one number a sample.* float"),
        (lambda x: None, TypeError, "it returned NoneType"),
        (lambda x: np.array(["a"] * 3), TypeError, "it returned ndarray of <U1"),
    ],
)
def test_bad_rewards_are_refused(mdp, reward, error, complaint):
    mdp = mdp.with_reward(reward)
    with pytest.raises(error, match=complaint):
        mdp.terminal_reward(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        (lambda x: x.sum(1) * math.nan, "returned NaN or infinity for 3 of 3 finite samples"),
        (lambda x: x.sum(1) + math.inf, "'<lambda>' returned NaN or infinity"),
        (lambda x: x.sum(1).numpy() * math.nan, "returned NaN or infinity for 3 of 3"),
    ],
)
def test_rewards_that_are_not_finite_are_refused_at_the_end_of_an_episode(mdp, reward, complaint):
    """The shells refuse them; an agent's own critic may diverge, which is for the agent to say."""
    env = DiffusionVectorEnv(mdp.with_reward(reward), 3)
    observation, _ = env.reset(seed=0)
    for _ in range(mdp.steps - 1):
        observation, *_ = env.step(observation["sample"])
    with pytest.raises(ValueError, match=complaint):
        env.step(observation["sample"])


@pytest.mark.parametrize(
    "reward",
    [
        lambda x: x.sum(1).numpy().astype(np.float64),
        lambda x: x.sum(1).to(torch.int64),
        lambda x: x.sum(1).numpy().astype(np.int32),
        lambda x: x.sum(1).half(),
    ],
)
def test_numbers_of_any_kind_are_rewards(mdp, reward):
    rewards = mdp.with_reward(reward).terminal_reward(torch.ones(3, 2))
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [2, 2, 2]


def test_a_schedule_of_another_process_is_refused(mdp):
    with pytest.raises(ValueError, match="the schedule is made for VE"):
        mdp.with_schedule(Schedule.karras(VE(), 5))


# -- rollouts ------------------------------------------------------------------------------------


class Jumping:
    """A policy that halves each sample and adds noise; `weight` may require a gradient."""

    def __init__(self, weight=0.5):
        self.weight = weight
        self.seen = []

    def act(self, observation, step, draw):
        self.seen.append((step, observation["timestep"].tolist()))
        return self.weight * observation["sample"] + draw(observation["sample"])


class Rounding:
    """A recorder that keeps what it is given and hands whole numbers back."""

    def __init__(self):
        self.kept = []

    def begin(self, episodes):
        pass

    def keep(self, step, sample, action=None):
        self.kept.append((step, sample, action))
        return sample.round()


def test_a_rollout_is_the_loop_of_the_decision_process(mdp):
    policy, rng = Jumping(), torch.Generator().manual_seed(3)
    found = mdp.rollout(policy, 6, torch.Generator().manual_seed(3))
    sample = mdp.initial(6, rng)
    for _ in range(5):
        sample = 0.5 * sample + torch.randn(6, 2, generator=rng)
    assert torch.equal(found, sample)
    times = mdp.schedule.times.float().tolist()
    assert policy.seen == [(j, [times[j]] * 6) for j in range(5)]


def test_all_noise_of_an_even_rollout_is_spread_over_each_batch(mdp):
    """Each state is a sum over the noise before it, whose mean over 50 episodes is nearly 0."""
    recorder = Keeping()
    mdp.rollout(Jumping(), 150, rng(), recorder=recorder, groups=3, even=True)
    means = torch.stack(recorder.kept).unflatten(1, (3, 50)).mean(2)
    assert means.abs().max() < 0.05  # by chance the standard deviation is 0.14 and more
    start = torch.distributions.Normal(0, 1).cdf(recorder.kept[0].unflatten(0, (3, 50)))
    assert torch.equal((50 * start).floor().sort(1)[0][0, :, 0], torch.arange(50.0))


class Keeping:
    """Keeps the states of a rollout."""

    def begin(self, episodes):
        self.kept = []

    def keep(self, step, sample, action=None):
        self.kept.append(sample)
        return sample


def test_a_rollout_goes_on_from_what_its_recorder_returns(mdp):
    recorder = Rounding()
    found = mdp.rollout(Jumping(), 3, recorder=recorder)
    assert [step for step, _, _ in recorder.kept] == list(range(6))
    assert recorder.kept[0][2] is None
    for (_, before, _), (_, after, action) in pairwise(recorder.kept):
        # The transition is the identity: nothing was copied.
        assert after is action
        assert (after - 0.5 * before.round()).abs().max() < 6
    assert torch.equal(found, recorder.kept[-1][1].round())


def test_gradients_flow_through_a_rollout(mdp):
    """Of x_K = w^K x_0 + ... with respect to w; without one nothing is recorded."""
    weight = torch.tensor(0.5, requires_grad=True)
    (exact,) = torch.autograd.grad(mdp.rollout(Jumping(weight), 4, rng()).sum(), weight)
    with torch.no_grad():
        assert not mdp.rollout(Jumping(weight), 4, rng()).requires_grad
    with torch.no_grad():
        ends = [float(mdp.rollout(Jumping(0.5 + h), 4, rng()).sum()) for h in (1e-3, -1e-3)]
    assert float(exact) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)


def rng():
    return torch.Generator().manual_seed(8)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("inpaint", [None, "half"])
def test_processes_share_the_episodes_that_one_would_play(inpaint, even):
    """Each group of episodes in equal parts, known pixels and all noise included."""
    mdp = make_mdp("Digits", steps=3, inpaint=inpaint, reward=no_reward)
    alone = mdp.rollout(Jumping(), 12, rng(), groups=3, even=even)
    shares = [
        mdp.rollout(Jumping(), 6, rng(), processes=Processes(rank, 2), groups=3, even=even)
        for rank in (0, 1)
    ]
    together = torch.cat([share.unflatten(0, (3, 2)) for share in shares], dim=1).flatten(0, 1)
    assert torch.equal(together, alone)
