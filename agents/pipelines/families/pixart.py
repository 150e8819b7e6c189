"""PixArt-alpha and -sigma: a transformer in latents that reads T5's states with their mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LatentFamily, Reader, Rows

# What the pipelines read of a prompt, where they are not told otherwise.
_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
# Networks for latents of this side, 1024 pixels, were told the size of their pictures.
_TOLD_SIZES = 128


class PixArt(LatentFamily):
    """PixArt-alpha and PixArt-sigma."""

    pipelines = tuple(_TOKENS)
    components = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")

    @property
    def readers(self) -> list[Reader]:
        """See `Family.readers`."""
        return [Reader(self.pipeline.tokenizer, _TOKENS[type(self.pipeline).__name__])]

    def encode_some(self, prompts: list[str]) -> Rows:
        """See `Family.encode_some`."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        states, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.network.device,
            # As the pipeline itself does where these are installed.
            clean_caption=is_bs4_available() and is_ftfy_available(),
        )
        return {"states": states, "mask": mask}

    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """See `Family.ask`: what it says of its variance is left out."""
        answer = self.network(
            sample,
            encoder_hidden_states=rows["states"],
            encoder_attention_mask=rows["mask"],
            timestep=time,
            added_cond_kwargs=self._sizes(sample),
            return_dict=False,
        )
        return answer[0][:, : self.channels]

    def _sizes(self, sample: Tensor) -> dict[str, Tensor | None]:
        """Return the micro-conditions."""
        tells = type(self.pipeline).__name__ == "PixArtAlphaPipeline"
        if self.config.sample_size != _TOLD_SIZES or not tells:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.halvings for side in self.sides)
        size, ratio = [[height, width]], [[height / width]]
        return {
            "resolution": torch.as_tensor(size).to(sample).repeat(len(sample), 1),
            "aspect_ratio": torch.as_tensor(ratio).to(sample).repeat(len(sample), 1),
        }
