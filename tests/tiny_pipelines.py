"""Tiny pipelines of every family: random weights, tiny tokenizers, nothing is fetched.

Networks of diffusers start at answers near 0; here the last layers are spread out, so that answers
have the size of noise and tell prompts and times apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

SD_BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
PROMPTS = ["a red ball", "a blue house", "the cat", "a dog at night"]
WIDTH = 32  # of all text states


def clip_tokenizer(folder: Path) -> Any:
    """Return a CLIP tokenizer of letters and a few merges."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "ab</w>", "re", "red</w>"]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\nr e\nre d</w>\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def t5_tokenizer() -> Any:
    """Return a T5 tokenizer of letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁the"]
    return T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=77,
    )


def clip_encoder(tokenizer: Any, projected: bool = False) -> Any:
    """Return a CLIP text encoder of one layer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=WIDTH,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_encoder(tokenizer: Any) -> Any:
    """Return a T5 encoder of one layer."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4
        )
    )


def vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    """Return a VAE that halves sides once."""
    return AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    )


def unet(**config: Any) -> UNet2DConditionModel:
    """Return a U-Net under text states."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )


def lively(network: Any) -> Any:
    """Return a network whose last layers do not answer near 0."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith(("conv_out", "proj_out", "scale_shift", "norm_out")):
                weight.normal_(std=0.3 if weight.ndim > 1 else 0.1)
            elif "adaln" in name or "norm1.linear" in name or "caption_projection" in name:
                weight.normal_(std=0.1)
    return network.eval()


def stable_diffusion(folder: Path) -> Any:
    """Stable Diffusion 1."""
    tokenizer = clip_tokenizer(folder / "clip")
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=lively(unet()),
        scheduler=DDIMScheduler(
            **SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path) -> Any:
    """SDXL."""
    tokenizer = clip_tokenizer(folder / "clip")
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
    )
    # States of two encoders stand beside each other.
    network = UNet2DConditionModel.from_config({**network.config, "cross_attention_dim": 2 * WIDTH})
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer),
        text_encoder_2=clip_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=lively(network),
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
    )


def sd3(folder: Path) -> Any:
    """Stable Diffusion 3."""
    tokenizer, t5 = clip_tokenizer(folder / "clip"), t5_tokenizer()
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    )
    from transformers import T5Config, T5EncoderModel

    encoder_3 = T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    )
    return StableDiffusion3Pipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=clip_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder_3,
        tokenizer_3=t5,
    )


def flux(folder: Path, guidance_embeds: bool = True) -> Any:
    """Flux-dev."""
    tokenizer, t5 = clip_tokenizer(folder / "clip"), t5_tokenizer()
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    pipeline = FluxPipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
    )
    pipeline.default_sample_size = 8
    return pipeline


def pixart(folder: Path) -> Any:
    """PixArt-alpha."""
    t5 = t5_tokenizer()
    network = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=WIDTH,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        transformer=lively(network),
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae(),
        text_encoder=t5_encoder(t5),
        tokenizer=t5,
    )


def dit(folder: Path) -> Any:
    """DiT."""
    network = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
    )
    return DiTPipeline(
        transformer=lively(network),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label={"0": "tench", "1": "goldfish, carp"},
    )


def ddpm(folder: Path, **config: Any) -> Any:
    """DDPM in pixels."""
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **config,
    )
    return DDPMPipeline(lively(network), DDPMScheduler(clip_sample=False))


MAKERS = {
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "dit": dit,
    "ddpm": ddpm,
}


def kept_in(root: Path) -> Callable[[str], Path]:
    """Return a function from a name to the folder of a tiny pipeline, which is made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = root / name / "pipeline"
            make(name, root / name).save_pretrained(made[name])
        return made[name]

    return get


def make(name: str, folder: Path) -> Any:
    """Make a tiny pipeline, always the same one."""
    diffusers.utils.logging.set_verbosity_error()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = MAKERS[name](folder)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
