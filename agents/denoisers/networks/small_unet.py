"""`SmallUNet`: the U-Net of those who do not have diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....common.arguments import checked
from ....common.conditions import Conditions, as_conditions, condition_config
from ....common.precision import in_full_precision
from ....common.shapes import check_shape, is_image
from .times import SinusoidalTime, check_range, shared


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation; the time enters as a scale and a shift."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out)
        self.norm2 = nn.GroupNorm(8, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Map (N, channels, H, W) and embedded times (N or 1, embedding) to (N, out, H, W)."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        residual = self.conv1(F.silu(self.norm1(h)))
        residual = self.norm2(residual) * (1 + scale) + shift
        return self.skip(h) + self.conv2(F.silu(residual))


# Each halves the image and doubles the width.
_MOST_LEVELS = 8


class SmallUNet(nn.Module):
    """A U-Net without attention for small images, of two resolutions or three.

    About 0.3 million weights with two, 1.2 million with three, which see the whole of an image of
    28 or 32 pixels at half the cost of as many weights at full resolution.

    Args:
        shape: (channels, height, width); height and width are divisible by 2^(levels - 1).
        width: channels at full resolution (a multiple of 8); twice as many at each coarser one.
        time_range: see `SinusoidalTime`.
        levels: number of resolutions, 1 to 8.
        classes: number of classes of a conditional network; None for an unconditional one.
        conditions: other conditions of a conditional network, `Captions(64)` say.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        time_range: Sequence[float] | None = None,
        levels: int = 2,
        classes: int | None = None,
        conditions: Conditions | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        conditions = as_conditions(conditions, classes)
        check_shape(shape)
        if not is_image(shape):
            raise ValueError(f"SmallUNet is for images (C, H, W), got {tuple(shape)}.")
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}.")
        channels, height, breadth = shape
        if not 1 <= levels <= _MOST_LEVELS:
            raise ValueError(f"levels must be 1 to {_MOST_LEVELS}, got {levels}.")
        factor = 2 ** (levels - 1)
        if height % factor or breadth % factor:
            raise ValueError(
                f"SmallUNet halves the image {levels - 1} times: its sides must be divisible by "
                f"{factor}, got {height}x{breadth}."
            )
        self.config = {
            "kind": "small-unet",
            "shape": list(shape),
            "width": width,
            "time_range": check_range(time_range),
            "levels": levels,
            **condition_config(conditions),
        }
        embedding = 4 * width
        widths = [width * 2**level for level in range(levels)]
        steps = list(pairwise(widths))
        self.time = SinusoidalTime(width, embedding, time_range)
        self.label = None if conditions is None else conditions.embedder(embedding)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encode = nn.ModuleList(ResidualBlock(w, w, embedding) for w in widths[:-1])
        self.down = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in steps
        )
        self.middle = nn.ModuleList(
            ResidualBlock(widths[-1], widths[-1], embedding) for _ in range(2)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in steps
        )
        self.decode = nn.ModuleList(ResidualBlock(2 * w, w, embedding) for w in widths[:-1])
        self.out = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )

    def forward(self, sample: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the prediction (N, C, H, W) for samples (N, C, H, W) at network times (N,).

        A conditional network takes conditions (N, ...), "none" among them.
        """
        h, skips, embedding = self._encode(sample, time, condition)
        for up, decode in zip(reversed(self.up), reversed(self.decode), strict=True):
            h = decode(torch.cat([skips.pop(), up(h)], dim=1), embedding)
        return in_full_precision(self.out, h)

    def representation(
        self, sample: Tensor, time: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Return the coarsest maps (N, channels, H, W) that `forward` makes of its arguments."""
        return self._encode(sample, time, condition)[0]

    def _encode(
        self, sample: Tensor, time: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the coarsest maps, the finer ones, and the embedding of times and conditions."""
        embedding = self.time(shared(time).to(sample.dtype))
        if self.label is not None and condition is not None:
            embedding = embedding + self.label(shared(condition))
        h, skips = self.stem(sample), []
        for encode, down in zip(self.encode, self.down, strict=True):
            skips.append(encode(h, embedding))
            h = down(skips[-1])
        for block in self.middle:
            h = block(h, embedding)
        return h, skips, embedding
