"""Which feature extractor a target's images are compared with, and where a trained one is kept.

In order: Inception where its weights are on disk and the images are large enough for it, the
CIFAR-10 ResNet of a data folder, a classifier trained on the target's own labels. The table
`CHOICES` is that order; a new kind is one function and one line.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...common.files import cache_root, remove_leftovers, write_atomically
from ...common.shapes import is_image
from ...critics.metrics.classifier import RECIPE, ClassifierFeatures, train_classifier
from ...critics.metrics.features import Cifar10ResNet, FeatureExtractor, InceptionFeatures
from ...critics.metrics.fidelity import FeatureDistances, extract
from ...envs.targets.images import default_data_dir
from ...envs.targets.target import Target
from .console import console

# Smaller images would be mostly interpolation at Inception's 299 pixels.
INCEPTION_SIDE = 32
CLASSIFIER_SIDE = 4
RESNET_FOLDER = "cifar10_resnet"
# Numbers in the images that a classifier is trained on at most, 1 GiB, and images it is tested on.
_NUMBERS, _TESTED = 2**28, 10_000
# Images that stand for all in the name of a cached classifier.
_HASHED = 1000
# Images whose features tell one extractor from another.
_COMPARED = 16


def features_for(
    target: Target,
    *,
    inception_weights: str | Path | None = None,
    data_dir: str | Path | None = None,
    device: torch.device | str | None = None,
) -> FeatureExtractor | None:
    """Choose the feature extractor for a target, training it if need be, and say which it is.

    Args:
        target: the real distribution.
        inception_weights: torch-fidelity's file of Inception weights; if None, where torch-fidelity
            keeps it. Used for images of at least 32 pixels.
        data_dir: folder of data files; CIFAR10 uses the weights in its `cifar10_resnet`.
        device: where a classifier is trained; that of the target if None. An extractor runs where
            the images are.

    Returns:
        The extractor; None for vectors, and for images that none can be had for, which one printed
        sentence explains.

    Raises:
        FileNotFoundError: `inception_weights` is given and is not a file.
        ValueError: a file of weights is corrupt, or not what it should be.
    """
    if inception_weights is not None and not Path(inception_weights).is_file():
        raise FileNotFoundError(f"No Inception weights at {inception_weights}.")
    if not is_image(target.shape):
        return None
    if target.fresh_limit == 0:
        console.print(f"No feature distances for {target.name}: it has no held-out images.")
        return None
    remove_leftovers(cache_folder())
    weights = None if inception_weights is None else Path(inception_weights)
    folder = None if data_dir is None else Path(data_dir)
    reasons: list[str] = []
    for choose in CHOICES:
        features = choose(target, weights, folder, torch.device(device or target.device))
        if not isinstance(features, str):
            if weights is not None and reasons:
                console.print(f"The Inception weights are not used: {reasons[0]}.")
            console.print(f"Features of {target.name}: {features.name}, {features.description}")
            return features
        reasons.append(features)
    console.print(f"No feature distances for {target.name}: {'; '.join(filter(None, reasons))}.")
    return None


def cache_folder() -> Path:
    """Return the folder of trained extractors: see `cache_root`."""
    return cache_root() / "features"


def real_distances(real: Tensor, features: FeatureExtractor) -> FeatureDistances:
    """Return the distances to real images (M, C, H, W), whose features are kept for the next run.

    The file is named by the images and by what the extractor says of a few of them, so another
    extractor of the same name has a file of its own.
    """
    few = extract("real", real[:_COMPARED], features)
    # Three digits: the last ones of a float change with the device.
    about = f"{float(few.mean()):.3g}_{float(few.std()):.3g}"
    file = cache_folder() / f"real-{features.name}-{about}-{_hash(real)}.safetensors"
    try:
        return FeatureDistances.load(file, features, len(real))
    except (FileNotFoundError, ValueError):
        distances = FeatureDistances(real, features)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        write_atomically(file, distances.save)
    return distances


# Each choice takes the target, the Inception weights, the data folder and the device, and returns
# an extractor or the reason why not, a clause or nothing.


def _inception(
    target: Target, weights: Path | None, data_dir: Path | None, device: torch.device
) -> FeatureExtractor | str:
    if min(target.shape[1:]) < INCEPTION_SIDE:
        return f"Inception is for images of {INCEPTION_SIDE} pixels or more"
    if target.shape[0] not in (1, 3):
        return "Inception is for grey or RGB images"
    try:
        return InceptionFeatures(weights)
    except FileNotFoundError:
        return "there are no Inception weights on disk (--inception-weights)"


def _resnet(
    target: Target, weights: Path | None, data_dir: Path | None, device: torch.device
) -> FeatureExtractor | str:
    if target.name != "CIFAR10":
        return ""
    folder = (data_dir or default_data_dir()).expanduser() / RESNET_FOLDER
    return Cifar10ResNet(folder) if folder.is_dir() else f"there is no {folder}"


def _classifier(
    target: Target, weights: Path | None, data_dir: Path | None, device: torch.device
) -> FeatureExtractor | str:
    if target.labels is None or target.held_out_labels is None:
        return "it has no labels to train a classifier on"
    if len(target.labels.unique()) < 2:
        return "all its labels are the same"
    if min(target.shape[1:]) < CLASSIFIER_SIDE:
        return "its images are too small for a classifier"
    file = cache_folder() / f"{target.name}-{_fingerprint(target)}-v{RECIPE}.safetensors"
    try:
        return ClassifierFeatures.load(file)
    except FileNotFoundError:
        pass
    except ValueError as error:
        console.print(f"{error} Training it anew.", markup=False)
    classifier = _trained(target, device)
    try:
        write_atomically(file, classifier.save)
    except OSError as error:
        console.print(f"The classifier cannot be kept for the next run: {error}", markup=False)
    return classifier


CHOICES: tuple[
    Callable[[Target, Path | None, Path | None, torch.device], FeatureExtractor | str], ...
] = (_inception, _resnet, _classifier)


def _trained(target: Target, device: torch.device) -> ClassifierFeatures:
    """Train a classifier on a target's labels."""
    assert target.labels is not None
    count = min(len(target), _NUMBERS // target.shape.numel())
    fresh_limit = target.fresh_limit
    tested = _TESTED if fresh_limit is None else min(_TESTED, fresh_limit)
    console.print(
        f"Training a classifier on {count} images of {target.name}, for its features; this is done "
        "once, and takes seconds to minutes ..."
    )
    return train_classifier(
        target.take(count).to(device),
        target.labels[:count].to(device),
        target.sample_fresh(tested).to(device),
        target.fresh_labels(tested).to(device),
        name=f"{target.name.lower()}-classifier",
    )


def _fingerprint(target: Target) -> str:
    """Hash what tells a target's data from others: shape, sizes, labels, the first images."""
    assert target.labels is not None
    sizes = torch.tensor([len(target), target.fresh_limit or -1])
    return _hash(target.take(_HASHED), target.labels, sizes)


def _hash(*tensors: Tensor) -> str:
    """Hash the shapes and the contents of tensors."""
    digest = hashlib.sha256(repr([tuple(tensor.shape) for tensor in tensors]).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
