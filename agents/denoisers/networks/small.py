"""Network bodies ``body(sample, time)``: MLPs for vectors and tiny images, a small U-Net.

`time` is the network's own time (see `NoiseProcess.network_time`), one value a sample. When the
whole batch shares one time the denoiser passes a tensor of stride 0 (an expanded scalar): both
bodies then embed it once instead of N times. Whole indices of noisings come as int64, all other
times as floats (see `Denoiser`). Bodies resolve times 0 .. 1000 or so; `time_range` stretches
others, such as EDM's log(sigma) / 4 from -1.6 to 1.1, to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....common.arguments import checked
from ....common.names import unknown_name
from ....common.precision import in_full_precision
from ....common.shapes import is_image

Module = TypeVar("Module", bound=nn.Module)


def _shared(time: Tensor) -> Tensor:
    """Reduce a time that the whole batch shares (stride 0) to shape (1,)."""
    return time[:1] if time.ndim == 1 and time.stride(0) == 0 else time


def check_range(time_range: Sequence[float] | None) -> list[float] | None:
    """Validate a range of times; JSON gives it as a list."""
    if time_range is None:
        return None
    low, high = time_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"time_range must be finite and increasing, got {tuple(time_range)}.")
    return [float(low), float(high)]


def stretched(time: Tensor, time_range: Sequence[float], top: float) -> Tensor:
    """Map floating times linearly from a range onto 0 .. top."""
    low, high = time_range
    return (time - low) * (top / (high - low))


class MLP(nn.Module):
    """Softplus layers, each multiplied by a learned embedding of the step (paper A, appendix F.1).

    Args:
        shape: shape of one sample; it is flattened.
        levels: number of network times, 0 .. levels - 1. A fractional time interpolates linearly
            between the embeddings of its neighbours.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
        input_gain: the first layer starts this many times as steep as usual. A vector of unit size
            fed to a default layer gives a network that learns only smooth functions and blurs a
            thin manifold; 20 makes the swiss roll sharp. 1 is the usual initialisation.
        time_range: (low, high) of continuous network times; they are mapped linearly onto 0 ..
            levels - 1 (clamped there) and interpolate. None takes times as levels.

    Raises:
        ValueError: `time_range` is not finite and increasing.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        levels: int,
        hidden: int = 128,
        layers: int = 3,
        input_gain: float = 20.0,
        time_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.config = {
            "kind": "mlp",
            "shape": list(shape),
            "levels": levels,
            "hidden": hidden,
            "layers": layers,
            "input_gain": input_gain,
            "time_range": check_range(time_range),
        }
        self.levels = levels
        self.time_range = check_range(time_range)
        dimension = math.prod(shape)
        widths = [dimension, *[hidden] * layers]
        linears = [nn.Linear(i, o) for i, o in pairwise(widths)]
        embeddings = [nn.Embedding(levels, hidden) for _ in range(layers)]
        for embedding in embeddings:
            nn.init.uniform_(embedding.weight, 0.75, 1.25)
        with torch.no_grad():
            # Biases grow less, which keeps the bends of the units inside the data's range.
            linears[0].weight.mul_(input_gain)
            linears[0].bias.mul_(max(0.6 * input_gain, 1.0))
        self.hidden, self.embeddings = nn.ModuleList(linears), nn.ModuleList(embeddings)
        self.out = nn.Linear(hidden, dimension)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the prediction, shaped like `sample` (N, *shape), at network times (N,)."""
        time = _shared(time)
        if self.time_range is not None:
            time = stretched(time.to(sample.dtype), self.time_range, self.levels - 1)
        h = sample.flatten(1)
        for linear, embedding in zip(self.hidden, self.embeddings, strict=True):
            factor = self._embed(embedding, time)
            if len(factor) == 1:
                # One time for all: scaling the weights is cheaper than scaling N activations.
                weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
                h = F.softplus(F.linear(h, weight * factor.T, bias * factor[0]))
            else:
                h = F.softplus(linear(h) * factor)
        return in_full_precision(self.out, h).view_as(sample)

    def _embed(self, embedding: nn.Module, time: Tensor) -> Tensor:
        if not time.is_floating_point():
            # As below: a time before the first noising, rounded to -1, is asked as the first.
            return embedding(time.clamp_min(0))
        time = time.clamp(0, self.levels - 1)
        lower = time.floor()
        upper = (lower + 1).clamp(max=self.levels - 1)
        return torch.lerp(
            embedding(lower.long()), embedding(upper.long()), (time - lower).unsqueeze(-1)
        )


class SinusoidalTime(nn.Module):
    """Sines and cosines of the time at geometric frequencies, then two linear layers.

    Args:
        width: number of sines and cosines, even.
        out: width of the layers.
        time_range: (low, high) of times that are mapped linearly onto 0 .. 1000 first.
    """

    frequencies: Tensor

    def __init__(self, width: int, out: int, time_range: Sequence[float] | None = None) -> None:
        super().__init__()
        self.time_range = check_range(time_range)
        half = width // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, time: Tensor) -> Tensor:
        """Map times (N,) to embeddings (N, out)."""
        if self.time_range is not None:
            time = stretched(time, self.time_range, 1000.0)
        angles = time.unsqueeze(-1) * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1))


class ResidualMLP(nn.Module):
    """Residual layers over the flattened sample, for tiny images such as the 8x8 digits.

    Per step it is several times as fast as a U-Net there, and reaches the same quality sooner.

    Args:
        shape: shape of one sample; it is flattened.
        hidden: width of the residual stream.
        blocks: number of residual blocks.
        time_range: see `SinusoidalTime`.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        hidden: int = 256,
        blocks: int = 3,
        time_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.config = {
            "kind": "residual-mlp",
            "shape": list(shape),
            "hidden": hidden,
            "blocks": blocks,
            "time_range": check_range(time_range),
        }
        dimension, embedding = math.prod(shape), 64
        self.time = SinusoidalTime(embedding, embedding, time_range)
        self.stem = nn.Linear(dimension, hidden)
        self.blocks = nn.ModuleList(_ResidualLayer(hidden, embedding) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, dimension)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the prediction, shaped like `sample` (N, *shape), at network times (N,)."""
        embedding = F.silu(self.time(_shared(time).to(sample.dtype)))
        h = self.stem(sample.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return in_full_precision(self.out, F.silu(self.norm(h))).view_as(sample)


class _ResidualLayer(nn.Module):
    """Two linear layers; the time enters as a scale and a shift. It starts as the identity."""

    def __init__(self, hidden: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulation = nn.Linear(embedding, 2 * hidden)
        self.linear1 = nn.Linear(hidden, hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        for layer in (self.modulation, self.linear2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Map (N, hidden) and embedded times (N or 1, embedding) to (N, hidden)."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        residual = self.linear1(self.norm(h)) * (1 + scale) + shift
        return h + self.linear2(F.silu(residual))


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
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        time_range: Sequence[float] | None = None,
        levels: int = 2,
    ) -> None:
        super().__init__()
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
        }
        embedding = 4 * width
        widths = [width * 2**level for level in range(levels)]
        steps = list(pairwise(widths))
        self.time = SinusoidalTime(width, embedding, time_range)
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

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the prediction (N, C, H, W) for samples (N, C, H, W) at network times (N,)."""
        embedding = self.time(_shared(time).to(sample.dtype))
        h, skips = self.stem(sample), []
        for encode, down in zip(self.encode, self.down, strict=True):
            skips.append(encode(h, embedding))
            h = down(skips[-1])
        for block in self.middle:
            h = block(h, embedding)
        for up, decode in zip(reversed(self.up), reversed(self.decode), strict=True):
            h = decode(torch.cat([skips.pop(), up(h)], dim=1), embedding)
        return in_full_precision(self.out, h)


# `unet` adds UNet2D, "unet2d".
BODIES: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "residual-mlp": ResidualMLP,
    "small-unet": SmallUNet,
}


def make_body(
    shape: Sequence[int], levels: int, time_range: Sequence[float] | None = None
) -> nn.Module:
    """Choose a body: a residual MLP for tiny images, a small U-Net for others, else an MLP.

    The MLP reads all numbers of a sample as one vector, that of a sequence (L, C) too.

    Args:
        shape: shape of one sample.
        levels: number of network times, which only the MLP asks for.
        time_range: (low, high) of the network times where they are not 0 .. levels - 1; see
            `edm_time_range`.
    """
    if not is_image(shape):
        return MLP(shape, levels, time_range=time_range)
    if math.prod(shape) <= 256:
        return ResidualMLP(shape, time_range=time_range)
    levels = 3 if min(shape[1:]) >= 16 and not any(side % 4 for side in shape[1:]) else 2
    return SmallUNet(shape, time_range=time_range, levels=levels)


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


def body_from_config(
    config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Rebuild a body from its `.config`.

    Args:
        config: what the body said of itself.
        weights: those that it is to take, see `built_for`; None builds whatever the config says.

    Raises:
        ValueError: an unknown kind of body, or weights of another.
    """
    arguments = {key: value for key, value in config.items() if key != "kind"}
    if config.get("kind") not in BODIES:
        raise unknown_name("kind of body", config.get("kind"), BODIES)
    kind = BODIES[config["kind"]]
    return kind(**arguments) if weights is None else built_for(weights, kind, arguments)


# Arguments of networks that count layers.
_DEPTHS = ("layers", "blocks", "layers_per_block")


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
    return kind(**arguments)
