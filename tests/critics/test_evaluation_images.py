"""Evaluation of images: feature metrics with floors, like for like, and bounded cost."""

from __future__ import annotations

import pytest
import torch

from fewstep.critics.metrics import c2st, fid, kid, precision_recall, sliced_wasserstein
from fewstep.critics.metrics import evaluation as module
from fewstep.critics.metrics.evaluation import FRESH_SEED, Evaluation
from fewstep.critics.metrics.features import INCEPTION
from fewstep.envs import Target, make_target
from fewstep.runs.reports.console import print_results
from fewstep.runs.reports.results import combine


class Pixels:
    description = "the images themselves"

    def __init__(self, name: str = "pixels") -> None:
        self.name = name
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :4]


def byte_images(training: int, held_out: int, side: int = 2) -> Target:
    generator = torch.Generator().manual_seed(0)
    train, test = (
        torch.randint(256, (n, 1, side, side), generator=generator, dtype=torch.uint8)
        for n in (training, held_out)
    )
    return Target("Bytes", train, held_out=test)


def noise(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, 1, 2, 2, generator=generator) * 2 - 1


NAMES = [
    "frechet_distance[pixels]",
    "kernel_distance[pixels]",
    "precision[pixels]",
    "recall[pixels]",
    "c2st[pixels]",
]


def test_names_say_whose_features_they_are():
    target = byte_images(50, 20)
    plain = Evaluation(target)
    ours = Evaluation(target, features=Pixels())
    official = Evaluation(target, features=Pixels(INCEPTION))
    assert [*ours.floors] == [*plain.floors, *NAMES]
    assert [*official.floors] == [*plain.floors, "fid", "kid", "precision", "recall", "c2st"]
    assert [*official.floors.values()] == [*ours.floors.values()]
    better = [name for name, higher in ours.higher_is_better.items() if higher]
    assert better == NAMES[2:4]


def test_small_sets_are_scored_as_the_mean_over_disjoint_sets():
    target, drawn = byte_images(50, 20), []

    def sample(n: int, generator: torch.Generator) -> torch.Tensor:
        drawn.append(noise(n, generator))
        return drawn[-1]

    extractor = Pixels()
    evaluation = Evaluation(target, features=extractor)
    # Two sets of training images fit into 50, for the floor.
    prepared = extractor.seen
    assert prepared == 20 + 2 * 20
    scores = evaluation(sample)
    # One call of the sampler serves all metrics, and the real side is not looked at again.
    assert [len(samples) for samples in drawn] == [80]
    assert extractor.seen == prepared + 4 * 20

    real = target.sample_fresh(20, FRESH_SEED)
    for sets, found in (
        (drawn[0].split(20), scores),
        (target.take(40).split(20), evaluation.floors),
    ):
        each = [
            (
                fid(part, real, feature_extractor=extractor),
                kid(part, real, feature_extractor=extractor),
                *precision_recall(part, real, feature_extractor=extractor),
                c2st(extractor(part), extractor(real)),
            )
            for part in sets
        ]
        means = torch.tensor(each, dtype=torch.float64).mean(0).tolist()
        assert [found[name] for name in NAMES] == pytest.approx(means, rel=1e-12)
    assert evaluation(noise) == scores
    assert evaluation(noise, seed=1) != scores


def test_a_large_reference_is_scored_once(monkeypatch):
    monkeypatch.setattr(module, "_ENOUGH", 200)
    target = byte_images(250, 300)
    evaluation = Evaluation(target, features=Pixels())
    # No more than the training set has, so that the floor is of the same size.
    assert {m.samples for m in evaluation.metrics if m.name in NAMES} == {250}
    # A sampler that repeats the training set scores its floor.
    scores = evaluation.score(target.take(250))
    assert {name: scores[name] for name in NAMES} == {
        name: evaluation.floors[name] for name in NAMES
    }
    fewer = Evaluation(target, fresh_samples=210, features=Pixels())
    assert {m.samples for m in fewer.metrics if m.name in NAMES} == {210}


def test_samplers_of_images_work_in_bounded_pieces(monkeypatch):
    target = byte_images(30, 20)
    evaluation = Evaluation(target, features=Pixels())
    whole = evaluation(noise)
    monkeypatch.setattr(module, "_DRAWN", 4 * 33)
    asked = []

    def sample(n: int, generator: torch.Generator) -> torch.Tensor:
        asked.append(n)
        return noise(n, generator)

    pieces = evaluation(sample)
    assert asked == [33, 33, 14]
    assert pieces.keys() == whole.keys()


def test_the_live_metric_and_the_pixels_take_few_samples_of_large_images(monkeypatch):
    target, asked = byte_images(3000, 3000, side=4), []

    def sample(n: int, generator: torch.Generator) -> torch.Tensor:
        asked.append(n)
        return target.take(n)

    sizes = [metric.samples for metric in Evaluation(target).metrics]
    assert sizes == [2000, 3000, 2000]
    quick = Evaluation(target).quick(sample)
    assert quick == {"sliced_wasserstein": pytest.approx(0, abs=1e-12)}
    assert sum(asked) == 2000
    monkeypatch.setattr(module, "_NUMBERS", 16 * 100)
    small = Evaluation(target, fresh_samples=300, features=Pixels())
    assert [metric.samples for metric in small.metrics] == [100, 100, 100, *[4 * 300] * 5]
    # Of the live ones only what a classifier sees in features is added.
    assert small.quick(sample).keys() == {"sliced_wasserstein", "c2st[pixels]"}


def test_the_digits_keep_their_metrics_of_pixels():
    target = make_target("Digits")
    evaluation = Evaluation(target)
    assert [metric.samples for metric in evaluation.metrics] == [1297, 500, 500]
    fresh = target.sample_fresh(500, FRESH_SEED)
    expected = sliced_wasserstein(target.take(500), fresh, n_projections=200)
    assert evaluation.floors["sliced_wasserstein_fresh"] == expected


def test_generated_images_never_run_out():
    def sampler(n: int, seed: int) -> torch.Tensor:
        return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    target = Target.from_sampler(sampler, n=30)
    evaluation = Evaluation(target, fresh_samples=100, features=Pixels())
    assert {m.samples for m in evaluation.metrics if m.name in NAMES} == {400}
    assert evaluation.floors["precision[pixels]"] > 0.8


def test_features_of_vectors_are_refused_and_without_fresh_images_there_are_none():
    with pytest.raises(ValueError, match="Feature metrics are for images"):
        Evaluation(make_target("Moons"), features=Pixels())
    bare = Target("Bytes", byte_images(30, 1).take(30))
    assert [*Evaluation(bare, features=Pixels()).floors] == ["sliced_wasserstein"]


def test_the_table_shows_the_whole_name(capsys):
    metrics = combine({"frechet_distance[pixels]": 1.0}, None, {"frechet_distance[pixels]": 2.0})
    run = {"env": "x", "agent": "y", "nfe": 1, "seed": 0, "seconds": 0.0}
    print_results({**run, "metrics": metrics})
    assert "frechet_distance[pixels]" in capsys.readouterr().out
