"""DiT: diffusers' `DiTTransformer2DModel` (Peebles & Xie 2023) as a body.

It is class-conditional, and was trained with dropped labels. It denoises what a pipeline's VAE
makes of images, its latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ....common.arguments import at_least, checked
from ....common.names import unknown_name
from ....common.shapes import check_shape, is_image
from .times import check_range
from .unet import require_diffusers, unet_time

# Latents of a side of 8192 pixels. Its positions fill memory, and no weights say their number.
_LARGEST = 1024


class DiT(nn.Module):
    """diffusers' `DiTTransformer2DModel` as a body `body(sample, time, condition)`.

    Args:
        shape: (channels, size, size) of one sample; the size is a multiple of `patch_size`.
        classes: number of classes; the network gets `classes` itself for none.
        time_range: as for `UNet2D`.
        diffusers_options: further arguments of `DiTTransformer2DModel`, such as `num_layers`;
            `out_channels` may be twice the channels, of which the second half, a learned variance,
            is not read.

    Attributes:
        transformer: the `DiTTransformer2DModel`.
        config: what `body_from_config` rebuilds the body from.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: a value of another type.
        ValueError: an unknown option, sides that are no squares of patches, or a bad `time_range`.
    """

    transformer: Any
    config: dict[str, Any]
    time_range: list[float] | None
    # "no class" is one more row of the embeddings than there are classes.
    knows_none = True

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        time_range: Sequence[float] | None = None,
        **diffusers_options: Any,
    ) -> None:
        super().__init__()
        require_diffusers("DiT")
        from diffusers import DiTTransformer2DModel

        known = set(inspect.signature(DiTTransformer2DModel).parameters) - _DECIDED
        for option in diffusers_options:
            if option not in known:
                raise unknown_name("option of DiTTransformer2DModel", option, known)
        check_shape(shape)
        at_least(1, classes=classes)
        if not is_image(shape):
            raise ValueError(f"DiT is for samples (channels, size, size), got {tuple(shape)}.")
        channels, height, width = (int(size) for size in shape)
        if height != width:
            raise ValueError(f"DiT is for square samples, got {height}x{width}.")
        model = DiTTransformer2DModel(
            sample_size=height,
            in_channels=channels,
            num_embeds_ada_norm=classes,
            **diffusers_options,
        )
        self._hold(model, time_range)

    @classmethod
    def from_model(
        cls, model: Any, time_range: Sequence[float] | None = None, classes: int | None = None
    ) -> DiT:
        """Make a body of a `DiTTransformer2DModel` that exists, sharing its weights.

        Args:
            model: the network.
            time_range: as for the class.
            classes: as for the class, to be compared with the model's own number.

        Raises:
            ValueError: as for the class, or another number of classes.
        """
        known = model.config["num_embeds_ada_norm"]
        if classes not in (None, known):
            raise ValueError(
                f'The DiTTransformer2DModel has {known} classes beside "no class": it cannot '
                f"know {classes} classes."
            )
        body = cls.__new__(cls)
        nn.Module.__init__(body)
        body._hold(model, time_range)
        return body

    def _hold(self, model: Any, time_range: Sequence[float] | None) -> None:
        shape = check_dit_config(model.config)
        self.transformer = model
        self.time_range = check_range(time_range)
        self.config = {
            "kind": "dit",
            "shape": shape,
            "classes": model.config["num_embeds_ada_norm"],
            "time_range": self.time_range,
            **{
                key: value
                for key, value in model.config.items()
                if key not in _DECIDED and not key.startswith("_")
            },
        }

    def forward(self, sample: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction (N, C, H, W) for samples (N, C, H, W) at network times (N,).

        Args:
            sample: (N, C, H, W).
            time: (N,).
            condition: classes (N,) int64, `classes` itself for none.
        """
        time = unet_time(time, self.time_range)
        answer = self.transformer(sample, timestep=time, class_labels=condition, return_dict=False)
        return answer[0][:, : sample.shape[1]]


# Arguments of DiTTransformer2DModel that the shape and the classes decide.
_DECIDED = {"sample_size", "in_channels", "num_embeds_ada_norm"}


def check_dit_config(config: Any) -> list[int]:
    """Return (C, H, W) of a DiTTransformer2DModel's samples; ValueError if it cannot be a body."""
    size, patch, channels = (config[key] for key in ("sample_size", "patch_size", "in_channels"))
    if not (isinstance(size, int) and isinstance(patch, int) and 0 < patch <= size <= _LARGEST):
        raise ValueError(
            f"The DiTTransformer2DModel has sample_size={size!r} and patch_size={patch!r}; fewstep "
            f"reads whole numbers, patches no larger than samples, those up to {_LARGEST}."
        )
    if size % patch:
        raise ValueError(f"Samples of {size}x{size} are no whole number of patches of {patch}.")
    if config["out_channels"] not in (None, channels, 2 * channels):
        raise ValueError(
            f"The DiTTransformer2DModel reads {channels} channels and predicts "
            f"{config['out_channels']}: fewstep reads networks that predict as many, or twice as "
            "many with a learned variance."
        )
    return [channels, size, size]
