"""Inpainting: the known part of a sample is put back after every step."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from fewstep.envs import DiffusionVectorEnv, Inpainting, Schedule, Target, make_mdp
from fewstep.envs.inpainting import MASKS
from fewstep.envs.mdp import no_reward

pytestmark = pytest.mark.numeric


@pytest.fixture
def make():
    def make(name="Digits", inpaint="half", **settings):
        return make_mdp(name, **{"steps": 4, "reward": no_reward, "inpaint": inpaint, **settings})

    return make


@pytest.fixture
def generator():
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(2,), (7,), (1, 8, 8), (3, 5, 4)])
def test_masks_know_their_share_of_every_channel(name, shape):
    mask = MASKS[name](shape)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    # To the rounding of one row, and never nothing.
    share = {"half": 0.5, "quarter": 0.25, "random": 0.5}[name]
    assert abs(float(mask.float().mean()) - share) <= 0.25
    assert mask.any()
    assert not mask.all()
    assert torch.equal(mask, MASKS[name](shape))
    if len(shape) == 3:
        assert (mask == mask[:1]).all()


def test_half_is_the_upper_half():
    known = MASKS["half"]((1, 8, 8))
    assert known[:, :4].all()
    assert not known[:, 4:].any()


def test_known_numbers_are_put_back_at_the_noise_of_the_next_state(make, generator):
    """Mean alpha_s x_known and deviation sigma_s, whatever the action; the rest is the action."""
    mdp = make()
    known = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(20_000, 1, 8, 8)
    episodes = mdp.episodes(20_000, known=known)
    sample, action = torch.zeros(20_000, 1, 8, 8), torch.randn(20_000, 1, 8, 8)
    rng = generator()

    def draw(like):
        return torch.empty_like(like).normal_(generator=rng)

    for step in range(4):
        after = episodes.transition(sample, action, step, draw)
        s = mdp.schedule.times[step + 1]
        alpha, sigma = float(mdp.process.alpha(s)), float(mdp.process.sigma(s))
        assert torch.equal(after[..., 4:, :], action[..., 4:, :])
        residual = after[..., :4, :] - alpha * known[..., :4, :]
        if sigma == 0:
            assert torch.equal(after[..., :4, :], known[..., :4, :])
            continue
        # Six standard errors of each of 32 means and deviations.
        assert (residual.mean(0).abs() < 6 * sigma / 20_000**0.5).all()
        assert ((residual.std(0) / sigma - 1).abs() < 6 / 40_000**0.5).all()
        pixels = residual.flatten(1).T.corrcoef()
        assert (pixels - torch.eye(32)).abs().max() < 6 / 20_000**0.5
    assert sigma == 0


def test_the_gradient_passes_where_nothing_is_known(make):
    episodes = make().episodes(3)
    action = torch.randn(3, 1, 8, 8, requires_grad=True)
    episodes.transition(torch.zeros(3, 1, 8, 8), action, 1).sum().backward()
    assert torch.equal(action.grad, (~make().mask).float().expand(3, 1, 8, 8))


def test_each_episode_has_a_known_sample_of_the_target(make, generator):
    mdp = make()
    first, again, other = (mdp.episodes(5, generator(seed)).known for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    real = mdp.target.samples.flatten(1)
    assert all((real == one.flatten()).all(1).any() for one in first)
    assert torch.equal(mdp.episodes(5, generator()).at(slice(2, 4)).known, first[2:4])
    assert torch.equal(mdp.episodes(5, generator()).at(torch.tensor([4, 0])).known, first[[4, 0]])
    assert mdp.known is None
    assert mdp.at(slice(2)) is mdp


class Pushed:
    """A policy that adds a number to every sample."""

    def act(self, observation, step, draw):
        return observation["sample"] + 0.1


def test_a_rollout_ends_with_the_known_numbers(make, generator):
    mdp = make()
    found = mdp.rollout(Pushed(), 6, generator(3))
    known = mdp.episodes(6, generator(3)).known
    assert torch.equal(found[..., :4, :], known[..., :4, :])
    assert not torch.equal(found[..., 4:, :], known[..., 4:, :])


@pytest.mark.parametrize("name", ["Digits", "SwissRoll"])
def test_every_shell_puts_the_known_numbers_back(name):
    settings = {"steps": 3, "inpaint": "half", "reward": no_reward}
    vector = gym.make_vec(f"fewstep/{name}-v0", 5, **settings)
    arrays = gym.make_vec(f"fewstep/{name}-v0", 5, numpy=True, **settings)
    single = gym.make(f"fewstep/{name}-v0", **settings).unwrapped
    mask = vector.unwrapped.mdp.mask
    known = vector.unwrapped.mdp.target.take(5) * 0.5
    vector.reset(seed=0, options={"known": known})
    arrays.reset(seed=0, options={"known": known.numpy()})
    single.reset(seed=0, options={"known": known[0].numpy()})
    for _ in range(3):
        action = vector.action_space.sample()
        observation, *_ = vector.step(action)
        of_arrays, *_ = arrays.step(action)
        alone, *_ = single.step(action[0])
    assert torch.equal(observation["sample"][:, mask], known[:, mask])
    assert np.array_equal(observation["sample"].numpy(), of_arrays["sample"])
    assert np.array_equal(observation["sample"][0].numpy(), alone["sample"])
    assert np.array_equal(alone["sample"][~mask.numpy()], action[0][~mask.numpy()])


def test_an_environment_is_reproduced_by_its_seed(make):
    env = DiffusionVectorEnv(make(), 3)
    seen = []
    for seed in (0, 0, 1):
        states = [env.reset(seed=seed)[0]["sample"]]
        states += [env.step(torch.zeros(3, 1, 8, 8))[0]["sample"] for _ in range(4)]
        seen.append(torch.stack(states))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    # Also from a given start, and every episode has known samples of its own.
    start = torch.randn(3, 1, 8, 8)
    ends = []
    for seed in (0, 0, None):
        env.reset(seed=seed, options={"sample": start})
        for _ in range(4):
            observation, *_ = env.step(start)
        ends.append(observation["sample"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_other_times_and_rewards_keep_the_mask(make):
    mdp = make(inpaint=MASKS["random"]((1, 8, 8)))
    shorter = mdp.with_schedule(Schedule(mdp.process, [1000, 300, 0]))
    other = shorter.with_reward(lambda sample: sample.flatten(1).sum(1))
    assert isinstance(other, Inpainting)
    assert torch.equal(other.mask, mdp.mask)
    assert other.rollout(Pushed(), 2).shape == (2, 1, 8, 8)
    assert not mdp.is_plain
    assert make(inpaint=None).is_plain


def test_the_default_reward_compares_whole_samples(make):
    mdp = make(reward=None)
    real = mdp.target.subset(512)
    half = torch.where(mdp.mask, real, torch.zeros(()))
    whole, filled = (float(mdp.terminal_reward(x).mean()) for x in (real, half))
    assert whole > filled + 0.1


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"inpaint": "hal"}, ValueError, "did you mean 'half'"),
        ({"inpaint": torch.ones(1, 8, 8)}, TypeError, "a tensor of bool; got torch.float32"),
        ({"inpaint": torch.ones(8, 8, dtype=torch.bool)}, ValueError, "must have shape"),
        ({"inpaint": torch.ones(1, 8, 8, dtype=torch.bool)}, ValueError, "leave something"),
        ({"inpaint": 3}, TypeError, "got 3"),
    ],
)
def test_masks_that_make_no_sense_are_refused(change, error, complaint, make):
    with pytest.raises(error, match=complaint):
        make(**change)


def test_episodes_that_have_not_begun_cannot_move(make):
    mdp, sample = make(), torch.zeros(3, 1, 8, 8)
    with pytest.raises(ValueError, match="0 episodes have begun"):
        mdp.transition(sample, sample, 0)
    with pytest.raises(ValueError, match="3 samples move, 2 episodes have begun"):
        mdp.episodes(2).transition(sample, sample, 0)
    env = DiffusionVectorEnv(mdp, 3)
    with pytest.raises(ValueError, match=r"known must have shape \(3, 1, 8, 8\)"):
        env.reset(options={"known": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(ValueError, match="unknown reset option 'known'"):
        DiffusionVectorEnv(make(inpaint=None), 3).reset(options={"known": sample})


def test_a_target_without_samples_of_its_own_shape(generator):
    """Vectors, too: the first coordinate of a pair is known."""
    target = Target.from_samples(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    mdp = make_mdp("SwissRoll", target=target, reward=no_reward, inpaint="half", steps=3)
    found = mdp.rollout(Pushed(), 50, generator())
    assert set(found[:, 0].tolist()) == {0.0, 2.0}
