"""Stable Diffusion 3: a transformer of flow matching in latents, with three text encoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import LatentFamily, Reader, Rows

# What the pipeline reads of a prompt by T5, where it is not told otherwise.
_T5_TOKENS = 256


class StableDiffusion3(LatentFamily):
    """Stable Diffusion 3 and 3.5."""

    pipelines = ("StableDiffusion3Pipeline",)
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

    def __init__(
        self, pipeline: Any, size: tuple[int, int] | None = None, guidance: float = 1.0
    ) -> None:
        super().__init__(pipeline, size, guidance)
        patch = self.config.patch_size
        self.tokens = (self.sides[0] // patch) * (self.sides[1] // patch)

    @property
    def readers(self) -> list[Reader]:
        """See `Family.readers`; T5 may be left out of a pipeline."""
        pipeline = self.pipeline
        clip = [
            Reader(each, each.model_max_length)
            for each in (pipeline.tokenizer, pipeline.tokenizer_2)
        ]
        t5 = pipeline.tokenizer_3
        return clip if t5 is None else [*clip, Reader(t5, _T5_TOKENS)]

    def encode_some(self, prompts: list[str]) -> Rows:
        """See `Family.encode_some`."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.network.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def ask(self, sample: Tensor, time: Tensor, rows: Rows) -> Tensor:
        """See `Family.ask`."""
        answer = self.network(
            hidden_states=sample,
            timestep=time,
            encoder_hidden_states=rows["states"],
            pooled_projections=rows["pooled"],
            return_dict=False,
        )
        return answer[0]
