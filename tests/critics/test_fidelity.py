import itertools
import math

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import ortho_group
from sklearn.neighbors import NearestNeighbors
from torch_fidelity import metric_kid
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from fewstep.critics import FeatureDistances, metrics
from fewstep.critics.metrics import c2st, fid, kid, precision_recall

pytestmark = pytest.mark.numeric


class Pixels:
    """The identity, flattened: features whose distribution a test can choose."""

    description = "the images themselves"

    def __init__(self, name="pixels"):
        self.name = name

    def __call__(self, images):
        return images.flatten(1)


def images(points):
    """Points (N, d) as images (N, 1, 1, d), of which they are the `Pixels` features."""
    return torch.as_tensor(points, dtype=torch.float32)[:, None, None, :]


def normal(n, d, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


SCALES = np.array([1.0, 0.3, 2.0, 0.7])


def test_fid_is_the_frechet_distance_of_the_fitted_gaussians():
    x = normal(60, 4, 0) @ normal(4, 4, 1)
    y = normal(80, 4, 2, SCALES, 0.5)
    s, t = np.cov(x.T), np.cov(y.T)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert fid(images(x), images(y), feature_extractor=Pixels()) == pytest.approx(
        expected, rel=1e-5
    )


def test_fid_in_one_dimension_has_a_closed_form():
    x, y = normal(50, 1, 0), normal(70, 1, 1, 3.0, 2.0)
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert fid(images(x), images(y), feature_extractor=Pixels()) == pytest.approx(
        expected, rel=1e-5
    )


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    x, y = normal(12, 3, 0).astype(np.float32), normal(12, 3, 1, shift=0.5).astype(np.float32)

    def k(a, b):
        return (float(np.dot(a.astype(float), b.astype(float))) / 3 + 1) ** 3

    xx = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    yy = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    xy = np.mean([k(a, b) for a, b in itertools.product(x, y)])
    ours = kid(images(x), images(y), feature_extractor=Pixels())
    assert ours == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kid_of_unequal_sets_scatters_around_the_value_of_all_pairs():
    def cubic(x, y):
        return (x @ y.T / 2 + 1) ** 3

    def all_pairs(x, y):
        def distinct(u):
            k = cubic(u, u)
            return (k.sum() - k.trace()) / (len(u) * (len(u) - 1))

        return distinct(x) + distinct(y) - 2 * cubic(x, y).mean()

    # The mean over all subsets is the value of the whole sets; over 100 of them it is near.
    found = [
        (kid(images(x), images(y), feature_extractor=Pixels()), all_pairs(x, y))
        for x, y in ((normal(50, 2, 2 * i), normal(40, 2, 2 * i + 1)) for i in range(60))
    ]
    ours, exact = np.transpose(found)
    assert np.sqrt(np.square(ours - exact).mean()) < 0.2 * exact.std()
    # Unbiased: zero on average between equal distributions, so negative for many.
    assert abs(ours.mean()) < 5 * ours.std() / math.sqrt(60)
    assert ours.min() < 0


def test_kid_takes_a_hundred_subsets_of_a_thousand(monkeypatch):
    chosen = []

    def spy(ours, theirs, **options):
        chosen.append((options["kid_subsets"], options["kid_subset_size"]))
        return {metric_kid.KEY_METRIC_KID_MEAN: 0.0}

    monkeypatch.setattr(metric_kid, "kid_features_to_metric", spy)
    for n, m in ((1500, 1200), (1000, 1000), (700, 900)):
        kid(torch.zeros(n, 1, 1, 2), torch.zeros(m, 1, 1, 2), feature_extractor=Pixels())
    assert chosen == [(100, 1000), (1, 1000), (100, 700)]


def test_precision_and_recall_equal_a_neighbour_search():
    fake, real = normal(90, 3, 0, 0.6, 0.4), normal(70, 3, 1)

    def covered(points, manifold):
        # The nearest of four neighbours is the point itself.
        radius = NearestNeighbors(n_neighbors=4).fit(manifold).kneighbors(manifold)[0][:, -1]
        distance = np.linalg.norm(points[:, None] - manifold[None], axis=-1)
        return (distance <= radius).any(axis=1).mean()

    found = precision_recall(images(fake), images(real), feature_extractor=Pixels())
    assert found == pytest.approx((covered(fake, real), covered(real, fake)), abs=1e-6)
    assert 0 < found[1] < found[0] <= 1


def test_precision_and_recall_tell_dropped_modes_from_bad_samples():
    left, right = normal(100, 2, 0, 0.1, -3), normal(100, 2, 1, 0.1, 3)
    real = images(np.concatenate([left, right]))
    collapsed = images(normal(200, 2, 2, 0.1, -3))
    precision, recall = precision_recall(collapsed, real, feature_extractor=Pixels())
    # Some samples of a mode lie outside its neighbours' balls; of two modes one is covered.
    assert precision > 0.85
    assert recall < 0.55
    far = real + 100
    assert precision_recall(far, real, feature_extractor=Pixels()) == (0, 0)


class _Flat(FeatureExtractorBase):
    """What torch-fidelity calls: bytes in, pixels in [-1, 1] out."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("flat",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "flat"

    def forward(self, x):
        return (x.flatten(1).float() / 127.5 - 1,)


class _Bytes(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, row):
        return self.pixels[row]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_all_metrics_equal_what_torch_fidelity_calculates():
    generator = torch.Generator().manual_seed(0)
    fake = torch.randint(256, (150, 3, 2, 2), generator=generator, dtype=torch.uint8)
    real = torch.randint(40, 200, (120, 3, 2, 2), generator=generator, dtype=torch.uint8)
    name = "fewstep-test-flat"
    torch_fidelity.register_feature_extractor(name, _Flat)
    theirs = torch_fidelity.calculate_metrics(
        input1=_Bytes(fake),
        input2=_Bytes(real),
        feature_extractor=name,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=120,
        cuda=False,
        cache=False,
        verbose=False,
    )
    ours = FeatureDistances(real / 127.5 - 1, Pixels())(fake / 127.5 - 1)
    del ours["c2st"]  # theirs has none
    assert ours == pytest.approx(
        {
            "fid": theirs["frechet_inception_distance"],
            "kid": theirs["kernel_inception_distance_mean"],
            "precision": theirs["precision"],
            "recall": theirs["recall"],
        },
        rel=1e-4,
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-3, 3), d=st.integers(2, 5))
def test_laws_of_translation_and_rotation(seed, shift, d):
    x, y = normal(40, d, seed), normal(30, d, seed + 1, 0.8, 0.3)
    pixels = Pixels()
    moved = fid(images(x + shift), images(x), feature_extractor=pixels)
    assert moved == pytest.approx(d * shift**2, rel=1e-4, abs=1e-5)
    rotation = ortho_group.rvs(d, random_state=seed % 1000)
    before = FeatureDistances(images(y), pixels)(images(x))
    after = FeatureDistances(images(y @ rotation), pixels)(images(x @ rotation))
    assert after["fid"] == pytest.approx(before["fid"], rel=1e-4, abs=1e-5)
    assert after["kid"] == pytest.approx(before["kid"], rel=1e-4, abs=1e-5)
    # One neighbour may change sides by rounding.
    assert after["precision"] == pytest.approx(before["precision"], abs=1.01 / 40)
    assert after["recall"] == pytest.approx(before["recall"], abs=1.01 / 30)
    swapped = fid(images(y), images(x), feature_extractor=pixels)
    assert swapped == pytest.approx(before["fid"], rel=1e-6, abs=1e-8)
    itself = FeatureDistances(images(x), pixels)(images(x))
    assert itself["fid"] == pytest.approx(0, abs=1e-8)
    assert (itself["precision"], itself["recall"]) == (1, 1)


def test_the_prepared_real_side_gives_the_same_figures_and_survives_a_file(tmp_path):
    real, fake = images(normal(40, 3, 0)), images(normal(35, 3, 1, 0.5))
    distances = FeatureDistances(real, Pixels())
    scores = distances(fake)
    both = precision_recall(fake, real, feature_extractor=Pixels())
    assert scores == {
        "fid": fid(fake, real, feature_extractor=Pixels()),
        "kid": kid(fake, real, feature_extractor=Pixels()),
        "precision": both[0],
        "recall": both[1],
        "c2st": c2st(Pixels()(fake), Pixels()(real)),
    }
    assert all(type(score) is float for score in scores.values())
    assert distances(fake.numpy()) == scores
    assert metrics.fid is fid

    file = tmp_path / "real.safetensors"
    distances.save(file)
    loaded = FeatureDistances.load(file, Pixels(), samples=40)
    assert loaded(fake) == scores
    with pytest.raises(ValueError, match=r"must have shape \(N, 1, 1, 3\)"):
        loaded(images(normal(9, 2, 0)))
    with pytest.raises(ValueError, match="features of 'pixels', the extractor is 'other'"):
        FeatureDistances.load(file, Pixels("other"))
    with pytest.raises(ValueError, match="features of 40 images, expected 41"):
        FeatureDistances.load(file, Pixels(), samples=41)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="holds no real features of ours"):
        FeatureDistances.load(file, Pixels())
    with pytest.raises(FileNotFoundError, match="No real features"):
        FeatureDistances.load(tmp_path / "none", Pixels())


@pytest.mark.parametrize(
    ("samples", "extractor", "message"),
    [
        (torch.full((5, 1, 1, 2), math.nan), Pixels(), "samples holds NaN"),
        (torch.zeros(5, 1, 1, 3), Pixels(), r"samples must have shape \(N, 1, 1, 2\)"),
        (torch.zeros(1, 1, 1, 2), Pixels(), "samples must be at least 2 images, got 1"),
        (torch.zeros(5, 1, 1, 2, dtype=torch.uint8), Pixels(), "must be floating point"),
    ],
)
def test_bad_samples_are_refused(samples, extractor, message):
    real = images(normal(9, 2, 0))
    for metric in (fid, kid, precision_recall):
        with pytest.raises(ValueError, match=message):
            metric(samples, real, feature_extractor=extractor)


def test_too_few_neighbours_and_bad_features_are_refused():
    few = images(normal(3, 2, 0))
    with pytest.raises(ValueError, match="at least 4 images a side, got 3 and 3"):
        precision_recall(few, few, feature_extractor=Pixels())
    assert fid(few, few, feature_extractor=Pixels()) == pytest.approx(0, abs=1e-9)

    class Broken(Pixels):
        def __call__(self, images):
            return self.result(images)

    broken = Broken("broken")
    broken.result = lambda x: x
    with pytest.raises(ValueError, match=r"broken must return features \(N, d\)"):
        fid(few, few, feature_extractor=broken)
    broken.result = lambda x: x.flatten(1) / 0
    with pytest.raises(ValueError, match="What broken makes of real holds NaN"):
        fid(few, few, feature_extractor=broken)
