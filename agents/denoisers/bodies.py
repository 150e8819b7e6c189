"""New networks: bodies by name, ours and diffusers' U-Nets as `unet-PRESET`, and denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...common.arguments import check_seed, checked
from ...common.conditions import Classes, Conditions
from ...common.names import unknown_name
from ...common.optimisation import seeded
from ...common.shapes import is_image
from ...envs import DiffusionMDP
from .denoiser import Denoiser
from .networks import MLP, PRESETS, ResidualMLP, SmallUNet, UNet2D, make_body
from .parameterisations import make_parameterisation

UNET = "unet-"
# Bodies that take a condition; those of diffusers take a class, and no other.
CONDITIONAL = ("residual-mlp", "small-unet")
OF_CLASSES = tuple(UNET + preset for preset in PRESETS)
# Continuous times, evenly spaced, at which an MLP has an embedding of its own.
CONTINUOUS_LEVELS = 64


@checked
def named_body(
    name: str | None,
    shape: Sequence[int],
    levels: int,
    time_range: Sequence[float] | None,
    options: Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
) -> nn.Module:
    """Build a body.

    Args:
        name: "mlp", "residual-mlp", "small-unet", or "unet-" and a preset of `UNet2D`; None chooses
            by the shape (`make_body`).
        shape: of one sample.
        levels: number of network times, which only the MLP asks for.
        time_range: of continuous network times.
        options: of the body, such as {"width": 16}.
        conditions: of a conditional body.

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown name or option, a U-Net for vectors, or conditions for a body that
            knows none.
        ImportError: a U-Net of diffusers, which is not installed.
    """
    options = dict(options or {})
    if name is None:
        if options:
            raise ValueError("body_options are for a body that is named.")
        return make_body(shape, levels, time_range, conditions)
    known = ["mlp", "residual-mlp", "small-unet", *(UNET + preset for preset in PRESETS)]
    if name not in known:
        raise unknown_name("body", name, known)
    if conditions is not None:
        able = CONDITIONAL + (OF_CLASSES if isinstance(conditions, Classes) else ())
        if name not in able:
            raise ValueError(f"Body '{name}' knows no {conditions.kind}; {', '.join(able)} do.")
        if isinstance(conditions, Classes):
            options["classes"] = conditions.count
        else:
            options["conditions"] = conditions
    try:
        if name.startswith(UNET):
            preset = name.removeprefix(UNET)
            return UNet2D(shape, preset=preset, time_range=time_range, **options)
        if name == "small-unet" and not is_image(shape):
            raise ValueError(f"Body 'small-unet' is for images; samples here are {tuple(shape)}.")
        if name == "mlp":
            return MLP(shape, levels, time_range=time_range, **options)
        kind = ResidualMLP if name == "residual-mlp" else SmallUNet
        return kind(shape, time_range=time_range, **options)
    except TypeError as error:
        raise ValueError(
            f"Body '{name}' does not take these options: {options} ({error})."
        ) from None


@checked
def new_denoiser(
    mdp: DiffusionMDP,
    seed: int = 0,
    prediction: str | None = None,
    body: str | nn.Module | None = None,
    body_options: Mapping[str, Any] | None = None,
) -> Denoiser:
    """Build an untrained denoiser for an environment, as `fewstep train` does.

    Args:
        mdp: the environment; its process and its samples' shape and standard deviation count, and
            its conditions if it has any.
        seed: of the weights.
        prediction: see `Denoiser`. By default the process's own, "edm" on a `VE` and "flow" on a
            `RectifiedFlow`, else "sample" for images, and for vectors "epsilon", or "v" where the
            last noising leaves no signal.
        body: a name, see `named_body`, by default chosen by the shape; or a module of yours.
        body_options: see `named_body`.

    Raises:
        ValueError: another prediction than the process's own, or as `named_body`.
    """
    check_seed(seed)
    process = mdp.process
    if process.prediction is not None and prediction not in (None, process.prediction):
        raise ValueError(
            f"A network on {process!r} predicts {process.prediction!r}, not {prediction!r}."
        )
    if prediction is None:
        # From pure noise an image's epsilon says little of it: a few-step sampler's first step
        # would magnify the errors of a network that predicts it.
        noise = "epsilon" if process.levels(process.t_max)[0] > 0 else "v"
        prediction = process.prediction or ("sample" if is_image(mdp.shape) else noise)
    parameterisation = make_parameterisation(prediction, process, mdp.target.std)
    if not isinstance(body, nn.Module):
        times = parameterisation.time_range
        levels = int(process.t_max) if times is None else CONTINUOUS_LEVELS
        with seeded(seed):
            body = named_body(body, mdp.shape, levels, times, body_options, mdp.conditions)
    return Denoiser(body, process, parameterisation)
