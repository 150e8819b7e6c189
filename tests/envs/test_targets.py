import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.datasets import load_digits, make_swiss_roll

from fewstep.critics import MMDCritic
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


def test_a_pass_draws_every_training_sample_once():
    points = np.arange(10, dtype=np.float32).reshape(5, 2)
    target = Target("t", points, labels=range(5))
    samples, labels = target.draw_in_passes(15, 0, seed=3)
    for one in samples.split(5):
        assert torch.equal(one.sort(dim=0)[0], target.samples)
    assert torch.equal(samples, target.samples[labels])
    assert not torch.equal(samples[:5], samples[5:10])
    # Piece by piece they are the same, so a run that was stopped goes on as if it had not been.
    pieces = [target.draw_in_passes(3, first, seed=3)[0] for first in range(0, 15, 3)]
    assert torch.equal(torch.cat(pieces), samples)
    assert not torch.equal(target.draw_in_passes(15, 0, seed=4)[0], samples)


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


# Float targets: the draws that runs of earlier versions were made with.


def test_draws_of_float_targets_never_change(toy, digits):
    for target in (toy, digits):
        rows = torch.randint(len(target), (50,), generator=torch.Generator().manual_seed(3))
        drawn = target.sample(50, torch.Generator().manual_seed(3))
        assert torch.equal(drawn, target.samples[rows])
        assert torch.equal(target.take(7), target.samples[:7])
        assert target.std == float(target.samples.std())
        assert target.max_abs == float(target.samples.abs().max())
    order = torch.randperm(500, generator=torch.Generator().manual_seed(4))
    whole, first = digits.sample_fresh(500, seed=0), torch.Generator().manual_seed(0)
    unshuffled = torch.empty_like(whole)
    unshuffled[torch.randperm(500, generator=first)] = whole
    assert torch.equal(digits.sample_fresh(20, seed=4), unshuffled[order[:20]])


@pytest.mark.parametrize("name", ["SwissRoll", "Digits"])
def test_a_subset_is_the_one_that_the_default_reward_always_had(name):
    target = make_target(name)
    own = MMDCritic(target.samples, max_real=512)
    assert torch.equal(MMDCritic(target.subset(512)).real, own.real)
    assert torch.equal(target.subset(10**6), target.samples)
    assert len(rows(target.subset(100, seed=1))) == 100
    assert not torch.equal(target.subset(100, seed=1), target.subset(100, seed=2))


def test_a_target_has_a_length_and_gives_no_more_than_that(toy):
    assert len(toy) == 10_000
    assert toy.take(0).shape == (0, 2)
    assert toy.take(10**6).shape == (10_000, 2)
    for ask in (toy.take, toy.subset):
        with pytest.raises(ValueError, match="n must be at least 0; got -1"):
            ask(-1)


# Images as bytes.

image_sets = arrays.arrays(
    np.uint8,
    arrays.array_shapes(min_dims=4, max_dims=4, max_side=6),
    elements=st.integers(0, 255),
)


@settings(deadline=None, max_examples=50)
@given(images=image_sets, seed=st.integers(0, 2**31))
def test_bytes_are_floats_in_disguise(images, seed):
    stored = Target("bytes", images, held_out=images[::-1].copy())
    floats = images.astype(np.float64) / 127.5 - 1
    twin = Target("floats", floats, held_out=floats[::-1].copy())
    assert stored.shape == twin.shape
    assert stored.fresh_limit == twin.fresh_limit == len(stored) == len(twin)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    for mine, other in (
        (stored.samples, twin.samples),
        (stored.take(2), twin.take(2)),
        (stored.subset(2, seed), twin.subset(2, seed)),
        (stored.sample(9, generators[0]), twin.sample(9, generators[1])),
        (stored.sample_fresh(len(images), seed), twin.sample_fresh(len(images), seed)),
    ):
        assert mine.dtype == torch.float32
        # Two roundings of float32 for one of float64.
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-7)
    assert np.array_equal(((stored.samples + 1) * 127.5).round().numpy(), images)


def test_the_ends_of_the_range_are_exact():
    target = Target("ends", np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    assert target.samples.flatten().tolist() == [-1, 1]
    assert target.max_abs == 1


def test_bytes_are_kept_and_not_copied():
    images = np.zeros((4, 1, 2, 2), np.uint8)
    target = Target("mine", images, held_out=images).to("cpu")
    images[:] = 255
    assert (target.take(4) == 1).all()
    assert (target.sample(4) == 1).all()
    assert (target.sample_fresh(4) == 1).all()


@settings(deadline=None, max_examples=30)
@given(images=image_sets, chunk=st.integers(1, 50))
def test_the_standard_deviation_of_bytes_is_exact(images, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.envs.targets.target._CHUNK", chunk)
        std = Target("bytes", images).std
    if images.size > 1:
        expected = (images.astype(np.float64) / 127.5 - 1).std(ddof=1)
        assert std == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_bytes_that_are_no_images_are_numbers():
    target = Target.from_samples(np.array([[3, 200]], np.uint8))
    assert target.samples.tolist() == [[3, 200]]
    assert target.max_abs == 200


def test_a_generator_of_bytes():
    def sampler(n, seed):
        return np.random.default_rng(seed).integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)

    target = Target.from_sampler(sampler, "noise", 50)
    expected = torch.from_numpy(sampler(20, 6)).float() / 127.5 - 1
    assert torch.equal(target.sample_fresh(20, seed=5), expected)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_draws_are_mirrored_half_of_the_time(kind):
    images = np.random.default_rng(0).integers(0, 2, (20, 3, 4, 5)).astype(kind)
    plain = Target("plain", images, held_out=images)
    target = Target("flipped", images, held_out=images, flip=True).to("cpu")
    n = 4000
    drawn = target.sample(n, torch.Generator().manual_seed(1))
    straight = plain.sample(n, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, target.sample(n, torch.Generator().manual_seed(1)))
    same = (drawn == straight).flatten(1).all(1)
    mirrored = (drawn == straight.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - n / 2) < 5 * (n / 4) ** 0.5
    # Mirroring does not depend on which image was drawn.
    share = mirrored[(straight == plain.samples[0]).flatten(1).all(1)].float().mean()
    assert 0.3 < share < 0.7
    assert torch.equal(target.take(20), plain.take(20))
    assert torch.equal(target.sample_fresh(20, 3), plain.sample_fresh(20, 3))


# Labels.


def test_digits_are_labelled(digits):
    known = load_digits()
    images = torch.as_tensor(known.images[:, None] / 8 - 1).float()
    classes = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(images, known.target, strict=True)
    }
    for samples, labels in (
        (digits.samples, digits.labels),
        (digits.sample_fresh(300, seed=9), digits.fresh_labels(300, seed=9)),
    ):
        assert labels.dtype == torch.int64
        assert labels.tolist() == [classes[image.numpy().tobytes()] for image in samples]


def test_labels_follow_the_device_and_are_checked():
    samples, fresh = np.ones((3, 2)), np.zeros((2, 2))
    target = Target("t", samples, held_out=fresh, labels=[1, 0, 2], held_out_labels=[4, 5])
    moved = target.to("cpu")
    assert moved.labels.tolist() == [1, 0, 2]
    assert sorted(moved.fresh_labels(2).tolist()) == [4, 5]
    with pytest.raises(ValueError, match="2 fresh samples, 3 were asked for"):
        target.fresh_labels(3)
    with pytest.raises(ValueError, match="seed must be"):
        target.fresh_labels(1, seed=-1)
    with pytest.raises(ValueError, match="the fresh samples of t have no labels"):
        Target("t", samples, held_out=fresh, labels=[1, 0, 2]).fresh_labels(1)


@pytest.mark.parametrize(
    ("given_labels", "error", "complaint"),
    [
        ({"labels": [0, 1]}, ValueError, r"labels of t must have shape \(3,\); got \(2,\)"),
        ({"labels": [[0], [1], [2]]}, ValueError, r"labels of t must have shape \(3,\)"),
        ({"labels": [0.0, 1.0, 2.0]}, TypeError, "labels of t must be integers; got torch.float32"),
        ({"labels": [True, False, True]}, TypeError, "must be integers; got torch.bool"),
        (
            {"held_out_labels": [0, 1, 2]},
            ValueError,
            r"held-out labels of t must have shape \(0,\)",
        ),
    ],
)
def test_bad_labels_are_refused(given_labels, error, complaint):
    with pytest.raises(error, match=complaint):
        Target("t", np.ones((3, 2)), **given_labels)


def test_bytes_and_floats_are_not_mixed_and_vectors_not_mirrored():
    images = np.zeros((2, 1, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"are torch\.float32, its training samples torch\.uint8"):
        Target("t", images, held_out=images / 255)
    with pytest.raises(ValueError, match="flip is for images"):
        Target("t", np.ones((3, 2)), flip=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_bytes_move_to_a_gpu_as_bytes():
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
    target = Target("t", images, held_out=images, held_out_labels=range(64), flip=True)
    before = torch.cuda.memory_allocated()
    moved = target.to("cuda")
    assert torch.cuda.memory_allocated() - before < 2 * images.size + 4096
    assert torch.equal(moved.take(64).cpu(), target.take(64))
    assert torch.equal(moved.sample_fresh(9, 2).cpu(), target.sample_fresh(9, 2))
    assert torch.equal(moved.fresh_labels(9, 2).cpu(), target.fresh_labels(9, 2))
    assert moved.std == target.std
    draws = [t.sample(99, torch.Generator().manual_seed(0)).cpu() for t in (target, moved)]
    assert torch.equal(*draws)


def test_a_target_keeps_samples_of_its_own():
    given = np.ones((4, 2), dtype=np.float32)
    labels = torch.arange(4)
    target = Target("mine", given, held_out=given, labels=labels)
    given[:] = 7
    labels[:] = 0
    target.samples.mul_(3)
    target.take(2).mul_(3)
    target.subset(4).mul_(3)
    assert target.samples.unique().tolist() == target.sample_fresh(4).unique().tolist() == [1.0]
    assert target.labels.tolist() == [0, 1, 2, 3]


def test_a_fingerprint_tells_contents_apart():
    rng = np.random.default_rng(0)
    bytes_ = torch.from_numpy(rng.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8))
    points = rng.normal(size=(5000, 2))
    other = points.copy()
    other[4321, 1] += 1e-3
    samplers = [
        lambda n, seed, shift=shift: np.random.default_rng(seed).normal(size=(n, 2)) * (1 + shift)
        for shift in (0, 1e-6, 1e-2)
    ]
    targets = [
        Target("mine", bytes_),
        Target("mine", bytes_, labels=torch.arange(30)),
        Target("mine", bytes_[:, :, ::2].contiguous()),
        Target("mine", points),
        Target("mine", other),
        Target("mine", points[::-1].copy()),
        Target.from_sampler(samplers[0], "mine", 5000),
        Target.from_sampler(samplers[2], "mine", 5000),
    ]
    for i, one in enumerate(targets):
        assert [one.matches(two.fingerprint) for two in targets] == [
            i == j for j in range(len(targets))
        ]
        assert one.to("cpu").fingerprint == one.fingerprint
    # The last bits of a generator are its machine's.
    assert Target.from_sampler(samplers[1], n=5000).matches(targets[6].fingerprint)


def test_a_target_without_samples_has_a_shape_and_gives_none():
    target = Target.without_samples((3, 8, 8))
    assert target.shape == (3, 8, 8) and not target.has_samples
    assert Target.from_samples(torch.zeros(2, 3)).has_samples
    with pytest.raises(ValueError, match="no samples to draw"):
        target.sample(1)
    assert not target.to("cpu").has_samples
