"""The body that a new denoiser gets where none is named."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ....common.arguments import checked
from ....common.conditions import Conditions
from ....common.shapes import is_image
from .mlp import MLP
from .residual_mlp import ResidualMLP
from .small_unet import SmallUNet


@checked
def make_body(
    shape: Sequence[int],
    levels: int,
    time_range: Sequence[float] | None = None,
    conditions: Conditions | None = None,
) -> nn.Module:
    """Choose a body: a residual MLP for tiny images, a small U-Net for others, else an MLP.

    The MLP reads all numbers of a sample as one vector, that of a sequence (L, C) too.

    Args:
        shape: shape of one sample.
        levels: number of network times, which only the MLP asks for.
        time_range: (low, high) of the network times where they are not 0 .. levels - 1; see
            `edm_time_range`.
        conditions: of a conditional network, which for vectors is a residual MLP.

    Raises:
        TypeError: a value of another type.
        ValueError: an empty shape, no levels of an MLP, or sides that a U-Net cannot halve.
    """
    if not is_image(shape) and conditions is None:
        return MLP(shape, levels, time_range=time_range)
    if not is_image(shape) or math.prod(shape) <= 256:
        return ResidualMLP(shape, time_range=time_range, conditions=conditions)
    levels = 3 if min(shape[1:]) >= 16 and not any(side % 4 for side in shape[1:]) else 2
    return SmallUNet(shape, time_range=time_range, levels=levels, conditions=conditions)
