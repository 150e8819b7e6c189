"""Metrics that see single samples: the classifier two-sample test, the share off the manifold."""

import math

import numpy as np
import pytest
import torch

from fewstep.critics import evaluate
from fewstep.critics.metrics import Evaluation, Manifold, c2st, sliced_wasserstein
from fewstep.critics.metrics.evaluation import FRESH_SEED
from fewstep.envs import make_target

pytestmark = pytest.mark.numeric


def normal(n, seed, shift=0.0):
    return shift + torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_cannot_be_told_apart_and_distant_ones_always():
    accuracy = c2st(normal(4000, 0), normal(4000, 1))
    assert abs(accuracy - 0.5) < 4 * math.sqrt(0.25 / 4000)  # its binomial error
    assert c2st(normal(400, 0), normal(400, 1, shift=50)) == 1


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_the_accuracy_comes_near_that_of_the_best_classifier(shift):
    """That of two Gaussians a distance d apart is Phi(d / 2)."""
    distance = shift * math.sqrt(2)
    best = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))
    accuracy = c2st(normal(8000, 0), normal(8000, 1, shift=shift))
    # Fifteen neighbours see the density with an error of 1 / sqrt(15) on either side.
    assert best - 0.06 < accuracy < best + 4 * math.sqrt(0.25 / 8000)


def test_by_hand_with_one_neighbour():
    x = torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    assert c2st(x, x + 1, neighbours=1) == 1
    assert c2st(x.double().numpy(), x.double().numpy() + 1) == 1


def test_the_larger_set_gives_as_many_as_the_smaller():
    # With the sizes as they are, most neighbours would always be of the larger set.
    accuracy = c2st(normal(500, 0), normal(20_000, 1))
    assert abs(accuracy - 0.5) < 4 * math.sqrt(0.25 / 500)


def test_it_sees_a_blur_that_hardly_moves_the_sliced_wasserstein_distance():
    target = make_target("SwissRoll")
    good, real = target.sample_fresh(20_000, 5), target.sample_fresh(20_000, 6)
    blurred = good + 0.01 * torch.randn(good.shape, generator=torch.Generator().manual_seed(0))
    moved = sliced_wasserstein(blurred, real)
    assert moved < 0.01  # of data of size 1
    assert c2st(good, real) < 0.52 < 0.65 < c2st(blurred, real)


@pytest.mark.parametrize(
    ("x", "y", "neighbours", "complaint"),
    [
        (normal(40, 0), torch.zeros(40, 3), None, "y must have shape"),
        (normal(1, 0), normal(40, 0), None, "needs two samples a side, got 1 and 40"),
        (normal(40, 0), normal(40, 0), 4, "neighbours must be odd and 1 to 20, got 4"),
        (normal(40, 0), normal(40, 0), 21, "neighbours must be odd and 1 to 20, got 21"),
        (normal(40, 0) * math.nan, normal(40, 0), None, "x holds NaN or infinite"),
    ],
)
def test_what_cannot_be_classified_is_refused(x, y, neighbours, complaint):
    with pytest.raises(ValueError, match=complaint):
        c2st(x, y, neighbours)


def test_a_run_watches_them_too():
    target = make_target("SwissRoll")
    evaluation = Evaluation(target, fresh_samples=20_000)
    points = target.sample_fresh(10_000, 5) + 0.01 * normal(10_000, 0)
    live = evaluation.quick(lambda n, generator: points[:n])
    assert live == {
        "sliced_wasserstein": evaluation.score(points.repeat(2, 1))["sliced_wasserstein"],
        "c2st": c2st(points[:2000], target.sample_fresh(20_000, FRESH_SEED)),
        "off_manifold": target.manifold.off(points),
    }


def circle(course):
    angle = 2 * np.pi * course
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_distances_from_a_circle():
    manifold = Manifold(circle, std=0.1, far=3)
    points = normal(500, 0)
    expected = (points.double().norm(dim=1) - 1).abs().numpy()
    # The nearest of 100,000 points is at most half of their spacing away along the curve.
    np.testing.assert_allclose(manifold.distance(points), expected, atol=2 * np.pi / 100_000)
    assert manifold.off(points) == pytest.approx((expected > 0.3).mean())
    assert manifold.off(points, far=1) == pytest.approx((expected > 0.1).mean())


@pytest.mark.parametrize("name", ["SwissRoll", "Moons"])
def test_the_toys_lie_on_their_curves(name):
    target = make_target(name)
    samples, manifold = target.sample_fresh(20_000), target.manifold
    away = manifold.distance(samples) / manifold.std
    # The noise across the curve is one normal number: its moments, to four standard errors.
    assert np.mean(away**2) == pytest.approx(1, abs=4 * math.sqrt(2 / 20_000) + 0.02)
    assert manifold.off(samples) < 1e-3
    assert manifold.off(samples + 0.5) > 0.2
    assert target.to("cpu").manifold is manifold


def test_what_is_no_distance_is_refused():
    manifold = Manifold(circle, std=0.1)
    with pytest.raises(ValueError, match="far must be positive and finite, got 0"):
        manifold.off(normal(4, 0), far=0)
    with pytest.raises(ValueError, match="samples must have shape"):
        manifold.off(torch.zeros(4, 3))


def test_an_evaluation_has_both_with_their_floors():
    target = make_target("SwissRoll")
    report = evaluate(lambda n, generator: target.sample_fresh(n, 3) + 0.04, target, 4000)
    assert report["off_manifold"].floor == 0 and report["off_manifold"].value > 0.3
    assert abs(report["c2st"].floor - 0.5) < 0.05 and report["c2st"].value > 0.9
    assert "off_manifold" not in evaluate(target.sample_fresh(100), make_target("GaussianCluster"))
