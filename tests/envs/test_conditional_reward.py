"""The default reward under conditions: right samples for wrong conditions do not pay."""

import numpy as np
import pytest
import torch

from fewstep.critics import JointMMDCritic
from fewstep.envs import DiffusionMDP, DiffusionVectorEnv, DiscreteVP, Schedule, Target
from fewstep.envs.mdp import DefaultReward

pytestmark = pytest.mark.numeric
KINDS = ("classes", "captions", "embeddings")


def sides(n, seed=0):
    """Two clouds, left and right, and which of them each point is of."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.arange(n) % 2
    shift = torch.stack([2.0 * side - 1, torch.zeros(n)], dim=1)
    return shift + 0.1 * torch.randn(n, 2, generator=generator), side


def world(kind):
    samples, side = sides(400)
    target = Target(
        "Sides",
        samples,
        labels=side,
        captions=["right" if one else "left" for one in side.tolist()],
        embeddings=torch.stack([side, 1 - side], dim=1).float(),
    )
    process = DiscreteVP.linear(1000)
    return DiffusionMDP(target, process, Schedule.uniform(process, 2), conditional=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_earn_less_under_each_others_conditions(kind):
    mdp = world(kind)
    samples, _ = sides(64, seed=1)
    known = mdp.target.known(kind).training
    means = {}
    for name, rows in (("right", torch.arange(64)), ("wrong", torch.arange(64).flip(0))):
        episodes = mdp.episodes(64, condition=known[rows])  # neighbours are of two sides
        episodes.forget()
        means[name] = float(episodes.terminal_reward(samples).mean())
    # Right samples are real: their mean is an unbiased 0, with an error of about 1 / 64.
    assert abs(means["right"]) < 0.1 < 0.5 < -means["wrong"]
    alone = DefaultReward(mdp.target.samples)
    assert abs(float(alone.judge(samples).mean())) < 0.1  # which sees neither


def test_the_mean_reward_is_minus_the_energy_distance_of_pairs():
    (real, side), (fake, asked) = sides(60, seed=2), sides(40, seed=3)
    asked = 1 - asked
    critic = JointMMDCritic(real.double(), side, lambda c: torch.stack([c, 1 - c], 1).float())
    mean = float(critic.judge(fake.double(), asked).mean())

    def apart(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=-1)

    vectors = [np.stack([c, 1 - c], 1).astype(float) for c in (side.numpy(), asked.numpy())]
    points = [x.double().numpy() for x in (real, fake)]
    scale = apart(points[0], points[0]).mean() / apart(vectors[0], vectors[0]).mean()
    y, x = [np.hstack([p, scale * v]) for p, v in zip(points, vectors, strict=True)]
    own = [apart(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    # The sums have thousands of terms of size 1; the scale is kept as a float.
    assert mean == pytest.approx(-(2 * apart(x, y).mean() - sum(own)), abs=1e-10)


def test_the_shells_pay_by_it():
    mdp = world("classes")
    paid = {}
    for name in ("asked", "other"):
        env = DiffusionVectorEnv(mdp, 64)
        observation, _ = env.reset(seed=0)
        side = observation["condition"] if name == "asked" else 1 - observation["condition"]
        action = torch.stack([2.0 * side - 1, torch.zeros(64)], dim=1)
        env.step(action)
        paid[name] = float(env.step(action)[1].mean())
    assert paid["asked"] > paid["other"] + 0.5


def test_without_conditions_it_is_what_it_was():
    mdp = world(False)
    assert type(mdp.reward) is DefaultReward
    assert not mdp.has_own_reward
    assert not world("classes").has_own_reward


def test_conditions_of_another_number_are_refused():
    with pytest.raises(ValueError, match="3 conditions were given for 4 samples"):
        JointMMDCritic(torch.randn(4, 2), torch.zeros(3), lambda c: c[:, None])
