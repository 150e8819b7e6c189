"""Networks under classes, or under nothing: DiT, and the U-Nets of DDPM's pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Family, LatentFamily, Rows


class DiT(LatentFamily):
    """DiT: a transformer in latents under ImageNet's classes."""

    pipelines = ("DiTPipeline",)
    components = ("transformer", "scheduler", "vae")
    prompts = "classes"

    def encode_some(self, prompts: list[str]) -> Rows:
        """See `Family.encode_some`: a class's number, or its name where the pipeline knows it."""
        named = getattr(self.pipeline, "labels", {})
        return {"class": numbers(prompts, named, self.config.num_embeds_ada_norm)}

    def none(self, negative: str) -> Rows:
        """See `Family.none`: the number behind the last class."""
        return {"class": torch.tensor([self.config.num_embeds_ada_norm])}

    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """See `Family.ask`: what it says of its variance is left out."""
        answer = self.network(sample, timestep=time, class_labels=rows["class"], return_dict=False)
        return answer[0][:, : self.channels]


class Pixels(Family):
    """A `UNet2DModel` in pixels, with a DDPM's or a DDIM's pipeline: with classes or without.

    Nothing says that a class of its means "no class": it is asked under a class alone.
    """

    pipelines = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
    components = ("unet", "scheduler")
    network_name = "unet"
    prompts = None

    def __init__(
        self, pipeline: Any, size: tuple[int, int] | None = None, guidance: float = 1.0
    ) -> None:
        super().__init__(pipeline, size, guidance)
        side = self.config.sample_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        self.picture = size or (sides[0], sides[1])
        self.shape = (self.config.in_channels, *self.picture)
        if self.config.num_class_embeds is not None:
            self.prompts = "classes"

    @property
    def splits(self) -> bool:
        """See `Family.splits`."""
        return False

    def encode_some(self, prompts: list[str]) -> Rows:
        """See `Family.encode_some`: the numbers of classes."""
        return {"class": numbers(prompts, {}, self.config.num_class_embeds)}

    def none(self, negative: str) -> Rows:
        """See `Family.none`: nobody asks without a class."""
        return {"class": torch.tensor([0])}

    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """See `Family.ask`."""
        answer = self.network(sample, time, class_labels=rows.get("class"), return_dict=False)
        return answer[0]

    def decode(self, latents: Tensor) -> Tensor:
        """See `Family.decode`: the samples are pictures in [-1, 1], grey ones or not."""
        pictures = (latents / 2 + 0.5).clamp(0, 1)
        return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures

    def compress(self, pictures: Tensor) -> Tensor:
        """See `Family.compress`: grey is the mean of the colours."""
        grey = self.shape[0] == 1
        return 2 * (pictures.mean(dim=1, keepdim=True) if grey else pictures) - 1


def numbers(prompts: list[str], named: dict[str, int], count: int) -> Tensor:
    """Read classes (N,) int64 from their numbers, 0 to `count` - 1, or names.

    Raises:
        ValueError: neither, or a class that does not exist.
    """
    found = []
    for prompt in prompts:
        text = prompt.strip()
        number = named.get(text, int(text) if text.isdecimal() else -1)
        if not 0 <= number < count:
            kinds = "a number" if not named else "a name or a number"
            raise ValueError(
                f"The prompts of this pipeline are classes, {kinds} from 0 to {count - 1}; got "
                f"{prompt[:100]!r}."
            )
        found.append(number)
    return torch.tensor(found)
