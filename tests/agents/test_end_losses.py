"""Solver learning's distances of distributions: what they are, and what chance does to them."""

import math

import pytest
import torch
from schedule_worlds import known, world

from fewstep.agents import RDPO, SolverLearning
from fewstep.agents.selection import best_of, is_better
from fewstep.agents.solver_learning import rdpo, solver_learning
from fewstep.agents.solver_learning.joint.losses import EndLoss, end_loss
from fewstep.agents.solver_learning.joint.settings import LossSettings
from fewstep.critics import MMDCritic
from fewstep.critics.joint import JointMMDCritic
from fewstep.envs import make_mdp

numeric = pytest.mark.numeric
DISTANCES = ["mmd", "kid"]
FEW = {"batch_size": 20, "batches": 2, "scale": 3, "check_teacher": False, "rounds": 1}


def kernel(distance, x, y):
    if distance == "mmd":
        return -torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (x @ y.T / x.shape[1] + 1) ** 3


def by_pairs(distance, x, y):
    """MMD^2 without bias, by sums over all pairs."""
    total = {}
    for name, one, other in (("xx", x, x), ("yy", y, y), ("xy", x, y)):
        values = kernel(distance, one, other)
        own = values.diagonal().sum() if one is other else 0
        count = len(one) * (len(other) - (one is other))
        total[name] = float((values.sum() - own) / count)
    return total["xx"] + total["yy"] - 2 * total["xy"]


@numeric
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("conditional", [False, True])
def test_it_is_the_unbiased_estimate(distance, conditional, generator):
    """Under conditions: of samples together with them, as the default reward has them."""
    x, y = (torch.randn(50, 4, generator=generator(seed), dtype=torch.float64) for seed in (1, 2))
    settings, under = LossSettings(distance=distance), ()
    if not conditional:
        loss = EndLoss(settings, None, y)
    else:
        classes = torch.randint(3, (2, 50), generator=generator(3))

        def points(labels):
            return torch.nn.functional.one_hot(labels, 3).double()

        under, loss = (classes[0],), EndLoss(settings, None, y, classes[1], points)
        scale = JointMMDCritic(y, classes[1], points).scale
        x = torch.cat([x, scale * points(classes[0])], 1)
        y = torch.cat([y, scale * points(classes[1])], 1)
    expected = by_pairs(distance, x, y)
    for told in (loss.contributions, loss.shares):
        found = told(x[:, :4], x[:, :4], *under)
        assert float(found.mean()) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_difference_is_told_from_chance(distance, generator):
    """The standard error of a gain is what it varies by; what is worse is seldom taken."""
    source, gains, told, taken = generator(0), [], [], 0
    for _ in range(300):
        x, y = 2 * torch.rand(2, 150, 2, generator=source, dtype=torch.float64) - 1
        loss = EndLoss(LossSettings(distance=distance), None, y)
        before, after = (loss.shares(s * x, x) for s in (1.0, 1.05))
        gain = before - after
        gains.append(float(gain.mean()))
        told.append(float(gain.std()) / math.sqrt(len(gain)))
        taken += is_better(after, before, by_lead=False)
    spread = float(torch.tensor(gains).std())
    # 300 draws tell a standard deviation to 4 %.
    assert float(torch.tensor(told).square().mean().sqrt()) == pytest.approx(spread, rel=0.2)
    # Worse in the mean by a little: less than the one in six who are lucky by a standard error.
    assert torch.tensor(gains).mean() < 0 and taken < 300 * (0.159 + 3 * 0.021)


def test_who_compares_distributions_does_not_count_single_samples(monkeypatch):
    """Neither solver learning by them, nor RDPO with a reward that judges samples by the others."""
    asked = []

    def note(errors, by_lead=True):
        asked.append(by_lead)
        return best_of(errors, by_lead)

    for module in (solver_learning, rdpo):
        monkeypatch.setattr(module, "best_of", note)
    for distance in ("l2", "mmd"):
        told = {"distance": distance, "real_samples": 30, "start": "given"}
        SolverLearning(world(), known()[0], **FEW, **told).learn()
    drawn = {"rounds": 1, "batch_size": 8, "held_out": 16}
    for reward in (MMDCritic(torch.randn(50, 2)), lambda x: -x.norm(dim=1)):
        RDPO(world(), known()[0], critic=reward, **drawn).learn()
    assert asked == [True, False, False, True]


def test_under_conditions_samples_are_compared_with_those_of_their_own(generator):
    mdp = make_mdp("Digits", steps=4, conditional=True)
    loss = end_loss(LossSettings(distance="mmd", real_samples=1000), None, mdp, 0, 0)
    classes = torch.arange(600) % 10
    x = mdp.target.sample_of(classes, generator(1))
    matched, swapped = (float(loss.shares(x, x, c).mean()) for c in (classes, classes.flip(0)))
    assert abs(matched) < swapped / 5
