import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fewstep.critics import metrics
from fewstep.critics.metrics.distances import (
    SlicedWasserstein,
    mmd,
    sliced_wasserstein,
    wasserstein,
)

pytestmark = pytest.mark.numeric

METRICS = [
    lambda x, y: sliced_wasserstein(x, y, p=1, n_projections=9),
    lambda x, y: sliced_wasserstein(x, y, p=2, n_projections=9),
    lambda x, y: wasserstein(x, y, p=1),
    lambda x, y: wasserstein(x, y, p=2),
    mmd,
    lambda x, y: mmd(x, y, kernel="gaussian", bandwidth=3.0),
]


def points(dimension=2):
    shape = st.tuples(st.integers(2, 9), st.just(dimension))
    return hnp.arrays(np.float64, shape, elements=st.floats(-10, 10, width=32))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 17), (24, 60), (1, 5)])
@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_sliced_wasserstein_equals_pot(p, n, m, shape):
    x, y = torch.randn(n, *shape).double(), 0.5 + torch.rand(m, *shape).double()
    # 21 projections: chunks of unequal length.
    expected = ot.sliced_wasserstein_distance(
        x.flatten(1).numpy(), y.flatten(1).numpy(), n_projections=21, p=p, seed=3
    )
    ours = sliced_wasserstein(x, y, p, n_projections=21, seed=3)
    assert ours == pytest.approx(expected, rel=1e-6)
    prepared = SlicedWasserstein(y, p, n_projections=21, seed=3)
    assert prepared(x) == prepared(x.numpy()) == ours


def test_translations_have_closed_forms():
    x, shift = torch.randn(500, 2).double(), torch.tensor([3.0, 4.0])
    # In one dimension every direction is +-1. In two the shift's component along a random direction
    # is 5 cos(a): root mean square 5 / sqrt 2, mean magnitude 10 / pi.
    assert sliced_wasserstein(x[:, :1], x[:, :1] + 3) == pytest.approx(3)
    two, one = (sliced_wasserstein(x, x + shift, p, n_projections=20_000) for p in (2, 1))
    assert two == pytest.approx(5 / math.sqrt(2), rel=0.02)
    assert one == pytest.approx(10 / math.pi, rel=0.02)
    assert wasserstein(x[:50], x[:50] + shift, p=2) == pytest.approx(5)


@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_equals_the_best_permutation(p):
    x, y = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    best = min(
        (x - y[list(order)]).norm(dim=1).pow(p).mean() for order in itertools.permutations(range(6))
    )
    assert wasserstein(x, y, p) == pytest.approx(float(best) ** (1 / p))


@pytest.mark.parametrize("bandwidth", [None, 1.5])
@pytest.mark.parametrize("far", [True, False])
def test_mmd_equals_a_double_loop_over_distinct_pairs(bandwidth, far):
    x, y = torch.randn(8, 2).double(), 1 + torch.rand(5, 2).double()
    if not far:  # one set twice: the estimate of the square is negative, the distance is 0
        y = x.flip(0)

    def k(a, b):
        d = math.dist(a.tolist(), b.tolist())
        return -d if bandwidth is None else math.exp(-(d**2) / (2 * bandwidth**2))

    xx = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    yy = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    xy = np.mean([k(a, b) for a, b in itertools.product(x, y)])
    kernel = "energy" if bandwidth is None else "gaussian"
    squared = xx + yy - 2 * xy
    assert (squared > 0) == far
    assert mmd(x, y, kernel, bandwidth) == pytest.approx(math.sqrt(max(squared, 0)))


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=25, deadline=None)
@given(x=points(), y=points())
def test_metric_axioms(metric, x, y):
    distance = metric(x, y)
    assert metric(y, x) == pytest.approx(distance, rel=1e-6, abs=1e-6)
    assert metric(x, x) == pytest.approx(0, abs=1e-6)
    # Neither the order of the samples nor a common translation matters.
    assert metric(x[::-1] + 1, y + 1) == pytest.approx(distance, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS[:4])
@settings(max_examples=25, deadline=None)
@given(x=points(), y=points(), z=points())
def test_wasserstein_distances_obey_the_triangle_and_move_the_means(metric, x, y, z):
    assert metric(x, z) <= metric(x, y) + metric(y, z) + 1e-6
    # Jensen: no transport is shorter than that of the means.
    means = (side.mean(0, keepdims=True) for side in (x, y))
    assert metric(x, y) >= metric(*means) - 1e-6


@settings(max_examples=25, deadline=None)
@given(x=points(), y=points(), scale=st.floats(0.125, 8))
def test_order_and_scaling(x, y, scale):
    for metric in (wasserstein, sliced_wasserstein):
        assert metric(x, y, p=1) <= metric(x, y, p=2) + 1e-9
        assert metric(scale * x, scale * y, p=2) == pytest.approx(
            scale * metric(x, y, p=2), rel=1e-6, abs=1e-6
        )
    assert sliced_wasserstein(x, y, p=2) <= wasserstein(x, y, p=2) + 1e-9


def test_floor_compares_two_independent_draws():
    def draw(n, seed):
        return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))

    floor = metrics.floor(sliced_wasserstein, draw, 500, seed=4)
    assert floor == sliced_wasserstein(draw(500, 4), draw(500, 5))
    assert 0 < floor < 0.2
    assert metrics.floor(sliced_wasserstein, draw, 8000) < floor


@pytest.mark.parametrize("metric", [sliced_wasserstein, wasserstein, mmd])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((4, 2), math.nan), "NaN or infinite"),
        (np.full((4, 2), np.inf), "NaN or infinite"),
        (np.zeros((0, 2)), "must hold samples"),
        (np.zeros(4), "must hold samples"),
        (np.zeros((4, 2), dtype=int), "floating point"),
        (np.zeros((4, 3)), r"must have shape \(N, "),
    ],
)
def test_bad_samples(metric, bad, message):
    good = torch.randn(5, 2)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=message):
            metric(*pair)


def test_bad_settings():
    x = torch.randn(6, 2)
    for metric in (sliced_wasserstein, wasserstein):
        for p in (0.5, math.nan):
            with pytest.raises(ValueError, match="p must be at least 1"):
                metric(x, x, p=p)
    with pytest.raises(ValueError, match="n_projections"):
        sliced_wasserstein(x, x, n_projections=0)
    with pytest.raises(ValueError, match=r"at most 5 samples .* use sliced_wasserstein"):
        wasserstein(x, x, max_samples=5)
    with pytest.raises(ValueError, match="two samples"):
        mmd(x, x[:1])
    with pytest.raises(ValueError, match="unknown kernel 'rbf'"):
        mmd(x, x, kernel="rbf")
