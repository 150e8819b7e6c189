"""The energy distance to real samples: what it is, and what chance does to it."""

import math

import numpy as np
import pytest
import torch

from fewstep.common.conditions import Classes
from fewstep.critics.energy import EnergyDistance
from fewstep.critics.joint import Joined

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("conditional", [False, True])
def test_the_mean_of_the_shares_is_the_unbiased_estimate(conditional):
    """By loops over all pairs, of samples or of samples with their conditions."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=source, dtype=torch.float64)
    y = torch.randn(40, 3, generator=source, dtype=torch.float64) + 0.3
    points, of_x, of_y, pairs = None, None, None, (x, y)
    if conditional:
        points, of_x, of_y = Classes(2).points, torch.arange(30) % 2, torch.arange(40) % 2
        joined = Joined(points, y, of_y)
        pairs = joined(x, of_x), joined(y, of_y)
    a, b = pairs

    def mean_distance(a, b, apart):
        found = [
            float((p - q).norm())
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (apart and i == j)
        ]
        return sum(found) / len(found)

    wanted = 2 * mean_distance(a, b, False) - mean_distance(a, a, True) - mean_distance(b, b, True)
    shares = EnergyDistance(y, of_y, points).shares(x, of_x)
    assert shares.shape == (70,)
    assert float(shares.mean()) == pytest.approx(wanted, rel=1e-9)


def test_the_spread_of_the_shares_is_what_chance_does_to_the_mean():
    """By repetition: of a distance, and of the difference of two on the same noise."""
    source, draws = torch.Generator().manual_seed(0), {"one": [], "two": []}
    for _ in range(200):
        x, y = torch.randn(60, 2, generator=source), torch.randn(300, 2, generator=source)
        to_real = EnergyDistance(y)
        far, near = to_real.shares(x + 1), to_real.shares(0.9 * x + 0.7)
        for name, shares in (("one", far), ("two", far - near)):
            draws[name].append((float(shares.mean()), float(shares.std()) / math.sqrt(len(shares))))
    for found in draws.values():
        means, errors = np.array(found).T
        # The spread of 200 draws is known to 5 %.
        assert means.std() == pytest.approx(errors.mean(), rel=0.2)
