"""SDXL: a U-Net in latents, two text encoders, and the sizes of pictures as micro-conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LatentFamily, Reader, Rows


class SDXL(LatentFamily):
    """SDXL's base model."""

    pipelines = ("StableDiffusionXLPipeline",)
    components = (
        "unet",
        "scheduler",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
    )
    unused = ("feature_extractor", "image_encoder")
    network_name = "unet"

    @property
    def readers(self) -> list[Reader]:
        """See `Family.readers`."""
        tokenizers = self.pipeline.tokenizer, self.pipeline.tokenizer_2
        return [Reader(tokenizer, tokenizer.model_max_length) for tokenizer in tokenizers]

    def encode_some(self, prompts: list[str]) -> Rows:
        """See `Family.encode_some`."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.network.device, do_classifier_free_guidance=False
        )
        return self._told(states, pooled)

    def none(self, negative: str) -> Rows:
        """See `Family.none`: zeros where the pipeline is told so, and no negative prompt is."""
        rows = self.encode_some([negative])
        if negative or not self.pipeline.config.force_zeros_for_empty_prompt:
            return rows
        return self._told(torch.zeros_like(rows["states"]), torch.zeros_like(rows["pooled"]))

    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """See `Family.ask`."""
        answer = self.network(
            sample,
            time,
            encoder_hidden_states=rows["states"],
            added_cond_kwargs={"text_embeds": rows["pooled"], "time_ids": rows["sizes"]},
            return_dict=False,
        )
        return answer[0]

    def _told(self, states: Tensor, pooled: Tensor) -> Rows:
        """Return rows with the micro-conditions: the picture's size, nothing cropped, its size."""
        height, width = (side * self.halvings for side in self.sides)
        sizes = states.new_tensor([[height, width, 0, 0, height, width]])
        return {"states": states, "pooled": pooled, "sizes": sizes.repeat(len(states), 1)}
