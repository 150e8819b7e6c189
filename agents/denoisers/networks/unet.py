"""U-Nets for images: diffusers' `UNet2DModel` as a body, with the sizes of the literature by name.

It is the network of Ho et al. 2020 (appendix B) in the form that the hub's checkpoints have, so
that `fewstep.agents.pretrained` exchanges weights with diffusers as they are.
diffusers is imported when a U-Net is built, not before: `pip install "fewstep[images]"`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ....common.arguments import at_least, checked
from ....common.conditions import as_conditions, condition_config
from ....common.names import unknown_name
from ....common.shapes import check_shape, is_image
from .times import check_range, stretched


def _preset(
    channels: Sequence[int], attention: int | None, layers: int, groups: int, dropout: float
) -> dict[str, Any]:
    """Ho et al.'s architecture: per-level channels, and the level that has self-attention."""
    levels = range(len(channels))
    return {
        "block_out_channels": list(channels),
        "down_block_types": [
            "AttnDownBlock2D" if level == attention else "DownBlock2D" for level in levels
        ],
        "up_block_types": [
            "AttnUpBlock2D" if level == attention else "UpBlock2D" for level in reversed(levels)
        ],
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "dropout": dropout,
        # How the original code pads, embeds times and normalises; one attention head.
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    }


# Weights for the usual channels (1, 3, 3): 0.43, 35.7 and 78.7 million.
PRESETS: dict[str, dict[str, Any]] = {
    # 8x8 digits and up; the sides are even.
    "tiny": _preset((32, 48), None, layers=1, groups=8, dropout=0.0),
    # Ho et al. 2020, appendix B, attention at 16x16: the network of google/ddpm-cifar10-32.
    "cifar10": _preset((128, 256, 256, 256), 1, layers=2, groups=32, dropout=0.1),
    # Song et al. 2021 (DDIM), the CelebA configuration, attention at 16x16.
    "celeba64": _preset((128, 256, 256, 256, 512), 2, layers=2, groups=32, dropout=0.1),
}


class UNet2D(nn.Module):
    """diffusers' `UNet2DModel` as a body `body(sample, time)`.

    Args:
        shape: (channels, height, width) of one sample; both sides can be halved once for each level
            but the last.
        preset: a key of `PRESETS`, "tiny" (8x8 and up), "cifar10" (32x32) or "celeba64" (64x64);
            None starts from diffusers' own defaults, a network of 114 million weights.
        time_range: (low, high) of times that are mapped linearly onto 0 .. 1000 first, as in
            `SinusoidalTime`. None takes times as they are.
        classes: number of classes of a conditional network, which gets `classes` itself for none;
            None for an unconditional one. `num_class_embeds` is one more than that by default, and
            equal to it in a network that knows no "none".
        diffusers_options: arguments of `UNet2DModel`, which win over the preset's.

    Attributes:
        unet: the `UNet2DModel`.
        config: what `body_from_config` rebuilds the body from.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: unknown preset or option, sides that cannot be halved, a network that wants
            other times than numbers, classes that are not those of its embeddings, or a bad
            `time_range`.
    """

    unet: Any
    config: dict[str, Any]
    time_range: list[float] | None

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        preset: str | None = None,
        time_range: Sequence[float] | None = None,
        classes: int | None = None,
        **diffusers_options: Any,
    ) -> None:
        super().__init__()
        require_diffusers("UNet2D")
        from diffusers import UNet2DModel

        if preset is not None and preset not in PRESETS:
            raise unknown_name("U-Net preset", preset, PRESETS)
        known = set(inspect.signature(UNet2DModel).parameters) - _FROM_SHAPE
        for option in diffusers_options:
            if option not in known:
                raise unknown_name("option of UNet2DModel", option, known)
        check_shape(shape)
        at_least(1, classes=classes)
        if not is_image(shape):
            raise ValueError(
                f"UNet2D is for images, (channels, height, width); got shape {tuple(shape)}."
            )
        channels, height, width = (int(size) for size in shape)
        if classes is not None and not diffusers_options.keys() & _CLASS_OPTIONS:
            diffusers_options["num_class_embeds"] = classes + 1
        model = UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            **{**(PRESETS[preset] if preset else {}), **diffusers_options},
        )
        self._hold(model, time_range, classes)

    @classmethod
    def from_model(
        cls, model: Any, time_range: Sequence[float] | None = None, classes: int | None = None
    ) -> UNet2D:
        """Make a body of a `UNet2DModel` that exists, sharing its weights.

        Args:
            model: the network; its config says `sample_size`.
            time_range: as for the class.
            classes: as for the class; by default every class embedding is that of a class. A
                network with `class_embed_type="timestep"` needs it.

        Raises:
            ValueError: as for the class; or the model predicts other channels than it reads, or
                names no sample size.
        """
        body = cls.__new__(cls)
        nn.Module.__init__(body)
        body._hold(model, time_range, classes)
        return body

    def _hold(
        self, model: Any, time_range: Sequence[float] | None, classes: int | None = None
    ) -> None:
        shape = check_config(model.config)
        classes = class_count(model.config, classes)
        self.unet = model
        self.time_range = check_range(time_range)
        options = {key: value for key, value in model.config.items() if not key.startswith("_")}
        self.config = {
            "kind": "unet2d",
            "shape": shape,
            "time_range": self.time_range,
            **condition_config(as_conditions(None, classes)),
            **{
                key: list(value) if isinstance(value, tuple) else value
                for key, value in options.items()
                if key not in _FROM_SHAPE
            },
        }

    def forward(self, sample: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the prediction (N, C, H, W) for samples (N, C, H, W) at network times (N,).

        A conditional network takes classes (N,) int64, `classes` itself for none.

        Raises:
            ValueError: "none" of a network that has no embedding for it.
        """
        time = unet_time(time, self.time_range)
        try:
            return self.unet(sample, time, class_labels=condition, return_dict=False)[0]
        except IndexError:
            if condition is None or self.knows_none is not False:
                raise
            raise ValueError(
                f"This network has class embeddings for {self.config['classes']} classes and none "
                'for "no class", which guidance, label_dropout and sampling without a class need.'
            ) from None

    def representation(
        self, sample: Tensor, time: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Return the coarsest maps (N, channels, H, W) that `forward` makes of its arguments."""
        kept: list[Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(lambda *call: kept.append(call[-1]))
        try:
            self(sample, time, condition)
        finally:
            hook.remove()
        return kept[0]

    @property
    def knows_none(self) -> bool | None:
        """Whether it has an embedding for "no class"; None if classes are embedded as numbers."""
        rows = self.config["num_class_embeds"]
        if self.config["class_embed_type"] is not None or rows is None:
            return None
        return rows > self.config["classes"]

    @property
    def out(self) -> nn.Module:
        """The last layer; its input (N, channels of the first level, H, W) are the features."""
        return self.unet.conv_out


# Options of UNet2DModel that the shape decides.
_FROM_SHAPE = {"sample_size", "in_channels", "out_channels"}
# Those that say how it knows its classes.
_CLASS_OPTIONS = {"num_class_embeds", "class_embed_type"}


def unet_time(time: Tensor, time_range: Sequence[float] | None) -> Tensor:
    """Map network times to those that the `UNet2DModel` inside a `UNet2D` is asked at."""
    return time if time_range is None else stretched(time, time_range, 1000.0)


def network_time_of_unet(time: Tensor, time_range: Sequence[float] | None) -> Tensor:
    """Map times that a `UNet2DModel` is asked at back to network times: undoes `unet_time`."""
    if time_range is None:
        return time
    low, high = time_range
    return low + time * ((high - low) / 1000.0)


def require_diffusers(what: str) -> None:
    """Raise ImportError with the command that helps if diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{what} needs diffusers ({error}): pip install "fewstep[images]".'
        ) from None


def check_config(config: Any) -> list[int]:
    """Return (C, H, W) of a UNet2DModel's samples; ValueError if it cannot be a plain body."""
    size = config["sample_size"]
    if size is None:
        raise ValueError("The UNet2DModel's config names no sample_size, the sides of its images.")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"The UNet2DModel reads {config['in_channels']} channels and predicts "
            f"{config['out_channels']}: fewstep reads networks that predict one number a pixel, "
            "without a learned variance."
        )
    if config["time_embedding_type"] != "positional":
        raise ValueError(
            "UNet2D embeds times with time_embedding_type='positional', "
            f"not {config['time_embedding_type']!r}."
        )
    height, width = (size, size) if isinstance(size, int) else size
    halvings = len(config["block_out_channels"]) - 1
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"This U-Net halves the image {halvings} times: its sides must be multiples of "
            f"{2**halvings}, got {height}x{width}."
        )
    return [config["in_channels"], height, width]


def class_count(config: Any, classes: int | None = None) -> int | None:
    """Return how many classes a UNet2DModel has, without "no class"; None if unconditional.

    Args:
        config: its settings.
        classes: the number where the user says it.

    Raises:
        ValueError: not the number of its embeddings, or one less; a network that does not say its
            number, or reads embeddings.
    """
    kind, rows = config["class_embed_type"], config["num_class_embeds"]
    if kind is None and rows is None:
        if classes is not None:
            raise ValueError(
                f"The UNet2DModel has no class embeddings: it is unconditional, and cannot know "
                f"{classes} classes."
            )
        return None
    if kind == "identity":
        raise ValueError(
            "The UNet2DModel reads embeddings in place of classes (class_embed_type='identity'): "
            "from_pretrained takes them as class_embeddings, one row for each class."
        )
    if kind not in (None, "timestep"):
        raise ValueError(
            f"The UNet2DModel has class_embed_type={kind!r}; fewstep reads None, 'timestep' and "
            "'identity'."
        )
    classes = rows if classes is None else classes
    if classes is None:
        raise ValueError(
            "The UNet2DModel embeds classes as it does times (class_embed_type='timestep'), which "
            "says nothing of their number: pass classes."
        )
    if classes < 1 or (kind is None and classes not in (rows, rows - 1)):
        known = f'{rows} class embeddings, of which the last one may mean "no class"'
        raise ValueError(
            f"The UNet2DModel has {known if kind is None else 'at least one class'}: it cannot "
            f"know {classes} classes."
        )
    return classes
