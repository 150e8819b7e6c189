"""A pipeline's folder, looked at before it is loaded: whole, of a known family, no pickles."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...common.checkpoint import CheckpointError, carries_pickle
from ...common.names import unknown_name
from ...common.reading import INFINITIES, read_json, shown
from .families import FAMILIES, Family

INDEX = "model_index.json"
# Weights that only unpickling could read.
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


def family_of(folder: Path) -> type[Family]:
    """Return the family of the pipeline in a folder.

    Raises:
        FileNotFoundError: no pipeline, or a part of it is missing.
        CheckpointError: a damaged index, an unknown family, or a part that is left out.
    """
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no diffusers pipeline: it has no {INDEX}.")
    index = _read(file)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{folder}: {str(unknown_name('kind of pipeline', kind, FAMILIES))[:-1]}. A network of "
            "another kind is given to a Denoiser by hand, as a body of your own."
        )
    family = FAMILIES[kind]
    for part in family.components:
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not entry[1]:
            raise CheckpointError(
                f"{folder} is a {kind} without its {part}; it needs {', '.join(family.components)}."
            )
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder} lacks {part}/, which its {INDEX} names: fetch the whole pipeline."
            )
    return family


def check_weights(folder: Path, parts: Iterable[str], variant: str | None) -> str | None:
    """See that the weights of all parts are there, as safetensors; return the variant to load.

    Args:
        folder: of the pipeline.
        parts: its components; those without a config.json, such as tokenizers, have no weights.
        variant: what is asked for; None takes those without a name, or where there are none "fp16".

    Raises:
        FileNotFoundError: weights are missing.
        CheckpointError: pickled weights, or a damaged index of shards.
    """
    chosen = variant
    for part in parts:
        place = folder / part
        if not (place / "config.json").is_file():
            if part not in ("scheduler",) and not part.startswith("tokenizer"):
                raise FileNotFoundError(f"{folder} lacks {part}/config.json: fetch all of it.")
            continue
        for wanted in (None, "fp16") if variant is None else (variant, None):
            if _has_weights(place, wanted):
                chosen = wanted or chosen
                break
        else:
            raise _no_weights(place, variant)
    return chosen


def _has_weights(place: Path, variant: str | None) -> bool:
    """Tell whether a component's weights of this name are whole.

    Raises:
        FileNotFoundError: a shard is missing.
        CheckpointError: a damaged index.
    """
    tag = "" if variant is None else f".{variant}"
    whole = re.compile(rf"(diffusion_pytorch_model|model){re.escape(tag)}\.safetensors")
    if any(whole.fullmatch(file.name) for file in place.iterdir()):
        return True
    indices = [
        *place.glob(f"*.safetensors.index{tag}.json"),
        *(place.glob(f"*.safetensors{tag}.index.json") if tag else ()),
    ]
    for index in indices:
        shards = _read(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{index} is damaged: it has no weight_map.")
        for name in sorted(set(shards.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{index} is damaged: it names files elsewhere.")
            if not (place / name).is_file():
                raise FileNotFoundError(
                    f"{place} lacks {name}, which {index.name} names: fetch the whole pipeline."
                )
        return True
    return False


def _no_weights(place: Path, variant: str | None) -> Exception:
    named = "" if variant is None else f" of the variant {variant!r}"
    there = sorted(file.name for file in place.glob("*.safetensors"))
    if there:
        return FileNotFoundError(
            f"{place} lacks weights{named}; it holds {', '.join(there)}, which the argument "
            "variant chooses."
        )
    for file in sorted(place.iterdir()):
        if file.suffix in _PICKLES:
            return carries_pickle(file)
    return FileNotFoundError(f"{place} lacks its weights{named}: fetch the whole pipeline.")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, constants=INFINITIES)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds {shown(value)}.")
    return value
