"""Networks of diffusers in a folder: which kinds fewstep reads, and their safetensors weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...common.checkpoint import CheckpointError, carries_pickle, check_finite, unreadable
from ...common.reading import DAMAGE, reason
from ..denoisers.networks import DiT, UNet2D
from ..denoisers.networks.dit import check_dit_config
from ..denoisers.networks.unet import check_config
from .chains import read_settings

Body = UNet2D | DiT


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        model: its class in diffusers.
        folder: the component of a pipeline that it is.
        beside: components that may stand beside it and its scheduler, and are not read.
        body: what it becomes here.
        check: raises ValueError for settings that make no body.
        depth: the setting that counts its layers.
    """

    model: str
    folder: str
    beside: frozenset[str]
    body: type[UNet2D] | type[DiT]
    check: Callable[[Any], object]
    depth: str


_UNET = Kind("UNet2DModel", "unet", frozenset(), UNet2D, check_config, "layers_per_block")
_DIT = Kind(
    "DiTTransformer2DModel", "transformer", frozenset({"vae"}), DiT, check_dit_config, "num_layers"
)
# Under the name that a config.json gives them; the first DiTs bear the second one.
KINDS = {_UNET.model: _UNET, _DIT.model: _DIT, "Transformer2DModel": _DIT}

_STEM = "diffusion_pytorch_model"
WEIGHTS = f"{_STEM}.safetensors"
VARIANT = "fp16"
# Entries of a config.json that diffusers keeps and does not read.
CLASS_ENTRIES = ("_classes", "_drops")


class Asked(NamedTuple):
    """What the user says of a network's classes; see `from_pretrained`."""

    classes: int | None = None
    drops: bool | None = None
    embeddings: Tensor | None = None


def patterns(variant: str | None) -> list[str]:
    """Return the names of files of weights: whole, or an index and shards."""
    tag = "" if variant is None else f".{variant}"
    files = [
        f"{_STEM}{tag}.safetensors",
        f"{WEIGHTS}.index{tag}.json",
        f"{_STEM}{tag}-*.safetensors",
    ]
    return files + [f"{kind.folder}/{file}" for kind in (_UNET, _DIT) for file in files]


def read_body(
    folder: Path, time_range: list[float] | None, variant: str | None, asked: Asked
) -> tuple[Body, bool]:
    """Read a network and its safetensors weights from a folder.

    Returns:
        The body, and whether it was trained with dropped labels.

    Raises:
        CheckpointError: weights or settings that make no such network, or other classes than it
            has.
        FileNotFoundError: no weights.
    """
    import diffusers

    config = read_settings(folder / "config.json")
    kind = KINDS[config["_class_name"]]
    for wanted in (None, VARIANT) if variant is None else (variant,):
        files = weights_of(folder, wanted)
        if files:
            break
    else:
        raise no_weights(folder, variant)
    path, tensors, size = files[0], 0, 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors += len(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(file, error) from None
        size += file.stat().st_size
    try:
        _check_size(kind, config, tensors, size)
        model, found = getattr(diffusers, kind.model).from_pretrained(
            folder,
            variant=wanted,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, *DAMAGE) as error:
        raise CheckpointError(
            f"{path} and the config.json beside it give no {kind.model}: {reason(error)}"
        ) from None
    strangers = [*found["missing_keys"], *found["unexpected_keys"]]
    if strangers:
        raise CheckpointError(
            f"{path} does not fit the config.json beside it: {len(strangers)} of its weights are "
            f"missing or unknown, such as {strangers[0]}."
        )
    check_finite(model, path)
    try:
        return _body_of(kind, model.float(), time_range, _known(asked, config))
    except DAMAGE as error:
        raise CheckpointError(f"{folder}: {reason(error)}") from None


def _known(asked: Asked, config: Mapping[str, Any]) -> Asked:
    """Return what is known of the classes: the user's word, or else what `save_pretrained` left."""
    if asked.classes is not None or asked.embeddings is not None:
        return asked
    classes, drops = (config.get(name) for name in CLASS_ENTRIES)
    return asked._replace(classes=classes, drops=drops if asked.drops is None else asked.drops)


def _body_of(
    kind: Kind, model: Any, time_range: list[float] | None, asked: Asked
) -> tuple[Body, bool]:
    if asked.embeddings is not None:
        _embed(model, asked.embeddings)
    body = kind.body.from_model(model, time_range, asked.classes)
    if "classes" not in body.config:
        if asked.drops:
            raise ValueError("The network is unconditional: no labels can have been dropped.")
        return body, False
    if asked.drops and body.knows_none is False:
        count = body.config["classes"]
        raise ValueError(
            f'The network has embeddings for {count} classes and none for "no class": if the '
            f"last one means that, pass classes={count - 1}."
        )
    return body, bool(body.knows_none) if asked.drops is None else asked.drops


def _embed(model: Any, embeddings: Tensor) -> None:
    """Give a network that reads embeddings of classes (class_embed_type='identity') its own."""
    if model.config.get("class_embed_type") != "identity":
        raise ValueError(
            "class_embeddings are for a UNet2DModel with class_embed_type='identity'; this network "
            "has not."
        )
    width = model.time_embedding.linear_2.out_features
    if embeddings.ndim != 2 or embeddings.shape[1] != width or not len(embeddings):
        raise ValueError(
            f"class_embeddings must be (rows, {width}), got {tuple(embeddings.shape)}."
        )
    model.class_embedding = nn.Embedding.from_pretrained(embeddings.float(), freeze=False)
    model.register_to_config(class_embed_type=None, num_class_embeds=len(embeddings))


def weights_of(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a network's weights, one or the shards that an index names; or none.

    Raises:
        CheckpointError: a damaged index.
        FileNotFoundError: a shard is missing.
    """
    whole, index = (folder / name for name in patterns(variant)[:2])
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    shards = read_settings(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and _all_text(shards) else set()
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} is damaged: its weight_map names no files beside it.")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which {index.name} names.")
    return [folder / name for name in sorted(names)]


def _all_text(values: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in values.values())


def no_weights(folder: Path, variant: str | None) -> Exception:
    """Build the error for a folder without the weights that are asked for."""
    name = patterns(variant)[0]
    there = sorted(file.name for file in folder.glob(f"{_STEM}*.safetensors"))
    if there:
        return FileNotFoundError(
            f"{folder} lacks the weights, {name}; it holds {', '.join(there)}, which the argument "
            "variant chooses."
        )
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".ckpt", ".pt", ".pth"):
            return carries_pickle(file)
    return FileNotFoundError(f"{folder} lacks the weights, {name}.")


def _check_size(kind: Kind, config: Mapping[str, Any], tensors: int, size: int) -> None:
    """Raise ValueError for a network that is larger than its files, before it is built."""
    import diffusers

    model_class = getattr(diffusers, kind.model)
    defaults = inspect.signature(model_class).parameters
    kind.check({name: config.get(name, each.default) for name, each in defaults.items()})
    layers = config.get(kind.depth, 1)
    if not isinstance(layers, int) or layers > tensors:
        raise ValueError(f"{kind.depth} is {layers!r}, and the weights are {tensors} tensors")
    with torch.device("meta"):
        model = model_class.from_config(config)
    if (weights := sum(weight.numel() for weight in model.parameters())) > size:
        raise ValueError(f"the network has {weights} weights, the files have {size} bytes")
