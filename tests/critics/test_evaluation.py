"""Evaluation: real samples score the floor, worse ones more, and the same seed scores the same."""

from __future__ import annotations

import pytest
import torch

from fewstep.agents import SolverPolicy
from fewstep.agents.denoisers.exact import mixture
from fewstep.agents.solvers import make_solver
from fewstep.critics import evaluate
from fewstep.critics.metrics.distances import mmd, sliced_wasserstein
from fewstep.critics.metrics.evaluation import NOISE_SEED, Evaluation
from fewstep.envs import DiscreteVP, Schedule, Target, make_target
from fewstep.runs.reports.results import combine


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
        samples = [live, most, min(most, 2000), most, most]
        assert [metric.samples for metric in few.metrics] == samples
    with pytest.raises(ValueError, match="at least two samples"):
        Evaluation(target, fresh_samples=1)


def test_results_are_arranged_by_metric():
    table = combine({"m": 1.0}, None, {"m": 2.0})
    assert table == {"m": {"before": None, "after": 2.0, "floor": 1.0}}


def test_evaluate_is_the_evaluation_with_the_floors_and_the_cost():
    """Three lines give what the command prints, of a policy as of a function."""
    denoiser, target = mixture(DiscreteVP.linear(1000), dimension=2)
    tableau = make_solver("ddim", Schedule.uniform(denoiser.process, 5, end=1.0))
    policy = SolverPolicy(tableau, denoiser)
    report = evaluate(policy, target, 500, seed=3)
    evaluation = Evaluation(target, 500)

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        return policy.sample(n, shape=(2,), generator=generator)

    scores = evaluation(draw, seed=3)
    assert {name: score.value for name, score in report.items()} == scores
    assert {name: score.floor for name, score in report.items()} == evaluation.floors
    assert report.nfe == tableau.nfe == 5
    generator = torch.Generator().manual_seed(NOISE_SEED + 3)
    drawn = evaluate(draw(500, generator), target, nfe=5)
    assert drawn.scores == report.scores
    for word in ("mmd", "floor", f"{report['mmd'].value:.2e}", "network calls a sample: 5"):
        assert word in str(report)
    assert evaluate(draw, target, 500).nfe is None


def test_arrays_are_compared_with_one_half_of_real_arrays():
    source = torch.Generator().manual_seed(0)
    real, ours = torch.randn(4000, 2, generator=source), torch.randn(1000, 2, generator=source)
    report = evaluate((ours + 1).numpy(), real.numpy())
    assert report["sliced_wasserstein"].value == pytest.approx(
        sliced_wasserstein(ours + 1, real[::2][:1000]), rel=1e-6
    )
    # A shift by (1, 1) in root mean square over the directions.
    assert report["sliced_wasserstein_fresh"].value == pytest.approx(1, rel=0.2)
    assert report["mmd"].value > 5 * report["mmd"].floor
    assert report["mmd"].floor < 3 * mmd(real[::2], real[1::2]) + 0.1
    assert {score.samples for score in report.values()} == {1000}


@pytest.mark.parametrize(
    ("sampler", "target", "says"),
    [
        (torch.zeros(10, 3), torch.randn(20, 2), "shape"),
        (torch.full((10, 2), float("nan")), torch.randn(20, 2), "NaN"),
        (torch.zeros(1, 2), torch.randn(20, 2), "at least two"),
        (torch.zeros(10, 2), torch.randn(3, 2), "at least 4 real"),
        (lambda n, generator: torch.zeros(n, 1), torch.randn(20, 2), "shape"),
    ],
)
def test_what_cannot_be_scored_is_refused(sampler, target, says):
    with pytest.raises(ValueError, match=says):
        evaluate(sampler, target)


def test_what_does_not_sample_is_refused():
    with pytest.raises(TypeError, match="A sampler is an agent"):
        evaluate("ddim", torch.randn(20, 2))


def test_a_sampler_that_returns_too_few_is_no_good_one():
    target = make_target("SwissRoll")
    with pytest.raises(ValueError, match="returned 5 samples, asked for 100"):
        evaluate(lambda n, generator: torch.randn(5, 2, generator=generator), target, n=100)
