"""Evaluation: a sampler against the real distribution, each metric beside its sampling floor.

`sliced_wasserstein` is paper A's metric: against the training set, 100 projections, up to 10,000
samples. `sliced_wasserstein_fresh` is the honest one: 200 projections, up to 200,000 samples
against as many fresh real points, so a sampler is not rewarded for reproducing the training set
and its own sampling noise is small. `mmd` is the energy distance's square root on up to 2,000
fresh points. The floor of a metric is its value between two independent real sets of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..critics.metrics import SlicedWasserstein, mmd
from ..envs.targets import Target

# Evaluation draws from these seeds, whatever the training seed, so that runs compare like with
# like.
NOISE_SEED, FRESH_SEED, FLOOR_SEED = 10_001, 10_002, 10_003

Sampler = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Metric:
    """One metric: `score` takes samples (samples, *shape); `floor` is what real ones score."""

    name: str
    samples: int
    score: Callable[[Tensor], float]
    floor: float


class Evaluation:
    """All metrics of an environment, with the real side prepared once.

    Args:
        target: the real distribution.
        fresh_samples: most samples for `sliced_wasserstein_fresh`.
    """

    def __init__(self, target: Target, fresh_samples: int = 200_000) -> None:
        if fresh_samples < 1:
            raise ValueError(f"An evaluation needs at least one sample, got {fresh_samples}.")
        limit = target.fresh_limit
        self.target = target
        self.metrics: list[Metric] = []
        training = target.samples[:10_000]
        score = SlicedWasserstein(training, n_projections=100)
        if limit == 0:
            # No fresh data: the floor is that between two halves, and there is no honest metric.
            floor = SlicedWasserstein(training[::2], n_projections=100)(training[1::2])
            self.metrics.append(Metric("sliced_wasserstein", len(training), score, floor))
            return
        size = len(training) if limit is None else min(len(training), limit)
        self._add("sliced_wasserstein", score, len(training), target.sample_fresh(size, FLOOR_SEED))
        count = fresh_samples if limit is None else min(fresh_samples, limit)
        honest = SlicedWasserstein(target.sample_fresh(count, FRESH_SEED), n_projections=200)
        self._add("sliced_wasserstein_fresh", honest, count, self._other_real(count))
        few = min(count, 2000)
        fresh = target.sample_fresh(few, FRESH_SEED)
        self._add("mmd", lambda samples: mmd(samples, fresh), few, self._other_real(few))

    def _add(self, name: str, score: Callable[[Tensor], float], samples: int, real: Tensor) -> None:
        self.metrics.append(Metric(name, samples, score, float(score(real))))

    def _other_real(self, count: int) -> Tensor:
        """Draw real samples independent of the fresh ones: fresh again, or training samples."""
        if self.target.fresh_limit is None:
            return self.target.sample_fresh(count, FLOOR_SEED)
        return self.target.samples[:count]

    @property
    def floors(self) -> dict[str, float]:
        """Each metric's floor."""
        return {metric.name: metric.floor for metric in self.metrics}

    def __call__(self, sample: Sampler, seed: int = 0) -> dict[str, float]:
        """Score a sampler `sample(n, generator) -> (n, *shape)` on every metric."""
        generator = torch.Generator(self.target.device).manual_seed(NOISE_SEED + seed)
        samples = sample(max(metric.samples for metric in self.metrics), generator)
        return {m.name: float(m.score(samples[: m.samples])) for m in self.metrics}

    def quick(self, sample: Sampler) -> float:
        """Score a sampler on the first metric alone: the live figure of a training run."""
        metric = self.metrics[0]
        generator = torch.Generator(self.target.device).manual_seed(NOISE_SEED)
        return float(metric.score(sample(metric.samples, generator)))


def combine(
    floors: Mapping[str, float],
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
) -> dict[str, dict[str, float | None]]:
    """Arrange scores as results.json holds them: metric -> before, after, floor."""
    return {
        name: {
            "before": before[name] if before else None,
            "after": after[name] if after else None,
            "floor": floor,
        }
        for name, floor in floors.items()
    }
