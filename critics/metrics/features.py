"""Feature extractors: the space in which the Frechet and kernel distances of images are measured.

A feature extractor maps images (N, C, H, W), floats in [-1, 1], to features (N, d), float32, and
has a `name`, which goes into every result, and a one-line `description`. Only `InceptionFeatures`
gives the FID of the literature; figures in another space compare samplers with each other, and with
nothing published. `ClassifierFeatures` (in `classifier`) is the one that we train ourselves.

Like an image file, every extractor here cuts values outside [-1, 1] off.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.arguments import checked, given
from ...common.reading import DAMAGE
from ..checks import check_finite, check_samples

# The one name under which a Frechet distance may be called FID: torch-fidelity's for its network.
INCEPTION = "inception-v3-compat"


class FeatureExtractor(Protocol):
    """A callable `images (N, C, H, W) in [-1, 1] -> features (N, d) float32`."""

    @property
    def name(self) -> str:
        """Short name, which results carry."""

    @property
    def description(self) -> str:
        """One line: what it is, and its accuracy if it is a classifier's."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return features (N, d) of images (N, C, H, W)."""


def check_extractor(name: str, extractor: object) -> None:
    """Raise TypeError for what is no feature extractor."""
    called = callable(extractor) and not isinstance(extractor, type)
    if not called or not hasattr(extractor, "name"):
        raise TypeError(
            f"{name} must be a feature extractor, which is called and has a name, as "
            f"ClassifierFeatures is one, got {given(extractor)}."
        )


def check_takes(extractor: Any, shape: Sequence[int]) -> None:
    """Raise ValueError for an extractor that says that it takes samples of another shape."""
    wanted = getattr(extractor, "shape", None)
    if wanted is not None and tuple(wanted) != tuple(shape):
        name = getattr(extractor, "name", type(extractor).__name__)
        raise ValueError(
            f"The features {name!r} are of samples of shape {tuple(wanted)}, these have "
            f"{tuple(shape)}."
        )


class NetworkFeatures(nn.Module, ABC):
    """What extractors with a network share; a subclass defines `features`.

    The network is frozen and in evaluation mode, and moves to where the images are.

    Args:
        name: short name, which results carry.
        description: one line.
        shape: (C, H, W) of the images that it takes; None where it takes several.
    """

    def __init__(
        self, name: str, description: str, shape: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.description = description
        self.shape = shape

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, d) float32 of images (N, C, H, W) in [-1, 1].

        Raises:
            ValueError: not images, not of this extractor's shape, or NaN or infinity.
        """
        check_samples("images", images, self.shape)
        if images.ndim != 4:
            raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}.")
        check_finite("images", images)
        self.to(images.device)
        return self.features(images.float().clamp(-1, 1))

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Return features (N, d) of float32 images (N, C, H, W) within [-1, 1]."""

    def freeze(self) -> None:
        """Set evaluation mode and stop gradients."""
        self.eval().requires_grad_(False)


class InceptionFeatures(NetworkFeatures):
    """The 2,048 pooled features of Inception v3, which FID, KID and their figures are defined on.

    torch-fidelity's port of the network of Heusel et al. 2017, which equals the TensorFlow one.
    Images are rounded to 8 bits and resized to 299 pixels by the network; grey ones become RGB.

    Args:
        weights: torch-fidelity's file of weights; looked for in torch hub's cache, where
            torch-fidelity keeps it, if None. Never downloaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of these weights, or one that carries code.
    """

    @checked
    def __init__(self, weights: str | Path | None = None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__(INCEPTION, "Inception v3 of torch-fidelity, 2,048 features")
        path = inception_weights(weights)
        # torch-fidelity unpickles whatever the file holds, so we read it first, safely.
        load_weights(path)
        try:
            self.network = FeatureExtractorInceptionV3(
                INCEPTION, ["2048"], feature_extractor_weights_path=str(path)
            )
        except DAMAGE as error:
            raise foreign_weights(path, "Inception v3 weights", error) from None
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, 2048).

        Raises:
            ValueError: images that are neither grey nor RGB.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Inception takes grey or RGB images, got {images.shape[1]} channels.")
        # The inverse of x / 127.5 - 1.
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        return self.network(pixels.expand(-1, 3, -1, -1))[0]


def inception_weights(path: str | Path | None = None) -> Path:
    """Return the file of Inception's weights: the one given, else that in torch hub's cache.

    Raises:
        FileNotFoundError: it is not there.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    name = URL_INCEPTION_V3.rsplit("/", 1)[1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name if path is None else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"No Inception weights at {file}: download {URL_INCEPTION_V3} to there."
        )
    return file


class Cifar10ResNet(NetworkFeatures):
    """The 64 pooled features of a ResNet-20 that classifies CIFAR-10. Not Inception: no FID.

    The network of He et al. 2016, section 4.2, with parameter-free shortcuts (option A), and the
    weights of github.com/akamaster/pytorch_resnet_cifar10, whose test error is 8.27 %.

    Args:
        path: `resnet20-12fca82f.th`, or the folder that it lies in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of these weights, or one that carries code.
    """

    FILE = "resnet20-12fca82f.th"

    mean: Tensor
    std: Tensor

    @checked
    def __init__(self, path: str | Path) -> None:
        super().__init__(
            "cifar10-resnet20",
            "ResNet-20 classifier of CIFAR-10, 64 features, test accuracy 91.7 %",
            (3, 32, 32),
        )
        path = Path(path)
        file = path / self.FILE if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"No weights of the CIFAR-10 ResNet-20 at {file}.")
        self.network = _ResNet20()
        try:
            weights = load_weights(file)["state_dict"]
            # Saved from a DataParallel.
            weights = {key.removeprefix("module."): value for key, value in weights.items()}
            self.network.load_state_dict(weights)
        except DAMAGE as error:
            raise foreign_weights(file, "weights of the CIFAR-10 ResNet-20", error) from None
        # What these weights were trained with: the usual means and deviations of ImageNet.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, 64)."""
        return self.network(((images + 1) / 2 - self.mean) / self.std)


class _ResNet20(nn.Module):
    """Three stages of three blocks, 16, 32 and 64 wide; attribute names are the file's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Block(i, o), _Block(o, o), _Block(o, o)) for i, o in pairwise(widths)
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 32, 32) to what the linear layer, which is there to be loaded, would get."""
        h = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(h))).mean(dim=(2, 3))


class _Block(nn.Module):
    """Two convolutions around a shortcut; where the width grows, the image halves."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = width // width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.padding = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Option A: every other pixel, and zeros for the new channels on either side.
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(h + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


def load_weights(path: Path) -> dict[str, Any]:
    """Read a torch file of tensors onto the CPU, without running code.

    Raises:
        ValueError: the file is corrupt, or carries more than tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, *DAMAGE) as error:
        raise foreign_weights(path, "a torch file of tensors alone", error) from None


def foreign_weights(path: Path, expected: str, error: Exception) -> ValueError:
    """Build the error that says of a file that it holds other things than expected, and why."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{path} is not {expected}: {reason}")
