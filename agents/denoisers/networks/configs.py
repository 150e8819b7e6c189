"""What bodies say of themselves, and rebuilding them from it: the contents of files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ....common.arguments import checked
from ....common.names import unknown_name
from ....common.optimisation import seeded
from .dit import DiT
from .mlp import MLP
from .residual_mlp import ResidualMLP
from .small_unet import SmallUNet
from .unet import UNet2D

Module = TypeVar("Module", bound=nn.Module)

# Each under the kind that its `.config` names: a new body is one more line here.
BODIES: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "residual-mlp": ResidualMLP,
    "small-unet": SmallUNet,
    "unet2d": UNet2D,
    "dit": DiT,
}


def declared(body: nn.Module) -> Mapping[str, Any]:
    """Return a body's `.config`, from which `body_from_config` rebuilds it; empty without one."""
    config = getattr(body, "config", None)
    return config if isinstance(config, Mapping) else {}


def own_config(body: nn.Module) -> dict[str, Any] | None:
    """Return the `.config` of a body of `BODIES`; None for a foreign one, whatever it declares."""
    config = declared(body)
    return dict(config) if BODIES.get(str(config.get("kind"))) is type(body) else None


def check_times(body: nn.Module, low: float, high: float) -> None:
    """Check that a body of ours is made for these network times; a foreign one passes.

    Raises:
        ValueError: it has too few levels, or its `time_range` leaves some out.
    """
    config = declared(body) if isinstance(body, tuple(BODIES.values())) else {}
    if config.get("time_range") is not None:
        first, last = config["time_range"]
        slack = 0.01 * (high - low)  # for ranges that were rounded
    elif config.get("kind") == "mlp":
        first, last, slack = 0.0, config["levels"] - 1.0, 0.0
    else:
        return
    if first - slack <= low and high <= last + slack:
        return
    levels = config.get("time_range") is None and low >= 0
    need = f"levels={math.ceil(high) + 1}" if levels else f"time_range=({low:.4g}, {high:.4g})"
    raise ValueError(
        f"The {type(body).__name__} is made for network times {first:.4g} to {last:.4g}, this "
        f"denoiser asks it at {low:.4g} to {high:.4g}: make it with {need}."
    )


@checked
def body_from_config(
    config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Rebuild a body from its `.config`.

    Args:
        config: what the body said of itself.
        weights: those that it is to take, see `built_for`; None builds whatever the config says.

    Raises:
        TypeError: a value of another type, or an argument that the body does not have.
        ValueError: an unknown kind of body, or weights of another.
    """
    arguments = {key: value for key, value in config.items() if key != "kind"}
    name = config.get("kind")
    if not isinstance(name, str) or name not in BODIES:
        raise unknown_name("kind of body", name, BODIES)
    kind = BODIES[name]
    return kind(**arguments) if weights is None else built_for(weights, kind, arguments)


# Arguments of networks that count layers.
_DEPTHS = ("layers", "blocks", "layers_per_block", "num_layers")


def built_for(
    weights: Mapping[str, Tensor], kind: Callable[..., Module], arguments: Mapping[str, Any]
) -> Module:
    """Build a network after seeing that it is one of these weights, and so of their size.

    A damaged file can name a network of any size: it is built without memory first.

    Raises:
        ValueError: the weights have other names or shapes than the network's.
    """
    for name in _DEPTHS:
        count = arguments.get(name, 0)
        if isinstance(count, int) and count > len(weights):
            raise ValueError(f"its weights are {len(weights)} tensors, too few for {name}={count}")
    with torch.device("meta"):
        expected = kind(**arguments).state_dict()
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"its weights do not fit the body: they lack {missing[0]}")
    for name, value in weights.items():
        if name not in expected:
            raise ValueError(f"its weights do not fit the body: it has no {name}")
        if value.shape != expected[name].shape:
            raise ValueError(
                f"its weights do not fit the body: {name} has shape {tuple(value.shape)}, in the "
                f"body {tuple(expected[name].shape)}"
            )
    # Its first weights do not last, and are no reason to draw from the caller's random numbers.
    with seeded(0):
        return kind(**arguments)
