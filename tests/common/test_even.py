"""Even noise: Latin hypercube samples of the normal distribution."""

import math

import pytest
import torch

from fewstep.common.even import even_normal

pytestmark = pytest.mark.numeric


def test_every_nth_of_the_distribution_has_one_sample_of_each_batch():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3 * 50, 2, 2, generator=generator)
    even = even_normal(noise, generator, groups=3)
    share = 0.5 * (1 + torch.erf(even / math.sqrt(2)))
    strata = (50 * share.unflatten(0, (3, 50))).floor().sort(dim=1)[0]
    assert torch.equal(strata, torch.arange(50.0).view(1, 50, 1, 1).expand_as(strata))
    # What was larger is larger, so coordinates and batches are as independent as before.
    for before, after in zip(noise.split(50), even.split(50), strict=True):
        assert torch.equal(before.argsort(dim=0), after.argsort(dim=0))


def test_the_mean_of_a_sum_over_coordinates_hardly_varies():
    """Of x_1 + x_2^2 over 64 samples: its variance is 3 / 64 by chance, about 1 / 64^2 evenly."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400 * 64, 2, generator=generator)
    even = even_normal(noise, generator, groups=400)
    of_chance, of_even = (
        (z[:, 0] + z[:, 1] ** 2).view(400, 64).mean(1).var() for z in (noise, even)
    )
    assert float(of_chance) == pytest.approx(3 / 64, rel=0.3)
    assert float(of_even) < 0.05 * float(of_chance)
    # Of x_1 x_2, which is no such sum, nothing is gained and nothing lost.
    of_chance, of_even = (z.prod(1).view(400, 64).mean(1).var() for z in (noise, even))
    assert float(of_even) == pytest.approx(float(of_chance), rel=0.3)


def test_it_is_finite_and_keeps_its_precision():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        even = even_normal(torch.randn(100_000, 1, dtype=dtype, generator=generator), generator)
        assert even.dtype == dtype
        assert even.isfinite().all()
        assert float(even.var()) == pytest.approx(1, abs=1e-3)
    assert even_normal(torch.randn(1, 3)).isfinite().all()
