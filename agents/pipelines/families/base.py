"""Family: what fewstep has to know of one kind of diffusers pipelines.

A family says which of the pipeline's parts it needs, how a prompt is encoded (by the pipeline's own
text encoders), what the network is asked, the shape of its latents and how they are decoded. What
the network is told of a prompt is a row of a few tensors, `Rows`; to the rest of the package a
prompt is the number of its row, a class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

# By name what the network is told of each prompt, (N, ...) each.
Rows = dict[str, Tensor]

# Prompts encoded, and latents decoded or pictures compressed, at once.
_ENCODED, _DECODED = 8, 4


class Reader(NamedTuple):
    """A tokenizer, and how many tokens of a prompt are read."""

    tokenizer: Any
    tokens: int


class Family(ABC):
    """What one kind of pipelines asks its network.

    Args:
        pipeline: a loaded pipeline of this kind.
        size: (height, width) of the pictures in pixels; None for what the network was made for.
        guidance: what a network with an embedding of the guidance is told of it; others ignore it.

    Attributes:
        pipelines: diffusers' names of the pipelines.
        components: the pipeline's parts that are needed.
        unused: those that are not loaded.
        network_name: which part is the network.
        prompts: whether a prompt is a text or a class; None for an unconditional network.
        shape: of one sample as the network reads it.
        picture: (height, width) of the pictures in pixels.
        tokens: what a dynamic shift of the noise levels depends on; None where there is none.

    Raises:
        ValueError: a size that the pipeline cannot make.
    """

    pipelines: ClassVar[tuple[str, ...]]
    components: ClassVar[tuple[str, ...]]
    unused: ClassVar[tuple[str, ...]] = ()
    network_name: ClassVar[str] = "transformer"
    prompts: Literal["texts", "classes"] | None = "texts"

    shape: tuple[int, ...]
    picture: tuple[int, int]
    tokens: int | None = None

    def __init__(
        self, pipeline: Any, size: tuple[int, int] | None = None, guidance: float = 1.0
    ) -> None:
        self.pipeline = pipeline
        self.network: Any = getattr(pipeline, self.network_name)
        self.guidance = guidance
        self.size = size

    @property
    def config(self) -> Any:
        """The network's settings."""
        return self.network.config

    @property
    def splits(self) -> bool:
        """Whether guidance asks the network twice, with a prompt and without."""
        return self.prompts is not None

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told how strong the guidance is."""
        return False

    @property
    def readers(self) -> list[Reader]:
        """The tokenizers of texts."""
        return []

    @abstractmethod
    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """Return the network's answer (N, *shape) to samples at its own times (N,)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures (N, 3, height, width) in [0, 1] of finished samples (N, *shape)."""

    @abstractmethod
    def compress(self, pictures: Tensor) -> Tensor:
        """Return the samples (N, *shape) of pictures (N, 3, height, width) in [0, 1].

        The inverse of `decode`, as far as the pipeline has one.
        """

    def encode_some(self, prompts: list[str]) -> Rows:
        """Return what the network is told of these prompts.

        Raises:
            ValueError: a family without prompts.
        """
        raise ValueError(f"A {type(self.pipeline).__name__} reads no prompts.")

    def none(self, negative: str) -> Rows:
        """Return what the network is told without a prompt, one row."""
        return self.encode_some([negative])

    def scheduler_options(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline tells its scheduler's `set_timesteps` beside the steps."""
        return {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative: str = "") -> Rows:
        """Return the rows (N + 1, ...) of N prompts on the CPU; the last one is without a prompt.

        Args:
            prompts: texts, or the numbers of classes.
            negative: what guidance leads away from.
        """
        parts = [
            self.encode_some(list(prompts[i : i + _ENCODED]))
            for i in range(0, len(prompts), _ENCODED)
        ]
        parts.append(self.none(negative))
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    def decoded(self, latents: Tensor) -> Tensor:
        """Return pictures (N, 3, height, width) float32 on the CPU, few decoded at once."""
        with torch.no_grad():
            parts = [self.decode(part).float().cpu() for part in latents.split(_DECODED)]
        return torch.cat(parts)

    def compressed(self, pictures: Tensor) -> Tensor:
        """Return samples (N, *shape) float32 on the CPU of pictures' bytes (N, 3, height, width).

        Raises:
            ValueError: pictures of another size.
        """
        if pictures.dtype != torch.uint8 or pictures.shape[1:] != (3, *self.picture):
            raise ValueError(
                f"This pipeline's pictures are bytes (N, 3, {self.picture[0]}, "
                f"{self.picture[1]}), got {pictures.dtype} {tuple(pictures.shape)}."
            )
        device = self.network.device
        with torch.no_grad():
            parts = [
                self.compress(part.to(device).float() / 255).float().cpu()
                for part in pictures.split(_DECODED)
            ]
        return torch.cat(parts)


class LatentFamily(Family):
    """A family whose samples are latents of a VAE, (channels, height, width).

    Attributes:
        halvings: how many times smaller than a picture the latents are.
        multiple: of which a side of the latents is one.
    """

    multiple: ClassVar[int] = 1

    def __init__(
        self, pipeline: Any, size: tuple[int, int] | None = None, guidance: float = 1.0
    ) -> None:
        super().__init__(pipeline, size, guidance)
        self.halvings = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        own = self.own_side
        sides = (own, own) if isinstance(own, int) else tuple(own)
        self.sides = (sides[0], sides[1])
        if size is not None:
            step = self.halvings * self.multiple
            if min(size) < step or size[0] % step or size[1] % step:
                raise ValueError(
                    f"The sides of this pipeline's pictures are multiples of {step} pixels, got "
                    f"{size[0]} x {size[1]}."
                )
            self.sides = (size[0] // self.halvings, size[1] // self.halvings)
        self.shape = (self.channels, *self.sides)
        self.picture = (self.sides[0] * self.halvings, self.sides[1] * self.halvings)

    @property
    def own_side(self) -> int | Sequence[int]:
        """The side of the latents, or both, that the network was made for."""
        return self.config.sample_size

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.config.in_channels

    def decode(self, latents: Tensor) -> Tensor:
        """See `Family.decode`: as the pipelines do."""
        with self._vae_in_range() as vae:
            latents = self._of_the_vae(latents.to(vae.device, vae.dtype))
            pictures = vae.decode(latents, return_dict=False)[0]
        return (pictures / 2 + 0.5).clamp(0, 1)

    def compress(self, pictures: Tensor) -> Tensor:
        """See `Family.compress`: the means that the VAE says, scaled as the pipelines do."""
        with self._vae_in_range() as vae:
            asked = (2 * pictures - 1).to(vae.device, vae.dtype)
            return self._of_the_network(vae.encode(asked).latent_dist.mode())

    @contextmanager
    def _vae_in_range(self) -> Iterator[Any]:
        """Give the VAE, in float32 where float16 would overflow."""
        vae = self.pipeline.vae
        dtype = vae.dtype
        overflows = dtype == torch.float16 and vae.config.get("force_upcast", False)
        if overflows:
            vae.to(torch.float32)
        try:
            yield vae
        finally:
            if overflows:
                vae.to(dtype)

    def _of_the_vae(self, latents: Tensor) -> Tensor:
        """Undo the scaling of latents."""
        scale, shift = self._scaling(latents)
        return latents / scale + shift

    def _of_the_network(self, latents: Tensor) -> Tensor:
        """Scale what the VAE says."""
        scale, shift = self._scaling(latents)
        return (latents - shift) * scale

    def _scaling(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return the factor and the shift between the VAE's latents and the network's."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.scaling_factor, config.get("shift_factor") or 0.0
        means, stds = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, std))
        return config.scaling_factor / stds, means


def too_long(readers: Sequence[Reader], prompts: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each tokenizer that does not read some of the prompts to their end."""
    for reader in readers:
        counts = [len(ids) for ids in reader.tokenizer(list(prompts)).input_ids]
        if longer := sum(count > reader.tokens for count in counts):
            yield (
                f"{longer} of {len(prompts)} prompts have more than the {reader.tokens} tokens "
                f"that {type(reader.tokenizer).__name__} reads (at most {max(counts)}): the "
                "pipeline cuts them off there, and so does this."
            )
