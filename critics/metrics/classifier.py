"""A small classifier of small images, whose last hidden layer is a feature space of our own.

Where Inception knows nothing (8 x 8 digits, 28 x 28 grey ones), a network trained on the target's
own labels measures what makes its images what they are. `train_classifier` takes seconds for the
digits and a minute or two for MNIST on one core, and measures the accuracy on held-out images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ...common.arguments import at_least, check_seed, checked
from ...common.optimisation import seeded
from ...common.reading import CONSTANTS, DAMAGE, parse_json, reason
from ...common.shapes import check_shape, is_image
from ...common.tensor_files import read_tensors, write_tensors
from ..checks import check_finite, check_samples
from .features import NetworkFeatures

# Goes up with every change of the network or of its training: files of another one are not ours.
RECIPE = 1
WIDTHS = (16, 32, 64)
# Epochs are at least three, and enough for this many images.
_EPOCHS, _IMAGES = 3, 25_000
_BATCH = 500


class ClassifierFeatures(NetworkFeatures):
    """The penultimate layer of a small convolutional classifier: 64 numbers, after the ReLU.

    Convolutions 3 x 3 with batch norm, ReLU and 2 x 2 maximum, until the shorter side is at most 4;
    one more convolution; a linear layer with batch norm and ReLU, the features; a linear layer, the
    classes. `train_classifier` makes trained ones, `load` reads them.

    Args:
        name: short name, which results carry; say what it classifies.
        shape: (C, H, W) of an image, H and W at least 4.
        classes: number of classes, at least 2.

    Attributes:
        accuracy: share of held-out images classified right, 0 to 1; NaN before training.

    Raises:
        ValueError: not the shape of an image, or too few classes.
    """

    DIMENSION = 64

    @checked
    def __init__(self, name: str, shape: Sequence[int], classes: int) -> None:
        check_shape(shape)
        if not is_image(shape) or min(shape[1:]) < 4:
            raise ValueError(
                f"A classifier needs images (C, H, W), H and W at least 4, got {tuple(shape)}."
            )
        if classes < 2:
            raise ValueError(f"A classifier needs at least two classes, got {classes}.")
        super().__init__(name, "", (shape[0], shape[1], shape[2]))
        self.classes = classes
        self.set_accuracy(math.nan)
        width, height, breadth = shape
        layers: list[nn.Module] = []
        widths = chain(WIDTHS, repeat(WIDTHS[-1]))
        while min(height, breadth) > 4:
            wider = next(widths)
            layers += [*_convolution(width, wider), nn.MaxPool2d(2)]
            width, height, breadth = wider, height // 2, breadth // 2
        self.body = nn.Sequential(
            *layers,
            *_convolution(width, WIDTHS[-1]),
            nn.Flatten(),
            nn.Linear(WIDTHS[-1] * height * breadth, self.DIMENSION, bias=False),
            nn.BatchNorm1d(self.DIMENSION),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.DIMENSION, classes)

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, 64)."""
        return self.body(images)

    def logits(self, images: Tensor) -> Tensor:
        """Return the scores (N, classes) of images (N, C, H, W) in [-1, 1]."""
        return self.head(self.body(images))

    def set_accuracy(self, accuracy: float) -> None:
        """Keep the held-out accuracy, and say it in the description."""
        self.accuracy = accuracy
        self.description = (
            f"our classifier of {self.classes} classes, {self.DIMENSION} features, "
            f"held-out accuracy {100 * accuracy:.1f} %"
        )

    def save(self, path: str | Path) -> None:
        """Write weights, name, shape and accuracy to a safetensors file."""
        about = {
            "name": self.name,
            "shape": self.shape,
            "classes": self.classes,
            "accuracy": self.accuracy,
            "recipe": RECIPE,
        }
        weights = {key: value.contiguous() for key, value in self.state_dict().items()}
        write_tensors(path, weights, {"classifier": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> ClassifierFeatures:
        """Read a classifier that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a classifier of this recipe, or a corrupt one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No classifier at {path}.")
        try:
            weights, metadata = read_tensors(path)
            about = parse_json(metadata["classifier"], constants=CONSTANTS)
            if about["recipe"] != RECIPE:
                raise ValueError(f"its recipe is {about['recipe']}, ours {RECIPE}")
            # Before a head of any size is built.
            if (classes := len(weights["head.bias"])) != about["classes"]:
                raise ValueError(f"it has weights for {classes} classes, not {about['classes']}")
            with seeded(0):  # the caller's random numbers stay as they are
                classifier = cls(about["name"], about["shape"], classes)
            classifier.load_state_dict(weights)
            classifier.set_accuracy(float(about["accuracy"]))
            for name, weight in classifier.named_parameters():
                check_finite(name, weight)
        except (SafetensorError, *DAMAGE) as error:
            raise ValueError(
                f"{path} is not a feature classifier of ours: {reason(error)}"
            ) from None
        classifier.freeze()
        return classifier


@checked
def train_classifier(
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    *,
    name: str,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    weight_decay: float = 0.05,
) -> ClassifierFeatures:
    """Train a classifier on labelled images, and measure it on held-out ones.

    AdamW with the one-cycle schedule of Smith and Topin 2019. The same seed, device and number of
    threads give the same classifier.

    Args:
        images: (N, C, H, W) floats in [-1, 1], N > 1; training runs on their device.
        labels: (N,) integers from 0.
        held_out_images: (M, C, H, W), on the same device.
        held_out_labels: (M,) integers from 0.
        name: short name, which results carry.
        seed: of the weights and of the order of the images.
        epochs: passes over the images; if None 3, or what makes 25,000 images if that is more.
        batch_size: images a step, at least 2; a rest that does not fill a batch waits for the next
            shuffle.
        learning_rate: the largest of the cycle.
        weight_decay: of AdamW.

    Raises:
        TypeError: a value of another type.
        ValueError: misshapen or non-finite images, labels that do not fit them, fewer than two
            classes, a budget below one, or a rate or a decay that makes no sense.
    """
    check_seed(seed)
    at_least(0, learning_rate=learning_rate, weight_decay=weight_decay)
    check_samples("images", images)
    check_samples("held_out_images", held_out_images, images.shape[1:])
    for what, values in (("images", images), ("held_out_images", held_out_images)):
        check_finite(what, values)
    _check_labels("labels", labels, len(images))
    _check_labels("held_out_labels", held_out_labels, len(held_out_images))
    classes = 1 + max(int(labels.max()), int(held_out_labels.max()))
    if epochs is None:
        epochs = max(_EPOCHS, math.ceil(_IMAGES / len(images)))
    if epochs < 1 or batch_size < 2 or len(images) < 2:
        raise ValueError(
            "Training needs at least one epoch, two images and two images a batch; got "
            f"{epochs}, {len(images)} and {batch_size}."
        )
    # PyTorch's layers draw their first weights from the global generator alone.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = ClassifierFeatures(name, images.shape[1:], classes).to(images.device)
    batch_size = min(batch_size, len(images))
    batches = len(images) // batch_size
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=learning_rate, weight_decay=weight_decay
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * batches
    )
    generator = torch.Generator().manual_seed(seed)
    labels = labels.to(images.device, torch.int64)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order[: batches * batch_size].view(batches, batch_size):
            loss = F.cross_entropy(classifier.logits(images[rows].float()), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    classifier.freeze()
    classifier.set_accuracy(_accuracy(classifier, held_out_images, held_out_labels))
    return classifier


@torch.no_grad()
def _accuracy(classifier: ClassifierFeatures, images: Tensor, labels: Tensor) -> float:
    guesses = [classifier.logits(part.float()).argmax(1) for part in images.split(_BATCH)]
    return float((torch.cat(guesses) == labels.to(images.device)).double().mean())


def _convolution(width_in: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


def _check_labels(name: str, labels: Tensor, count: int) -> None:
    if labels.is_floating_point() or labels.shape != (count,):
        raise ValueError(
            f"{name} must be {count} integers, one for each image, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if labels.min() < 0:
        raise ValueError(f"{name} must be 0 or more, got {int(labels.min())}.")
