"""Stable Diffusion 1 and 2: a U-Net in latents that reads the states of one CLIP text encoder."""

from __future__ import annotations

from torch import Tensor

from .base import LatentFamily, Reader, Rows


class StableDiffusion(LatentFamily):
    """Stable Diffusion 1 and 2."""

    pipelines = ("StableDiffusionPipeline",)
    components = ("unet", "scheduler", "vae", "text_encoder", "tokenizer")
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    network_name = "unet"

    @property
    def readers(self) -> list[Reader]:
        """See `Family.readers`."""
        tokenizer = self.pipeline.tokenizer
        return [Reader(tokenizer, tokenizer.model_max_length)]

    def encode_some(self, prompts: list[str]) -> Rows:
        """See `Family.encode_some`."""
        states, _ = self.pipeline.encode_prompt(prompts, self.network.device, 1, False)
        return {"states": states}

    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """See `Family.ask`."""
        answer = self.network(sample, time, encoder_hidden_states=rows["states"], return_dict=False)
        return answer[0]
