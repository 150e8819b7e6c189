"""Flux: a transformer of flow matching on latents in packed 2 x 2 patches, (tokens, channels).

Flux-dev is told the guidance it was distilled for, and asked once; Flux-schnell knows none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import LatentFamily, Reader, Rows

# What the pipeline reads of a prompt by T5, where it is not told otherwise.
_T5_TOKENS = 512


class Flux(LatentFamily):
    """Flux.1."""

    pipelines = ("FluxPipeline",)
    components = (
        "transformer",
        "scheduler",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
    )
    unused = ("feature_extractor", "image_encoder")
    multiple = 2

    def __init__(
        self, pipeline: Any, size: tuple[int, int] | None = None, guidance: float = 1.0
    ) -> None:
        super().__init__(pipeline, size, guidance)
        height, width = (side // 2 for side in self.sides)
        self.tokens = height * width
        self.shape = (self.tokens, self.config.in_channels)
        device, dtype = self.network.device, self.network.dtype
        self._places = pipeline._prepare_latent_image_ids(1, height, width, device, dtype)

    @property
    def own_side(self) -> int:
        """See `LatentFamily.own_side`: Flux's networks do not say, their pipeline does."""
        return self.pipeline.default_sample_size

    @property
    def splits(self) -> bool:
        """See `Family.splits`."""
        return False

    @property
    def embeds_guidance(self) -> bool:
        """See `Family.embeds_guidance`."""
        return bool(self.config.guidance_embeds)

    @property
    def readers(self) -> list[Reader]:
        """See `Family.readers`."""
        clip = self.pipeline.tokenizer
        return [
            Reader(clip, clip.model_max_length),
            Reader(self.pipeline.tokenizer_2, _T5_TOKENS),
        ]

    def encode_some(self, prompts: list[str]) -> Rows:
        """See `Family.encode_some`."""
        states, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.network.device)
        return {"states": states, "pooled": pooled}

    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """See `Family.ask`: the network is asked at noise levels, 0 to 1."""
        states = rows["states"]
        told = torch.full((len(sample),), self.guidance, device=sample.device)
        answer = self.network(
            hidden_states=sample,
            timestep=time / self.pipeline.scheduler.config.num_train_timesteps,
            guidance=told if self.embeds_guidance else None,
            pooled_projections=rows["pooled"],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=states.device, dtype=states.dtype),
            img_ids=self._places,
            return_dict=False,
        )
        return answer[0]

    def scheduler_options(self, steps: int) -> dict[str, Any]:
        """See `Family.scheduler_options`."""
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}

    def decode(self, latents: Tensor) -> Tensor:
        """See `Family.decode`."""
        height, width = (side * self.halvings for side in self.sides)
        return super().decode(self.pipeline._unpack_latents(latents, height, width, self.halvings))

    def compress(self, pictures: Tensor) -> Tensor:
        """See `Family.compress`."""
        latents = super().compress(pictures)
        return self.pipeline._pack_latents(latents, *latents.shape)
