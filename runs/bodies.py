"""Network bodies by name, for `--body`: ours, and diffusers' U-Nets as `unet-PRESET`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..agents.networks import MLP, ResidualMLP, SmallUNet, make_body
from ..agents.solvers import Options
from ..agents.unet import PRESETS, UNet2D
from ..critics.shapes import is_image
from ..envs.names import unknown_name

UNET = "unet-"


def named_body(
    name: str | None,
    shape: Sequence[int],
    levels: int,
    time_range: Sequence[float] | None,
    options: Options | None = None,
) -> nn.Module:
    """Build a body.

    Args:
        name: "mlp", "residual-mlp", "small-unet", or "unet-" and a preset of `UNet2D`; None chooses
            by the shape (`make_body`).
        shape: of one sample.
        levels: number of network times, which only the MLP asks for.
        time_range: of continuous network times.
        options: of the body, such as {"width": 16}.

    Raises:
        ValueError: an unknown name or option, or a U-Net for vectors.
        ImportError: a U-Net of diffusers, which is not installed.
    """
    options = dict(options or {})
    if name is None:
        if options:
            raise ValueError("--body-options are for a body given by --body.")
        return make_body(shape, levels, time_range)
    known = ["mlp", "residual-mlp", "small-unet", *(UNET + preset for preset in PRESETS)]
    if name not in known:
        raise unknown_name("body", name, known)
    try:
        if name.startswith(UNET):
            preset = name.removeprefix(UNET)
            return UNet2D(shape, preset=preset, time_range=time_range, **options)
        if name == "small-unet" and not is_image(shape):
            raise ValueError(f"Body 'small-unet' is for images; samples here are {tuple(shape)}.")
        if name == "mlp":
            return MLP(shape, levels, time_range=time_range, **options)  # type: ignore[arg-type]
        kind = ResidualMLP if name == "residual-mlp" else SmallUNet
        return kind(shape, time_range=time_range, **options)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            f"Body '{name}' does not take these options: {options} ({error})."
        ) from None
