"""New networks: bodies by name, ours and diffusers' U-Nets as `unet-PRESET`, and denoisers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...common.names import unknown_name
from ...common.optimisation import seeded
from ...common.shapes import is_image
from ...envs import VE, DiffusionMDP
from ..solvers import Options
from .denoiser import Denoiser, edm_time_range
from .networks.small import MLP, ResidualMLP, SmallUNet, make_body
from .networks.unet import PRESETS, UNet2D

UNET = "unet-"
# Noise levels, evenly spaced in their logarithm, at which an MLP has an embedding of its own.
EDM_LEVELS = 64


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
            raise ValueError("body_options are for a body that is named.")
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


def new_denoiser(
    mdp: DiffusionMDP,
    seed: int = 0,
    prediction: str | None = None,
    body: str | nn.Module | None = None,
    body_options: Options | None = None,
) -> Denoiser:
    """Build an untrained denoiser for an environment, as `fewstep train` does.

    Args:
        mdp: the environment; its process and its samples' shape and standard deviation count.
        seed: of the weights.
        prediction: see `Denoiser`. By default "edm" on a `VE` process, else "sample" for images
            and "epsilon" for vectors.
        body: a name, see `named_body`, by default chosen by the shape; or a module of yours.
        body_options: see `named_body`.

    Raises:
        ValueError: another prediction than "edm" on a `VE` process, or as `named_body`.
    """
    process = mdp.process
    time_range = None
    if isinstance(process, VE):
        if prediction not in (None, "edm"):
            raise ValueError(f"A ve process is cloned with prediction 'edm', not {prediction!r}.")
        prediction, levels, time_range = "edm", EDM_LEVELS, edm_time_range(process)
    else:
        levels = int(process.t_max)
    if prediction is None:
        # From pure noise an image's epsilon says little of it: a few-step sampler's first step
        # would magnify the errors of a network that predicts it.
        prediction = "sample" if is_image(mdp.shape) else "epsilon"
    if not isinstance(body, nn.Module):
        with seeded(seed):
            body = named_body(body, mdp.shape, levels, time_range, body_options)
    sigma_data = mdp.target.std
    return Denoiser(body, process, prediction, sigma_data)  # type: ignore[arg-type]
