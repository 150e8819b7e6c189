"""The choice of a feature extractor: in order, with reasons, and a trained one is kept."""

from __future__ import annotations

import functools

import pytest
import torch

from fewstep.critics.metrics.features import Cifar10ResNet
from fewstep.envs import Target, make_target
from fewstep.runs.reports import features as module
from fewstep.runs.reports.features import cache_folder, features_for, real_distances


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """No Inception and no classifier but those that a test puts there; training in no time."""
    quick = functools.partial(module.train_classifier, epochs=1)
    monkeypatch.setattr(module, "train_classifier", quick)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "fewstep"))


def photographs(name: str = "CIFAR10", side: int = 32, seed: int = 0, **options) -> Target:
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        torch.randint(256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
        for n in (40, 20)
    )
    labels = {"labels": torch.arange(40) % 4, "held_out_labels": torch.arange(20) % 4}
    return Target(name, train, **{"held_out": test, **labels, **options})


class StandIn:
    """What is chosen, without its weights."""

    def __init__(self, path=None):
        self.name, self.description, self.path = "inception-v3-compat", "a stand-in", path


def test_vectors_have_no_features(capsys):
    assert features_for(make_target("Moons")) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": None, "held_out_labels": None}, "no Inception weights on disk"),
        ({"labels": None, "held_out_labels": None, "side": 8}, "for images of 32 pixels or more"),
        ({"held_out_labels": None}, "no labels to train a classifier on"),
        ({"labels": torch.ones(40, dtype=torch.int64)}, "all its labels are the same"),
        ({"side": 3}, "too small for a classifier"),
        ({"held_out": None, "held_out_labels": None}, "it has no held-out images"),
    ],
)
def test_one_sentence_says_why_there_are_none(options, reason, capsys):
    assert features_for(photographs(**options)) is None
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("No feature distances for CIFAR10: ")
    assert reason in said


def test_a_classifier_is_trained_once_and_kept(capsys, monkeypatch):
    target = photographs("Small", side=8)
    classifier = features_for(target)
    assert classifier.name == "small-classifier"
    (file,) = cache_folder().iterdir()
    assert file.name.startswith("Small-")
    assert classifier.description in " ".join(capsys.readouterr().out.split())

    def refuse(*args, **options):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_classifier", refuse)
        kept = features_for(target)
        images = target.take(5)
        assert torch.equal(kept(images), classifier(images))
        assert kept.accuracy == classifier.accuracy
        # Other images, or other labels of the same ones, are another target.
        with pytest.raises(AssertionError, match="trained again"):
            features_for(photographs("Small", side=8, seed=1))
        with pytest.raises(AssertionError, match="trained again"):
            features_for(photographs("Small", side=8, labels=torch.arange(40) % 3))
    file.write_bytes(b"half a file")
    assert torch.equal(features_for(target)(images), classifier(images))
    assert "Training it anew" in capsys.readouterr().out
    assert [found.name for found in cache_folder().iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    assert features_for(photographs("Small", side=8)) is not None
    assert "cannot be kept" in capsys.readouterr().out


def test_cifar10_takes_the_resnet_of_the_data_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10_resnet"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="ResNet-20"):
        features_for(photographs(), data_dir=tmp_path)
    monkeypatch.setattr(module, "Cifar10ResNet", StandIn)
    assert features_for(photographs(), data_dir=tmp_path).path == folder
    assert features_for(photographs("Other", side=8), data_dir=tmp_path).name == "other-classifier"
    assert Cifar10ResNet.FILE.endswith(".th")


def test_inception_comes_first_where_its_weights_are(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "InceptionFeatures", StandIn)
    weights = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="No Inception weights at"):
        features_for(photographs(), inception_weights=weights)
    weights.touch()
    assert features_for(photographs(), inception_weights=str(weights)).path == weights
    # The usual cache; and images that are too small for it.
    assert features_for(photographs()).path is None
    small = photographs("Small", side=8)
    assert features_for(small, inception_weights=weights).name == "small-classifier"


def test_real_features_are_kept_for_the_next_run():
    class Pixels:
        name, description = "pixels", "some pixels, for tests"

        def __init__(self, scale=1.0):
            self.scale, self.seen = scale, 0

        def __call__(self, images):
            self.seen += len(images)
            return self.scale * images.flatten(1)[:, 20:26]

    generator = torch.Generator().manual_seed(0)
    real, samples = (torch.rand(60, 1, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    first, second, other = Pixels(), Pixels(), Pixels(2.0)
    scores = real_distances(real, first)(samples)
    assert real_distances(real, second)(samples) == scores
    # The second run looks at a few real images, to be sure that the extractor is the same.
    assert first.seen - second.seen == len(real)
    # Another extractor of the same name has features of its own.
    assert real_distances(real, other)(samples)["fid"] == pytest.approx(4 * scores["fid"])
