"""Evaluation: a sampler against the real distribution, each metric beside its sampling floor.

`Evaluation` prepares the real side once, for several samplers; `report.evaluate` scores one in one
call. The command line's figures are these.

`sliced_wasserstein` is the metric of Fan & Lee (2023): against the training set, 100 projections,
up to 10,000 samples. `sliced_wasserstein_fresh` is the honest one: 200 projections, up to 200,000
samples against as many fresh real points, so a sampler is not rewarded for reproducing the training
set and its own sampling noise is small. `mmd` is the energy distance's square root on up to 2,000
fresh points. `c2st` is the held-out accuracy of a classifier that tells samples from fresh points,
20,000 at most a side: 0.5 is indistinguishable. `off_manifold` is the share of samples off the
curve that a target lies on, where it has one. The floor of a metric is its value between two
independent real sets of the same size, or as large as they are where there are fewer held-out or
training samples than a metric takes: then it is higher than a perfect sampler's score.

Images take fewer samples (2,000 for the first metric, which is also the live one, at most 10,000
for the others) and have the metrics of a feature extractor instead of the last two: `fid`, `kid`,
`precision`, `recall` and `c2st` if it is Inception, else `frechet_distance[NAME]`,
`kernel_distance[NAME]`, `precision[NAME]`, `recall[NAME]` and `c2st[NAME]`; of a conditional
sampler also `class_accuracy[NAME]`, how often the classifier finds the class that was asked for.
Their floor holds training against fresh images. A classifier knows its training images, which
raises that floor where they are few (the digits' Frechet distance from about 0.45 to 0.8); a
sampler can then go below it. All samplers meet the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...common.arguments import check_value, given
from ...common.conditions import Conditional, kind_of
from ...common.shapes import is_image
from ..checks import check_samples
from .distances import SlicedWasserstein, mmd
from .features import INCEPTION, FeatureExtractor, check_extractor
from .fidelity import FeatureDistances, extract
from .manifold import Manifold
from .two_sample import c2st

# Evaluation draws from these seeds, whatever the training seed, so that runs compare like with
# like.
NOISE_SEED, FRESH_SEED, FLOOR_SEED = 10_001, 10_002, 10_003

# Most samples of vectors and of images for a metric; of images also most numbers, 256 MiB of
# float64 for the sliced Wasserstein distance.
_VECTORS, _IMAGES, _LIVE_IMAGES, _NUMBERS = 10_000, 10_000, 2_000, 2**25
# Numbers in the images that a sampler makes in one call.
_DRAWN = 2**20
# Most samples a side that a classifier tells apart.
_CLASSIFIED = 20_000
# And while a run goes on.
_LIVE_CLASSIFIED = 2_000
# Images that a classifier looks at in one call.
_CLASSIFIED_AT_ONCE = 2_000
# With fewer real images than this, feature metrics are means over several sets of samples.
_ENOUGH, _SETS = 2_000, 4

# What FeatureDistances returns: its name where the extractor is not Inception, and which way is up.
_FEATURE_METRICS = {
    "fid": ("frechet_distance", False),
    "kid": ("kernel_distance", False),
    "precision": ("precision", True),
    "recall": ("recall", True),
    "c2st": ("c2st", False),
}

Sampler = Callable[..., Tensor]
Distances = Callable[[Tensor, FeatureExtractor], FeatureDistances]


@runtime_checkable
class Real(Protocol):
    """The real distribution, as `fewstep.envs.Target` is one.

    Attributes:
        name: what messages call it.
        shape: of one sample.
        device: where samples are.
        fresh_limit: how many fresh samples there are; None for any number.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def fresh_limit(self) -> int | None: ...  # noqa: D102

    def __len__(self) -> int: ...

    def take(self, n: int, /) -> Tensor:
        """Return the first n training samples (min(n, len), *shape)."""

    def sample_fresh(self, n: int, seed: int, /) -> Tensor:
        """Return n real samples (n, *shape) that are no training samples."""


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


def check_target(target: object) -> None:
    """Raise TypeError for what is no real distribution."""
    if not isinstance(target, Real) or isinstance(target, type):
        raise TypeError(f"target must be a Target, as mdp.target is one, got {given(target)}.")


class Evaluation:
    """All metrics of an environment, with the real side prepared once.

    Args:
        target: the real distribution, a `Target` for instance.
        fresh_samples: most samples for any metric, at least 2. Images: at most 10,000, and for
            `sliced_wasserstein_fresh` fewer of large ones, 2**25 numbers in all (2,730 RGB images
            of 64 x 64).
        features: extractor in whose space images are compared, too, see `features_for`; None
            compares pixels alone. The reference is as many fresh images as there are, up to
            `fresh_samples`, 10,000 and the number of training images, and a sampler gives as many.
            Where that is below 2,000, the score is the mean over four such sets of samples, and the
            floor over as many sets of training images as there are, up to four: less noise, and the
            bias of either stays that of one set.
        distances: makes the distances to real images (M, C, H, W) in an extractor's space; one of
            your own may keep the features of the real images for the next time.
        conditional: the samplers are conditional: each is asked for samples under the conditions of
            training samples, `sample(n, generator, condition=...)`, classes (True) or another kind.
            If the extractor is a classifier and those samples have labels, `class_accuracy[NAME]`
            is how often it finds that class; the floor is that of fresh real images.

    Attributes:
        metrics: what is measured, in order.

    Raises:
        ValueError: fewer than two samples, too few for a metric, or features of vectors.
        TypeError: a target that is no `Target`, nor has its methods, or another value of another
            type.
    """

    def __init__(
        self,
        target: Real,
        fresh_samples: int = 200_000,
        features: FeatureExtractor | None = None,
        distances: Distances = FeatureDistances,
        conditional: Conditional = False,
    ) -> None:
        check_target(target)
        fresh_samples = check_value("fresh_samples", fresh_samples, int)
        check_value("distances", distances, Callable)
        if features is not None:
            check_extractor("features", features)
        if fresh_samples < 2:
            raise ValueError(f"An evaluation needs at least two samples, got {fresh_samples}.")
        self._images = is_image(target.shape)
        if features is not None and not self._images:
            raise ValueError(
                f"Feature metrics are for images; {target.name} has samples {tuple(target.shape)}."
            )
        limit = target.fresh_limit
        self.target = target
        self._kind = kind_of(conditional)
        labelled = self._kind and getattr(target, "held_out_labels", None) is not None
        self._classifier = features if labelled and hasattr(features, "logits") else None
        self.metrics: list[Metric] = []
        self._measurements: list[_Measurement] = []
        self._live: list[_Measurement] = []
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
            self._add_features(features, min(fresh_limit, _IMAGES), distances)
        if self._classifier is not None and limit:
            fresh = target.sample_fresh(few, FRESH_SEED)
            labels = target.fresh_labels(few, FRESH_SEED)  # type: ignore[attr-defined]
            name = f"class_accuracy[{self._classifier.name}]"
            floor = self._accuracy(fresh, labels)
            self.metrics.append(Metric(name, self.samples, floor, higher_is_better=True))
        if not self._images:
            self._add_classifier(min(count, _CLASSIFIED))
            manifold: Manifold | None = getattr(target, "manifold", None)
            if manifold is not None:
                floor = manifold.off(self._other_real(count))
                self._add("off_manifold", manifold.off, count, floor)
                self._live.append(self._measurements[-1])

    def _affordable(self, most: int) -> int:
        """Cut a number of images to what fits in memory as float64."""
        return max(2, min(most, _NUMBERS // math.prod(self.target.shape)))

    def _add(self, name: str, score: Callable[[Tensor], float], samples: int, floor: float) -> None:
        self.metrics.append(Metric(name, samples, float(floor)))
        self._measurements.append(_Measurement(samples, lambda x: {name: float(score(x))}))

    def _add_classifier(self, count: int) -> None:
        """Add the accuracy of a classifier against `count` fresh samples."""
        fresh = self.target.sample_fresh(count, FRESH_SEED)
        floor = c2st(self._other_real(count), fresh)
        self._add("c2st", lambda samples: c2st(samples, fresh), count, floor)
        few = min(count, _LIVE_CLASSIFIED)
        self._live.append(_Measurement(few, lambda samples: {"c2st": c2st(samples, fresh)}))

    def _add_features(
        self, features: FeatureExtractor, count: int, distances_to: Distances
    ) -> None:
        """Add the metrics of a feature extractor against `count` fresh images, or fewer."""
        if self.target.fresh_limit is not None:
            count = min(count, len(self.target))
        sets = 1 if count >= _ENOUGH else _SETS
        distances = distances_to(self.target.sample_fresh(count, FRESH_SEED), features)
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

        def told(samples: Tensor) -> dict[str, float]:
            shown = extract("samples", samples, features)
            return {names["c2st"]: c2st(shown, distances.features)}

        self._live.append(_Measurement(min(count, _LIVE_CLASSIFIED), told))

    def _accuracy(self, samples: Tensor, classes: Tensor) -> float:
        """Return the share of samples (N, *shape) in which the classifier finds their class."""
        classifier: Any = self._classifier
        with torch.no_grad():
            parts = samples.split(_CLASSIFIED_AT_ONCE)
            found = [classifier.logits(part).argmax(1) for part in parts]
        return float((torch.cat(found) == classes).float().mean())

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

    def __call__(
        self, sample: Sampler, seed: int = 0, device: torch.device | None = None
    ) -> dict[str, float]:
        """Score a sampler `sample(n, generator) -> (n, *shape)` on every metric.

        All metrics share the same samples. Images are asked for in several calls with the same
        generator, about a million numbers at a time, so that a network's activations fit.

        Args:
            sample: the sampler.
            seed: of its noise.
            device: of its generator; the real samples' if None.
        """
        generator = torch.Generator(device or self.target.device).manual_seed(NOISE_SEED + seed)
        return self.score(*self._draw(sample, self.samples, generator))

    @property
    def samples(self) -> int:
        """How many samples all metrics together look at."""
        return max(measurement.samples for measurement in self._measurements)

    def score(self, samples: Tensor, classes: Tensor | None = None) -> dict[str, float]:
        """Score finished samples (N, *shape) on every metric, each on as many as it takes.

        Args:
            samples: (N, *shape).
            classes: those that they were asked for (N,); without, `class_accuracy` is NaN.

        Raises:
            ValueError: samples of another shape, or that are not finite; too few for a metric.
        """
        check_samples("samples", samples, self.target.shape)
        scores: dict[str, float] = {}
        for measurement in self._measurements:
            scores |= measurement.score(samples[: measurement.samples])
        for metric in self.metrics[len(scores) :]:  # the accuracy of classes, if it is measured
            known = classes is not None
            scores[metric.name] = self._accuracy(samples, classes) if known else math.nan  # type: ignore[arg-type]
        return scores

    def quick(self, sample: Sampler) -> dict[str, float]:
        """Score a sampler on what little time allows: the live figures of a training run.

        These are the first metric, `off_manifold` and `c2st` or `c2st[NAME]`, from as many samples
        as the first takes, `c2st` from 2,000. Fewer samples than an evaluation has let the last one
        see less.
        """
        first = self._measurements[0]
        generator = torch.Generator(self.target.device).manual_seed(NOISE_SEED)
        samples, _ = self._draw(sample, first.samples, generator)
        scores: dict[str, float] = {}
        for measurement in (first, *self._live):
            scores |= measurement.score(samples[: measurement.samples])
        return scores

    def _draw(
        self, sample: Sampler, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Return samples (count, *shape), and the classes (count,) that they were asked for.

        Under captions those are the classes of the training samples whose captions they are.
        """
        given = classes = None
        if self._kind is not None:
            draw = self.target.sample_conditions  # type: ignore[attr-defined]
            given, classes = draw(count, generator, self._kind)
        most = max(1, _DRAWN // math.prod(self.target.shape)) if self._images else count
        parts = []
        for done in range(0, count, most):
            size = min(most, count - done)
            under = {} if given is None else {"condition": given[done : done + size]}
            part = sample(size, generator, **under)
            if not isinstance(part, Tensor):
                kind = type(part).__name__
                raise TypeError(f"A sampler must return a tensor (n, *shape), got a {kind}.")
            if len(part) != size:
                raise ValueError(f"The sampler returned {len(part)} samples, asked for {size}.")
            parts.append(part.to(self.target.device))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), classes
