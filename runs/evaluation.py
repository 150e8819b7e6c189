"""Evaluation: a sampler against the real distribution, each metric beside its sampling floor.

`sliced_wasserstein` is paper A's metric: against the training set, 100 projections, up to 10,000
samples. `sliced_wasserstein_fresh` is the honest one: 200 projections, up to 200,000 samples
against as many fresh real points, so a sampler is not rewarded for reproducing the training set
and its own sampling noise is small. `mmd` is the energy distance's square root on up to 2,000
fresh points. The floor of a metric is its value between two independent real sets of the same size.

Images take fewer samples (2,000 for the first metric, which is also the live one, at most 10,000
for the others) and have the metrics of a feature extractor besides: `fid`, `kid`, `precision` and
`recall` if it is Inception, else `frechet_distance[NAME]`, `kernel_distance[NAME]`,
`precision[NAME]` and `recall[NAME]`. Their floor holds training against fresh images. A classifier
knows its training images, which raises that floor where they are few (the digits' Frechet distance
from about 0.45 to 0.8); a sampler can then go below it. All samplers meet the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..agents import TrainingDivergedError
from ..critics.features import INCEPTION, FeatureExtractor
from ..critics.metrics import SlicedWasserstein, mmd
from ..critics.shapes import is_image
from ..envs.targets import Target
from .features import real_distances

# Evaluation draws from these seeds, whatever the training seed, so that runs compare like with
# like.
NOISE_SEED, FRESH_SEED, FLOOR_SEED = 10_001, 10_002, 10_003

# Most samples of vectors and of images for a metric; of images also most numbers, 256 MiB of
# float64 for the sliced Wasserstein distance.
_VECTORS, _IMAGES, _LIVE_IMAGES, _NUMBERS = 10_000, 10_000, 2_000, 2**25
# Numbers in the images that a sampler makes in one call.
_DRAWN = 2**20
# With fewer real images than this, feature metrics are means over several sets of samples.
_ENOUGH, _SETS = 2_000, 4

# What FeatureDistances returns: its name where the extractor is not Inception, and which way is up.
_FEATURE_METRICS = {
    "fid": ("frechet_distance", False),
    "kid": ("kernel_distance", False),
    "precision": ("precision", True),
    "recall": ("recall", True),
}

Sampler = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Metric:
    """One metric: `samples` it takes, `floor` is what real ones score."""

    name: str
    samples: int
    floor: float
    higher_is_better: bool = False


@dataclass(frozen=True)
class _Measurement:
    """A way to score samples (samples, *shape), which may give several metrics at once."""

    samples: int
    score: Callable[[Tensor], dict[str, float]]


class Evaluation:
    """All metrics of an environment, with the real side prepared once.

    Args:
        target: the real distribution.
        fresh_samples: most samples for any metric, at least 2. Images: at most 10,000, and for
            `sliced_wasserstein_fresh` fewer of large ones, 2**25 numbers in all (2,730 RGB images
            of 64 x 64).
        features: extractor in whose space images are compared, too, see `features_for`; None
            compares pixels alone. The reference is as many fresh images as there are, up to
            `fresh_samples`, 10,000 and the number of training images, and a sampler gives as many.
            Where that is below 2,000, the score is the mean over four such sets of samples, and the
            floor over as many sets of training images as there are, up to four: less noise, and the
            bias of either stays that of one set.

    Attributes:
        metrics: what is measured, in order.

    Raises:
        ValueError: fewer than two samples, too few for a metric, or features of vectors.
    """

    def __init__(
        self,
        target: Target,
        fresh_samples: int = 200_000,
        features: FeatureExtractor | None = None,
    ) -> None:
        if fresh_samples < 2:
            raise ValueError(f"An evaluation needs at least two samples, got {fresh_samples}.")
        self._images = is_image(target.shape)
        if features is not None and not self._images:
            raise ValueError(
                f"Feature metrics are for images; {target.name} has samples {tuple(target.shape)}."
            )
        limit = target.fresh_limit
        self.target = target
        self.metrics: list[Metric] = []
        self._measurements: list[_Measurement] = []
        most = self._affordable(_LIVE_IMAGES) if self._images else _VECTORS
        training = target.take(min(most, fresh_samples))
        score = SlicedWasserstein(training, n_projections=100)
        if limit == 0:
            # No fresh data: the floor is that between two halves, and there is no honest metric.
            floor = SlicedWasserstein(training[::2], n_projections=100)(training[1::2])
            self._add("sliced_wasserstein", score, len(training), floor)
            return
        size = len(training) if limit is None else min(len(training), limit)
        floor = score(target.sample_fresh(size, FLOOR_SEED))
        self._add("sliced_wasserstein", score, len(training), floor)
        fresh_limit = fresh_samples if limit is None else min(fresh_samples, limit)
        count = min(fresh_limit, self._affordable(_IMAGES)) if self._images else fresh_limit
        honest = SlicedWasserstein(target.sample_fresh(count, FRESH_SEED), n_projections=200)
        floor = honest(self._other_real(count))
        self._add("sliced_wasserstein_fresh", honest, count, floor)
        few = min(count, 2000)
        fresh = target.sample_fresh(few, FRESH_SEED)
        floor = mmd(self._other_real(few), fresh)
        self._add("mmd", lambda samples: mmd(samples, fresh), few, floor)
        if features is not None:
            self._add_features(features, min(fresh_limit, _IMAGES))

    def _affordable(self, most: int) -> int:
        """Cut a number of images to what fits in memory as float64."""
        return max(2, min(most, _NUMBERS // math.prod(self.target.shape)))

    def _add(self, name: str, score: Callable[[Tensor], float], samples: int, floor: float) -> None:
        self.metrics.append(Metric(name, samples, float(floor)))
        self._measurements.append(_Measurement(samples, lambda x: {name: float(score(x))}))

    def _add_features(self, features: FeatureExtractor, count: int) -> None:
        """Add the metrics of a feature extractor against `count` fresh images, or fewer."""
        if self.target.fresh_limit is not None:
            count = min(count, len(self.target))
        sets = 1 if count >= _ENOUGH else _SETS
        distances = real_distances(self.target.sample_fresh(count, FRESH_SEED), features)
        official = features.name == INCEPTION
        names = {
            key: key if official else f"{ours}[{features.name}]"
            for key, (ours, _) in _FEATURE_METRICS.items()
        }

        def score(samples: Tensor) -> dict[str, float]:
            whole = len(samples) // count
            found = [distances(part) for part in samples[: whole * count].split(count)]
            return {name: sum(f[key] for f in found) / whole for key, name in names.items()}

        floors = score(self._other_real(sets * count))
        for key, (_, higher) in _FEATURE_METRICS.items():
            self.metrics.append(Metric(names[key], sets * count, floors[names[key]], higher))
        self._measurements.append(_Measurement(sets * count, score))

    def _other_real(self, count: int) -> Tensor:
        """Draw real samples independent of the fresh ones: fresh again, or training samples."""
        if self.target.fresh_limit is None:
            return self.target.sample_fresh(count, FLOOR_SEED)
        return self.target.take(count)

    @property
    def floors(self) -> dict[str, float]:
        """Each metric's floor."""
        return {metric.name: metric.floor for metric in self.metrics}

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """Which way is up, for each metric."""
        return {metric.name: metric.higher_is_better for metric in self.metrics}

    def __call__(self, sample: Sampler, seed: int = 0) -> dict[str, float]:
        """Score a sampler `sample(n, generator) -> (n, *shape)` on every metric.

        All metrics share the same samples. Images are asked for in several calls with the same
        generator, about a million numbers at a time, so that a network's activations fit.
        """
        generator = torch.Generator(self.target.device).manual_seed(NOISE_SEED + seed)
        samples = self._draw(sample, max(m.samples for m in self._measurements), generator)
        scores: dict[str, float] = {}
        for measurement in self._measurements:
            scores |= measurement.score(samples[: measurement.samples])
        return scores

    def quick(self, sample: Sampler) -> float:
        """Score a sampler on the first metric alone: the live figure of a training run."""
        measurement = self._measurements[0]
        generator = torch.Generator(self.target.device).manual_seed(NOISE_SEED)
        samples = self._draw(sample, measurement.samples, generator)
        return measurement.score(samples)[self.metrics[0].name]

    def _draw(self, sample: Sampler, count: int, generator: torch.Generator) -> Tensor:
        if not self._images:
            return sample(count, generator)
        most = max(1, _DRAWN // math.prod(self.target.shape))
        return torch.cat(
            [sample(min(most, count - done), generator) for done in range(0, count, most)]
        )


def finite(sample: Sampler, timesteps: int) -> Sampler:
    """Return a sampler that raises TrainingDivergedError instead of giving NaN or infinity.

    Args:
        sample: of the agent in training.
        timesteps: its denoiser calls so far.
    """

    def draw(n: int, generator: torch.Generator) -> Tensor:
        samples = sample(n, generator)
        if not samples.isfinite().all():
            raise TrainingDivergedError("a sample", timesteps)
        return samples

    return draw


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
