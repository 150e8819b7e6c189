"""Pictures as targets in a pipeline's latents: encoded once by its VAE, and kept on disk.

    images = load_images("ImageFolder", "pictures", image_size=512, captions=True)
    target, prompts = latent_target(opened, images)
    denoiser = opened.denoiser(prompts, trains=True)

An environment with this target has latents for samples and prompts for classes, so every agent
trains the pipeline's network in it: `BehaviorCloning`, SFT and the others. `save_pipeline` writes
the pipeline then. `DecodedFeatures` lets feature distances see pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...common.files import cache_root, remove_leftovers, write_atomically
from ...common.reading import DAMAGE
from ...common.tensor_files import read_tensors, write_tensors
from ...critics.metrics.features import FeatureExtractor
from ...envs import Target
from ...envs.targets.images import ImageSet
from .families import Family
from .open import OpenedPipeline

_FORMAT = "fewstep-latents-1"


class LatentTarget(NamedTuple):
    """A target whose samples are latents, and the prompts that its labels number."""

    target: Target
    prompts: list[str] | None


def latent_target(
    opened: OpenedPipeline,
    images: ImageSet,
    folder: str | Path | None = None,
    name: str = "latents",
) -> LatentTarget:
    """Return the latents of pictures as a target; the VAE is asked once for the same pictures.

    They are the means that the VAE says, scaled as the network reads them, float32. A file holds
    them, named by the pictures, the VAE's weights and settings, and the size.

    Args:
        opened: the pipeline; its device and type are those of the encoding.
        images: pictures as bytes (N, 3, height, width), of the pipeline's size. Captions are
            prompts; of a pipeline of classes their labels.
        folder: where the file is kept; `latents` in the cache (`cache_root`) if None.
        name: of the target.

    Raises:
        ValueError: pictures of another size, or without captions or labels where the pipeline asks
            for them.
    """
    place = cache_root() / "latents" if folder is None else Path(folder).expanduser()
    held_out = images.held_out
    prompts, labels, held_out_labels = _conditions(opened.family, images)
    target = Target(
        name,
        _encoded(opened.family, images.samples, place).to(opened.device),
        held_out=None
        if held_out is None
        else _encoded(opened.family, held_out, place).to(opened.device),
        labels=labels,
        held_out_labels=held_out_labels,
    )
    return LatentTarget(target, prompts)


class DecodedFeatures:
    """Features of the pictures that latents stand for.

    Args:
        family: decodes latents.
        extractor: of pictures.
    """

    def __init__(self, family: Family, extractor: FeatureExtractor) -> None:
        self.family, self.extractor = family, extractor
        self.name = f"{extractor.name}, decoded"
        self.description = f"{extractor.description}, of decoded latents"

    def __call__(self, latents: Tensor) -> Tensor:
        """Return features (N, d) of latents (N, *shape)."""
        pictures = 2 * self.family.decoded(latents) - 1
        return self.extractor(pictures.to(latents.device))


def _conditions(
    family: Family, images: ImageSet
) -> tuple[list[str] | None, Sequence[int] | Tensor | None, Sequence[int] | Tensor | None]:
    """Return prompts, and which of them each picture has, training and held-out.

    Raises:
        ValueError: the pictures lack what the pipeline asks for.
    """
    held_out = images.held_out is not None
    if family.prompts is None:
        return None, None, None
    texts, others = images.captions, images.held_out_captions if held_out else None
    if family.prompts == "classes":
        if images.labels is None:
            raise ValueError("This pipeline draws classes, and the pictures have no labels.")
        texts = [str(label) for label in images.labels.tolist()]
        if held_out and images.held_out_labels is not None:
            others = [str(label) for label in images.held_out_labels.tolist()]
    if texts is None or (held_out and others is None):
        raise ValueError("This pipeline draws prompts, and the pictures have no captions.")
    prompts = list(dict.fromkeys([*texts, *(others or ())]))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    return (
        prompts,
        torch.tensor([number[text] for text in texts]),
        None if others is None else torch.tensor([number[text] for text in others]),
    )


def _encoded(family: Family, pictures: Tensor, place: Path) -> Tensor:
    """Return the latents (N, *shape) of pictures' bytes, from the file if there is one."""
    file = place / f"{_key(family, pictures)}.safetensors"
    with contextlib.suppress(SafetensorError, KeyError, *DAMAGE, OSError):
        tensors, metadata = read_tensors(file)
        latents = tensors["latents"]
        known = metadata.get("format") == _FORMAT
        if known and latents.shape == (len(pictures), *family.shape):
            return latents
    latents = family.compressed(pictures)
    place.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place)
    metadata = {"format": _FORMAT}
    write_atomically(
        file, lambda path: write_tensors(path, {"latents": latents.contiguous()}, metadata)
    )
    return latents


def _key(family: Family, pictures: Tensor) -> str:
    """Return what tells these latents from others: pictures, VAE, and how it is asked."""
    digest = hashlib.sha256()
    vae = getattr(family.pipeline, "vae", None)
    config = {} if vae is None else {k: v for k, v in vae.config.items() if k[0] != "_"}
    about = [type(family).__name__, family.shape, tuple(pictures.shape), config]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    weights = {} if vae is None else vae.state_dict()
    for tensor in (pictures, *(weights[name] for name in sorted(weights))):
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
