r"""Train a small text-to-image pipeline of diffusers from nothing, to learn schedulers for it.

    python examples/emoji_pipeline.py --data-dir emoji32/images --output emoji-pipeline
    fewstep distil emoji-pipeline --prompts emoji-pipeline/prompts.txt \\
        --held-out emoji-pipeline/held_out.txt --steps 5 --guidance 2

The folder of pictures has a captions.tsv, a path and a text a line. What comes out has the parts of
Stable Diffusion: a VAE that halves sides, a CLIP tokenizer and text encoder of the captions, which
is trained along, and a U-Net, which learns a flow in latents. A tenth of the pictures is held out.
The defaults take some 40 minutes of one core for pictures of 32 pixels. A run that was stopped goes
on where it saved last. Needs `pip install -e ".[pipelines]"`.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.envs.targets.images import ImageSet, load_images


@dataclass(frozen=True)
class Recipe:
    """How large the networks are, and how long they are trained."""

    image_size: int = 32
    vae_widths: tuple[int, ...] = (32, 64)
    widths: tuple[int, ...] = (48, 96, 128)
    text_width: int = 128
    tokens: int = 24  # that are read of a caption
    vocabulary: int = 1024
    vae_rounds: int = 600
    rounds: int = 2600
    batch_size: int = 32
    learning_rate: float = 1e-3
    kl_weight: float = 1e-3
    dropped: float = 0.15  # share of the captions, for guidance
    ema: float = 0.999
    seed: int = 0


def make_tokenizer(captions: Sequence[str], recipe: Recipe) -> CLIPTokenizer:
    """Learn the pieces of words that captions are made of, always the same ones.

    Byte-pair encoding: the commonest pair of neighbours becomes one piece, again and again. The
    trainer of the package `tokenizers` breaks ties by chance, and so gives other numbers each time.
    """
    read = CLIPTokenizer().backend_tokenizer
    words = Counter(
        piece
        for caption in captions
        for piece, _ in read.pre_tokenizer.pre_tokenize_str(read.normalizer.normalize_str(caption))
    )
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in sorted(words)}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    merges = []
    while len(vocabulary) < recipe.vocabulary:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        vocabulary.append("".join(best))
        for parts in pieces.values():
            for i in range(len(parts) - 1, 0, -1):
                if (parts[i - 1], parts[i]) == best:
                    parts[i - 1 : i + 1] = ["".join(best)]
    numbers = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=recipe.tokens)


def make_networks(tokenizer: CLIPTokenizer, recipe: Recipe) -> nn.ModuleDict:
    """Return the parts that are trained: VAE, text encoder and U-Net."""
    vae = AutoencoderKL(
        block_out_channels=recipe.vae_widths,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # `normalise` sees to it
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=recipe.tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=recipe.image_size // 2,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return nn.ModuleDict({"vae": vae, "text_encoder": text_encoder, "unet": unet})


class Training:
    """Rounds of Adam with a warm-up and a cosine, which a file lets go on after a kill.

    Args:
        networks: what is trained; `average` is the moving average of its weights.
        loss: of one batch.
        rounds: how many updates.
        recipe: learning rate and average.
        file: where it is kept.
    """

    def __init__(
        self,
        networks: nn.ModuleDict,
        loss: Callable[[], Tensor],
        rounds: int,
        recipe: Recipe,
        file: Path,
    ) -> None:
        self.networks, self.loss, self.rounds, self.recipe = networks, loss, rounds, recipe
        self.file, self.done = file, 0
        self.average = copy.deepcopy(networks).requires_grad_(False)
        self.optimizer = torch.optim.Adam(networks.parameters(), lr=recipe.learning_rate)

    def run(self, name: str, seconds: float = 60.0) -> nn.ModuleDict:
        """Do the rounds that are left, and return the averaged networks."""
        if self.file.is_file():
            self._load()
        saved = time.monotonic()
        losses: list[float] = []
        while self.done < self.rounds:
            losses.append(self._round())
            if self.done % 100 == 0 or self.done == self.rounds:
                print(f"{name} {self.done}/{self.rounds} loss {sum(losses) / len(losses):.4f}")
                losses = []
            if time.monotonic() - saved > seconds or self.done == self.rounds:
                self._save()
                saved = time.monotonic()
        return self.average.eval()

    def _round(self) -> float:
        warm = min(1.0, (self.done + 1) / 100)
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.done / self.rounds)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * warm * cosine
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        # The average forgets the first weights soon.
        decay = min(self.recipe.ema, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for kept, new in zip(
                self.average.parameters(), self.networks.parameters(), strict=True
            ):
                kept.lerp_(new, 1 - decay)
        return loss.item()

    def _save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "done": self.done,
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.file} is of another recipe: choose another folder.")
        self.done = state["done"]
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def pictures_of(samples: Tensor) -> Tensor:
    """Return bytes (N, 3, H, W) as numbers in [-1, 1]."""
    return samples.float() / 127.5 - 1


def train_vae(vae: AutoencoderKL, images: Tensor, recipe: Recipe, file: Path) -> AutoencoderKL:
    """Train a VAE on bytes (N, 3, H, W) to few wrong pixels and latents of a small divergence."""

    def loss() -> Tensor:
        batch = pictures_of(images[torch.randint(len(images), (recipe.batch_size,))])
        latents = vae.encode(batch).latent_dist
        back = vae.decode(latents.sample()).sample
        kl = latents.kl().mean() / latents.mean[0].numel()
        return l1_loss(back, batch) + recipe.kl_weight * kl

    training = Training(nn.ModuleDict({"vae": vae}), loss, recipe.vae_rounds, recipe, file)
    return training.run("vae")["vae"]


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations (N, 4, H / 2, W / 2) of pictures' latents."""
    parts = [vae.encode(pictures_of(part)).latent_dist for part in images.split(64)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Give the latents of pictures mean 0 and variance 1 in each channel.

    Stable Diffusion's pipeline knows one factor for all channels and no shift, so the numbers go
    into the convolutions next to the latents, of one pixel each.
    """
    mean, _ = encoded(vae, images)
    std, mean = torch.std_mean(mean, dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    # The second half of what the encoder says is logarithms of variances.
    count = len(mean)
    into.weight[:count] /= std[:, None, None, None]
    into.bias[:count] = (into.bias[:count] - mean) / std
    into.bias[count:] -= 2 * std.log()


def train_flow(
    networks: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    images: ImageSet,
    recipe: Recipe,
    file: Path,
) -> nn.ModuleDict:
    """Train text encoder and U-Net as a flow: (1 - u) latents + u noise, its velocity predicted.

    Levels u are drawn as those of Stable Diffusion 3, by a logistic of a normal number.
    """
    assert images.captions is not None
    mean, std = encoded(networks["vae"], images.samples)
    ids = _ids(tokenizer, [*images.captions, ""])
    trained = nn.ModuleDict({name: networks[name] for name in ("text_encoder", "unet")})

    def loss() -> Tensor:
        rows = torch.randint(len(mean), (recipe.batch_size,))
        latents = mean[rows] + std[rows] * torch.randn_like(mean[rows])
        noise = torch.randn_like(latents)
        level = torch.randn(len(rows)).sigmoid()
        u = level[:, None, None, None]
        texts = torch.where(torch.rand(len(rows)) < recipe.dropped, len(mean), rows)
        states = trained["text_encoder"](ids[texts])[0]
        velocity = trained["unet"](
            (1 - u) * latents + u * noise, 1000 * level, encoder_hidden_states=states
        ).sample
        return mse_loss(velocity, noise - latents)

    return Training(trained, loss, recipe.rounds, recipe, file).run("flow")


def _ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return the tokens of captions (N, tokens), as the pipeline reads them."""
    read = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return read.input_ids


def train(images: ImageSet, folder: Path, recipe: Recipe) -> Any:
    """Train all parts, and return the pipeline; `folder` keeps what is done already."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    captions = list(images.captions or ())
    tokenizer = make_tokenizer(captions, recipe)
    networks = make_networks(tokenizer, recipe)
    networks["vae"] = train_vae(networks["vae"], images.samples, recipe, folder / "vae.pt")
    normalise(networks["vae"], images.samples)
    trained = train_flow(networks, tokenizer, images, recipe, folder / "flow.pt")
    return StableDiffusionPipeline(
        vae=networks["vae"],
        text_encoder=trained["text_encoder"],
        tokenizer=tokenizer,
        unet=trained["unet"],
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the pipeline with its captions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--output", type=Path, default=Path("emoji-pipeline"))
    parser.add_argument("--rounds", type=int, default=Recipe.rounds)
    parser.add_argument("--vae-rounds", type=int, default=Recipe.vae_rounds)
    flags = parser.parse_args(argv)
    recipe = Recipe(rounds=flags.rounds, vae_rounds=flags.vae_rounds)
    images = load_images("ImageFolder", flags.data_dir, image_size=recipe.image_size, captions=True)
    pipeline = train(images, flags.output / "training", recipe)
    pipeline.save_pretrained(flags.output)
    for name, texts in (("prompts", images.captions), ("held_out", images.held_out_captions)):
        (flags.output / f"{name}.txt").write_text("\n".join(texts or ()) + "\n")
    print(f"saved in {flags.output}")


if __name__ == "__main__":
    main()
