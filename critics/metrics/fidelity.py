"""Frechet and kernel distance, precision and recall of images, in the space of their features.

What the literature calls FID, KID, precision and recall, where the feature extractor is Inception;
with another extractor the same arithmetic gives other figures, so say which one it was. The
arithmetic is torch-fidelity's, in float64. `FeatureDistances` keeps the real side's features, and
then every sampler costs only its own.

FID is biased: the fewer the samples, the larger it is, by about c / N with a c that depends on the
distribution (Binkowski et al. 2018; Chong and Forsyth 2020). Published figures have 50,000 samples.
Compare figures of equal N, and read each beside its floor. KID has no bias.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from ...common.arguments import as_tensor, checked
from ...common.reading import DAMAGE, parse_json, reason
from ...common.tensor_files import read_tensors, write_tensors
from ..checks import check_finite, check_samples
from .features import FeatureExtractor, check_extractor
from .two_sample import c2st

Samples = Tensor | NDArray
Statistics = dict[str, NDArray[np.float64]]

# Images in the extractor at once.
_BATCH = 100
_FORMAT = "fewstep-features-1"
# KID: torch-fidelity's number of subsets, their size and the seed that draws them.
_SUBSETS, _SUBSET_SIZE, _SEED = 100, 1000, 2020
# Precision and recall: k of Kynkaanniemi et al., and rows of distances held at once.
NEIGHBOURS = 3
_ROWS = 1000


class FeatureDistances:
    """Distances of sets of images to one set of real images, whose features are computed once.

    Args:
        real: real images (M, C, H, W) in [-1, 1]; M at least 2, for precision and recall 4.
        feature_extractor: maps images to features (N, d), on the images' device.

    Attributes:
        feature_extractor: the same; its name belongs to every figure.
        features: of the real images, (M, d) float32 on the CPU.
        statistics: their mean "mu" (d,) and covariance "sigma" (d, d), float64.

    Raises:
        TypeError: a value of another type.
        ValueError: misshapen, non-finite or too few images, or an extractor that returns no
            finite features (M, d).
    """

    @checked
    def __init__(self, real: Samples, feature_extractor: FeatureExtractor) -> None:
        self.feature_extractor = feature_extractor
        real = as_tensor("real", real)
        self._shape = tuple(real.shape[1:])
        self.features = extract("real", real, feature_extractor)
        self.statistics = _statistics(self.features)

    def __call__(self, samples: Samples) -> dict[str, float]:
        """Return "fid", "kid", "precision", "recall", "c2st" of images (N, C, H, W), N at least 4.

        See the functions of these names.

        Raises:
            ValueError: as in the constructor, or images of another shape than the real ones.
        """
        features = extract("samples", samples, self.feature_extractor, self._shape)
        precision, recall = _precision_recall(features, self.features)
        return {
            "fid": _frechet(_statistics(features), self.statistics),
            "kid": _kernel(features, self.features),
            "precision": precision,
            "recall": recall,
            "c2st": c2st(features, self.features),
        }

    def save(self, path: str | Path) -> None:
        """Write features and statistics to a safetensors file, with the extractor's name."""
        about = {
            "extractor": self.feature_extractor.name,
            "samples": len(self.features),
            "shape": self._shape,
        }
        tensors = {key: torch.from_numpy(value) for key, value in self.statistics.items()}
        tensors["features"] = self.features
        metadata = {"format": _FORMAT, "about": json.dumps(about)}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | Path, feature_extractor: FeatureExtractor, samples: int | None = None
    ) -> FeatureDistances:
        """Read what `save` wrote; the real images are not needed.

        Args:
            path: the file.
            feature_extractor: for the samples to come; its name must be that of the file.
            samples: how many real images it must have been; any number if None.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a corrupt or foreign file, or features of another extractor or of another
                number of images.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No real features at {path}.")
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            about = parse_json(metadata["about"])
            features = tensors["features"]
            statistics = {key: tensors[key].numpy() for key in ("mu", "sigma")}
            extractor, count, shape = about["extractor"], about["samples"], tuple(about["shape"])
            width = features.shape[1]
            if statistics["mu"].shape != (width,) or statistics["sigma"].shape != (width, width):
                raise ValueError("its statistics are not of its features")
            for name, values in {"features": features, **statistics}.items():
                check_finite(name, torch.as_tensor(values))
        except (SafetensorError, *DAMAGE) as error:
            raise ValueError(f"{path} holds no real features of ours: {reason(error)}.") from None
        if extractor != feature_extractor.name:
            raise ValueError(
                f"{path} holds features of {extractor!r}, the extractor is "
                f"{feature_extractor.name!r}: compute them anew."
            )
        if len(features) != count or count != (samples or count):
            raise ValueError(
                f"{path} holds features of {len(features)} images, expected {samples or count}: "
                "compute them anew."
            )
        distances = cls.__new__(cls)
        distances.feature_extractor = feature_extractor
        distances._shape = shape
        distances.features, distances.statistics = features, statistics
        return distances


@checked
def fid(samples: Samples, real: Samples, *, feature_extractor: FeatureExtractor) -> float:
    """Return the squared Frechet distance of Gaussians fitted to the features of two sets.

        ||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

    Heusel et al. 2017, Eq. 6; covariances with N - 1. It is FID where the extractor is Inception.
    Biased upwards for few samples, see above; rounding below 0 is cut off.

    Args:
        samples: images (N, C, H, W) in [-1, 1], N > 1.
        real: images (M, C, H, W), M > 1.
        feature_extractor: see `FeatureExtractor`.

    Raises:
        TypeError: a value of another type, or features that are no tensor.
        ValueError: misshapen, non-finite or too few images, or no finite features (N, d).
    """
    ours, theirs = _both(samples, real, feature_extractor)
    return _frechet(_statistics(ours), _statistics(theirs))


@checked
def kid(samples: Samples, real: Samples, *, feature_extractor: FeatureExtractor) -> float:
    """Return the kernel distance: MMD^2 of the features with kernel (x.y / d + 1)^3.

    Binkowski et al. 2018. The unbiased estimator MMD_u^2 of Gretton et al. 2012, Eq. 3, which
    leaves the pairs (x, x) and (y, y) out and keeps every (x, y), so it can be negative; its mean
    over 100 random subsets of 1,000 of either set, always the same ones. Where a set is smaller,
    the subsets have its size.

    Arguments and errors are those of `fid`.
    """
    return _kernel(*_both(samples, real, feature_extractor))


@checked
def precision_recall(
    samples: Samples, real: Samples, *, feature_extractor: FeatureExtractor
) -> tuple[float, float]:
    """Return precision and recall, 0 to 1, higher is better.

    Kynkaanniemi et al. 2019, Eq. 1-2: the real manifold is the union of the balls around the real
    features that reach to their third neighbour; precision is the share of samples in it, recall
    that of the real images in the samples' manifold. Real against real does not score 1; the floor
    tells what it scores.

    Arguments and errors are those of `fid`, but N and M are above 3.
    """
    return _precision_recall(*_both(samples, real, feature_extractor))


@torch.no_grad()
def extract(
    name: str,
    images: Samples,
    feature_extractor: FeatureExtractor,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the features (N, d) of images, in batches, float32 on the CPU.

    Args:
        name: what the images are called in a message.
        images: (N, C, H, W) in [-1, 1], N > 1; the extractor runs where they are.
        feature_extractor: see `FeatureExtractor`.
        shape: that one image must have; any if None.

    Raises:
        TypeError: a value of another type, or features that are no tensor.
        ValueError: misshapen, non-finite or too few images, or no finite features (N, d).
    """
    check_extractor("feature_extractor", feature_extractor)
    tensor = as_tensor(name, images)
    check_samples(name, tensor, shape)
    check_finite(name, tensor)
    if len(tensor) < 2:
        raise ValueError(f"{name} must be at least 2 images, got {len(tensor)}.")
    parts = []
    for batch in tensor.split(_BATCH):
        features = feature_extractor(batch)
        if not isinstance(features, Tensor):
            raise TypeError(
                f"feature_extractor must return a tensor (N, d), got a {type(features).__name__}."
            )
        if features.ndim != 2 or len(features) != len(batch):
            raise ValueError(
                f"{feature_extractor.name} must return features (N, d) of N images; it made "
                f"{tuple(features.shape)} of {len(batch)}."
            )
        parts.append(features.float().cpu())
    features = torch.cat(parts)
    check_finite(f"What {feature_extractor.name} makes of {name}", features)
    return features


def _both(samples: Samples, real: Samples, extractor: FeatureExtractor) -> tuple[Tensor, Tensor]:
    real = as_tensor("real", real)
    theirs = extract("real", real, extractor)
    return extract("samples", samples, extractor, tuple(real.shape[1:])), theirs


# torch-fidelity takes a second to import, so only those who need it pay.


def _statistics(features: Tensor) -> Statistics:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    # Two dimensions even where there is one feature.
    found = fid_features_to_statistics(features.double())
    return {"mu": found["mu"], "sigma": np.atleast_2d(found["sigma"])}


def _frechet(ours: Statistics, theirs: Statistics) -> float:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return max(0.0, fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID])


def _kernel(ours: Tensor, theirs: Tensor) -> float:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(_SUBSET_SIZE, len(ours), len(theirs))
    whole = size == len(ours) == len(theirs)
    found = kid_features_to_metric(
        ours.double(),
        theirs.double(),
        # A subset of all is the set itself.
        kid_subsets=1 if whole else _SUBSETS,
        kid_subset_size=size,
        rng_seed=_SEED,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN]


def _precision_recall(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    from torch_fidelity.metric_prc import (
        KEY_METRIC_PRECISION,
        KEY_METRIC_RECALL,
        prc_features_to_metric,
    )

    if min(len(ours), len(theirs)) <= NEIGHBOURS:
        raise ValueError(
            f"Precision and recall need at least {NEIGHBOURS + 1} images a side, got {len(ours)} "
            f"and {len(theirs)}."
        )
    found = prc_features_to_metric(
        ours.double(),
        theirs.double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
