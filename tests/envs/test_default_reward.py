"""The default reward: its maximiser is the data, and it learns only from what has finished."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import energy_distance

from fewstep.critics import MMDCritic
from fewstep.envs import DiffusionVectorEnv, make_mdp

pytestmark = pytest.mark.numeric


def draws(n, seed, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed)).double()


def pairwise(x, y):
    return np.abs(x.numpy()[:, None, 0] - y.numpy()[None, :, 0])


def unbiased_energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|, no sample with itself (Szekely and Rizzo 2013)."""
    own = [pairwise(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2 * pairwise(x, y).mean() - sum(own)


def test_the_mean_reward_of_a_batch_is_minus_the_energy_distance():
    real, fake = draws(150, 0), draws(120, 1, scale=0.6, shift=0.3)
    mean = float(MMDCritic(real).judge(fake).mean())
    # The sums have 1e4 terms of size 1: in float64 they are good to 1e-12.
    assert mean == pytest.approx(-unbiased_energy_distance(fake, real), abs=1e-12)
    # SciPy's counts each sample's distance 0 to itself.
    biased = energy_distance(fake[:, 0].numpy(), real[:, 0].numpy()) ** 2
    own = sum(pairwise(z, z).sum() / (len(z) - 1) / len(z) ** 2 for z in (fake, real))
    assert mean == pytest.approx(-(biased - own), abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
def test_the_mean_is_the_same_however_many_are_judged_at_once(chunk):
    """One sample at a time (NumPy, SB3) or in batches: only the noise differs."""
    n = 1500 if chunk == 1 else 4800  # one at a time is slow
    real, fake = draws(300, 0), draws(n, 1, scale=0.6, shift=0.3)
    critic = MMDCritic(real)
    rewards = torch.cat([critic.judge(part) for part in fake.split(chunk)])[64:]
    # A reward's own deviation is about 0.5, and neighbours share a reference of 64.
    tolerance = 0.04 * (4800 / n) ** 0.5
    expected = -unbiased_energy_distance(fake, real)
    assert float(rewards.mean()) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("batch", [1, 64])
def test_a_single_point_is_judged_worse_than_the_data(batch):
    """Before, the median of the data was judged better than the data themselves."""
    mdp = make_mdp("SwissRoll")
    median = mdp.target.samples.median(0).values
    points = {"point": median.expand(640, 2), "data": mdp.target.sample_fresh(640)}
    means = {}
    for name, samples in points.items():
        mdp.forget()
        judged = torch.cat([mdp.terminal_reward(part) for part in samples.split(batch)])
        means[name] = float(judged[64:].mean())
    real = mdp.target.sample_fresh(20_000, seed=1).double().numpy()
    to_point = np.linalg.norm(real - median.double().numpy(), axis=1).mean()
    between = np.linalg.norm(real[:10_000] - real[10_000:], axis=1).mean()
    # With the 512 real samples of the reward its mean has a standard error of 0.008.
    assert means["point"] == pytest.approx(-(2 * to_point - between), abs=0.04)
    assert abs(means["data"]) < 0.04 < -means["point"]


def test_the_gradient_is_that_of_minus_the_energy_distance():
    real, fake = draws(40, 0), draws(30, 1, 0.6, 0.3).requires_grad_()
    MMDCritic(real).judge(fake).mean().backward()
    own = fake.detach().clone().requires_grad_()
    cross, spread = (own - real.T).abs().mean(), (own - own.T).abs().sum() / (30 * 29)
    (spread - 2 * cross).backward()
    torch.testing.assert_close(fake.grad, own.grad, rtol=1e-9, atol=1e-12)


def test_the_reference_is_short_so_that_the_reward_follows_the_policy():
    critic = MMDCritic(draws(50, 0))
    for n, expected in [(1, 1), (10, 11), (100, 100), (1, 64), (3000, 512), (5, 64)]:
        critic.judge(draws(n, n))
        assert len(critic.reference) == expected
    last = draws(5, 5)
    assert torch.equal(critic.reference[-5:], last)


def test_only_finished_episodes_teach_it():
    env = gym.make_vec("fewstep/SwissRoll-v0", num_envs=4, steps=2).unwrapped
    assert isinstance(env, DiffusionVectorEnv)
    env.reset(seed=0)
    env.step(torch.zeros(4, 2))
    env.reward(torch.randn(100, 2))
    assert env.reward.reference is None
    env.step(torch.ones(4, 2))
    assert torch.equal(env.reward.reference, torch.ones(4, 2))
    other = gym.make_vec("fewstep/SwissRoll-v0", num_envs=4, steps=2).unwrapped
    assert other.reward.reference is None  # an environment for evaluation has its own


@pytest.mark.parametrize("kind", ["vector", "single"])
def test_the_same_seed_gives_the_same_rewards(kind):
    make = gym.make if kind == "single" else gym.make_vec
    env = make("fewstep/SwissRoll-v0", steps=1)

    def rewards(**seed):
        found = []
        for episode in range(3):
            sample = env.reset(**(seed if episode == 0 else {}))[0]["sample"]
            found.append(
                np.array(
                    env.step(sample / 2)[1].tolist()
                    if kind == "vector"
                    else env.step(sample / 2)[1]
                )
            )
            if kind == "vector":
                env.step(np.zeros((1, 2), np.float32))  # the reset of mode NEXT_STEP
        return np.stack(found)

    np.testing.assert_array_equal(rewards(seed=5), rewards(seed=5))
    assert not np.array_equal(rewards(seed=5), rewards(seed=6))
    assert not np.array_equal(rewards(seed=5), rewards())


def test_it_is_saved_with_its_reference():
    real, fake = draws(40, 0), draws(10, 1)
    critic, other = MMDCritic(real), MMDCritic(draws(40, 3))
    critic.judge(fake)
    other.judge(fake)  # so that what it has computed of its own samples must not survive
    other.load_state_dict(critic.state_dict())
    assert torch.equal(critic.judge(draws(5, 2)), other.judge(draws(5, 2)))
