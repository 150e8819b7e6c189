"""Evaluation: real samples score the floor, worse ones more, and the same seed scores the same."""

from __future__ import annotations

import pytest
import torch

from fewstep.envs import Target, make_target
from fewstep.runs.evaluation import Evaluation, combine


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return Evaluation(make_target("SwissRoll"), fresh_samples=4000)


def real_sampler(seed: int, shift: float = 0.0):
    target = make_target("SwissRoll")
    return lambda n, generator: target.sample_fresh(n, seed) + shift


def test_real_samples_score_about_the_floor(evaluation):
    scores = evaluation(real_sampler(seed=77))
    for name in ("sliced_wasserstein", "sliced_wasserstein_fresh"):
        assert 0.3 < scores[name] / evaluation.floors[name] < 3


def test_a_shifted_sampler_scores_the_length_of_the_shift_in_one_direction(evaluation):
    # Shifting by (s, s) moves a projection on direction u by s (u_1 + u_2), s in root mean square.
    shifted = evaluation(real_sampler(seed=77, shift=0.2))
    assert shifted["sliced_wasserstein_fresh"] == pytest.approx(0.2, rel=0.1)


def test_scores_repeat_and_the_generator_is_seeded(evaluation):
    def noisy(n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(n, 2, generator=generator)

    assert evaluation(noisy) == evaluation(noisy)
    assert evaluation(noisy, seed=1) != evaluation(noisy)


def test_a_target_without_fresh_samples_has_the_training_metric_alone():
    evaluation = Evaluation(Target.from_samples(torch.randn(100, 2)))
    assert set(evaluation.floors) == {"sliced_wasserstein"}
    assert 0 < evaluation.floors["sliced_wasserstein"] < 1


def test_no_metric_takes_more_samples_than_asked_for():
    target = make_target("SwissRoll")
    for most, live in ((100, 100), (20_000, 10_000)):
        few = Evaluation(target, fresh_samples=most)
        assert [metric.samples for metric in few.metrics] == [live, most, min(most, 2000)]
    with pytest.raises(ValueError, match="at least two samples"):
        Evaluation(target, fresh_samples=1)


def test_results_are_arranged_by_metric():
    table = combine({"m": 1.0}, None, {"m": 2.0})
    assert table == {"m": {"before": None, "after": 2.0, "floor": 1.0}}
