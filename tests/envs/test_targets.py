import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_swiss_roll

from fewstep.envs import Target, make_target

TOYS = ["SwissRoll", "Moons", "GaussianCluster"]


@pytest.fixture(scope="module", params=TOYS)
def toy(request):
    return make_target(request.param)


@pytest.fixture(scope="module")
def digits():
    return make_target("Digits")


def rows(samples):
    return {row.tobytes() for row in samples.flatten(1).numpy()}


def test_toys_are_ten_thousand_fixed_points(toy):
    assert toy.samples.shape == (10_000, 2)
    assert toy.samples.dtype == torch.float32
    assert torch.equal(toy.samples, make_target(toy.name).samples)
    assert toy.samples.abs().max() < 1.2


def test_fresh_points_are_endless_reproducible_and_new(toy):
    assert toy.fresh_limit is None
    fresh = toy.sample_fresh(10_000, seed=0)
    assert torch.equal(fresh, toy.sample_fresh(10_000, seed=0))
    assert not rows(fresh) & rows(toy.samples)
    assert not rows(fresh) & rows(toy.sample_fresh(10_000, seed=1))
    # The same distribution: moments agree within sampling error.
    torch.testing.assert_close(fresh.mean(0), toy.samples.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(fresh.std(0), toy.samples.std(0), atol=0.02, rtol=0)


def test_swiss_roll_is_the_paper_s():
    roll, _ = make_swiss_roll(10_000, noise=0.05, random_state=0)
    expected = torch.as_tensor(roll[:, [0, 2]] / 20).float()
    assert torch.equal(make_target("SwissRoll").samples, expected)


def test_gaussian_cluster_moments():
    samples = make_target("GaussianCluster").samples
    torch.testing.assert_close(samples.mean(0), torch.full((2,), 0.5), atol=5e-4, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.full((2,), 0.01), atol=5e-4, rtol=0)


def test_moons_are_centred():
    samples = make_target("Moons").samples
    assert samples.mean(0).abs().max() < 0.01


def test_digits_split_is_fixed_and_disjoint(digits):
    assert digits.samples.shape == (1297, 1, 8, 8)
    assert digits.samples.min() == -1
    assert digits.samples.max() == 1
    assert digits.fresh_limit == 500
    held_out = digits.sample_fresh(500, seed=3)
    assert torch.equal(held_out, digits.sample_fresh(500, seed=3))
    together = torch.cat([digits.samples, held_out]).flatten(1)
    everything = torch.as_tensor(load_digits().data / 8 - 1).float()
    assert torch.equal(
        torch.unique(together, dim=0, return_counts=True)[1],
        torch.unique(everything, dim=0, return_counts=True)[1],
    )


def test_fresh_digits_run_out(digits):
    assert len(rows(digits.sample_fresh(400, seed=1))) == 400
    with pytest.raises(ValueError, match="500 fresh samples, 501 were asked for"):
        digits.sample_fresh(501)


def test_sample_draws_training_points_with_replacement(toy):
    generator = torch.Generator().manual_seed(0)
    draw = toy.sample(20_000, generator)
    assert rows(draw) <= rows(toy.samples)
    assert torch.equal(draw, toy.sample(20_000, torch.Generator().manual_seed(0)))


def test_own_samples():
    target = Target.from_samples(np.ones((3, 4)), "mine", held_out=np.zeros((2, 4)))
    assert target.shape == (4,)
    assert target.fresh_limit == 2
    assert torch.equal(target.sample_fresh(2), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="0 fresh samples"):
        Target.from_samples(np.ones((3, 4))).sample_fresh(1)


def test_own_sampler():
    def sampler(n, seed):
        return np.random.default_rng(seed).normal(size=(n, 3))

    target = Target.from_sampler(sampler, "normal", 100)
    assert target.samples.shape == (100, 3)
    assert not rows(target.sample_fresh(100, seed=0)) & rows(target.samples)
    assert target.to("cpu").fresh_limit is None


@pytest.mark.parametrize("samples", [np.zeros(3), np.zeros((0, 2)), [[np.nan]], [[np.inf]]])
def test_bad_samples_are_refused(samples):
    with pytest.raises(ValueError, match="samples of custom"):
        Target.from_samples(samples)


def test_a_held_out_split_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="held-out samples of custom have shape"):
        Target.from_samples(np.ones((3, 4)), held_out=np.ones((3, 5)))


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_seeds_out_of_range_are_refused(toy, seed):
    with pytest.raises(ValueError, match="seed must be"):
        toy.sample_fresh(1, seed)


def test_unknown_names_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'SwissRoll'"):
        make_target("swissrol")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_target("Digits", data_dir=tmp_path / "nowhere")
