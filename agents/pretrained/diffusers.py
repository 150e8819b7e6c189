"""Denoisers from diffusers: pipelines and models in a folder, or by their name on the hub.

A pipeline of a `UNet2DModel`, such as google/ddpm-cifar10-32, or of a `DiTTransformer2DModel`
holds a network and a scheduler; of the scheduler a denoiser needs the betas, the prediction type,
the variance and whether samples are clipped. Weights are read from safetensors files only, and the
internet is asked only on demand.
`fewstep.agents.pretrained.pipelines` writes such folders.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import checked
from ...common.checkpoint import CheckpointError
from ...common.reading import damage_named, shown
from ..denoisers.denoiser import Denoiser
from ..denoisers.networks.unet import require_diffusers
from .chains import Terms, read_settings, read_terms, terms_of_theirs
from .models import CLASS_ENTRIES, KINDS, VARIANT, Asked, patterns, read_body, weights_of

_SETTINGS = ["model_index.json", "*config.json"]
_MODELS = "UNet2DModel or DiTTransformer2DModel"


@checked
def from_pretrained(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    download: bool = False,
    variant: str | None = None,
    classes: int | None = None,
    drops: bool | None = None,
    class_embeddings: Tensor | None = None,
) -> Denoiser:
    """Read a denoiser from a diffusers pipeline or model.

    Args:
        name_or_folder: a folder that holds a pipeline (model_index.json, with unet/ and scheduler/
            or with all files at its top) or a `UNet2DModel` or `DiTTransformer2DModel` alone
            (config.json); or the hub's name of one, "owner/name", in the local hub cache. A model
            without a scheduler_config.json is taken for one of Ho et al.'s: 1000 linear betas,
            noise prediction, clipped; a warning says so. Of a `DiTPipeline` the denoiser is that
            of the latents; its VAE is not read.
        device: where its weights go.
        download: fetch what the cache lacks from the hub.
        variant: which of a repository's weights to read, such as "fp16" or "non_ema", as diffusers
            names them; by default those without a name, and where there are none those of "fp16".
            They become float32.
        classes: number of classes of a class-conditional network, without "no class". A
            `DiTTransformer2DModel` says it. By default all class embeddings of a `UNet2DModel` are
            those of classes; give one less than `num_class_embeds` where the last one means "no
            class". With `class_embed_type="timestep"` it has to be given.
        drops: whether the network was trained with dropped labels, so that it can be guided; by
            default where it has an embedding for "no class".
        class_embeddings: (rows, width) what a `UNet2DModel` with `class_embed_type="identity"`
            reads of each class. They become weights of the network.

    Returns:
        A denoiser with a `UNet2D` or `DiT` body, `clip` and `variance` as the scheduler has them:
        the "ancestral" solver on `Schedule.leading` draws what the DDPMPipeline does. That of a
        class-conditional network is conditional, see `Denoiser.given`.

    Raises:
        FileNotFoundError: no such folder, no such name in the cache (or on the hub), or files are
            missing.
        CheckpointError: another kind of pipeline, network or scheduler; settings that fewstep does
            not honour; other classes than the network has; weights that are pickled, truncated, not
            finite or do not fit.
        ImportError: diffusers is not installed.
    """
    require_diffusers("from_pretrained")
    given = Path(name_or_folder).expanduser()
    if given.is_dir():
        network, terms = _read_settings(given)
    else:
        name = str(name_or_folder)
        _check_name(name, given)
        network, terms = _read_settings(_snapshot(name, _SETTINGS, download))
        # The weights only now: they may be large, and of a network that cannot be read.
        for wanted in (None, VARIANT) if variant is None else (variant,):
            _snapshot(name, _SETTINGS + patterns(wanted), download)
            if weights_of(network, wanted):
                break
    asked = Asked(classes, drops, class_embeddings)
    body, dropped = read_body(network, terms.time_range, variant, asked)
    if body.knows_none is False and classes is None and class_embeddings is None:
        _warn_of_classes(network, body.config["classes"])
    with damage_named(network.parent, CheckpointError):
        denoiser = Denoiser(
            body,
            terms.process,
            terms.prediction,
            terms.sigma_data,
            terms.clip,
            terms.variance,
            drops=dropped,
        )
    return denoiser.to(device)


def _warn_of_classes(network: Path, classes: int) -> None:
    """Warn of class embeddings of which nothing says whether the last one means "no class"."""
    if CLASS_ENTRIES[0] not in read_settings(network / "config.json"):
        warnings.warn(
            f'{network} does not say whether its last class embedding means "no class": all '
            f"{classes} are taken for classes, which leaves no guidance; if it does, pass classes="
            f"{classes - 1}.",
            stacklevel=4,  # the line that called from_pretrained, which is wrapped
        )


def _check_name(name: str, given: Path) -> None:
    if given.exists():
        raise CheckpointError(
            f"{name} is a file; from_pretrained reads diffusers folders, Denoiser.load the files "
            "that fewstep writes."
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"There is no folder {name}, and it is no name of the hub's, such as "
            "google/ddpm-cifar10-32."
        )


def _snapshot(name: str, patterns: list[str], download: bool) -> Path:
    """Return the folder in the hub cache that holds a repository's files."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, local_files_only=not download
        )
    except (OSError, ValueError) as error:
        if download:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise FileNotFoundError(f"Could not download {name}: {reason}") from None
        raise FileNotFoundError(
            f"There is no folder {name}, and the local hub cache lacks it: fetch it with "
            f"`hf download {name}`, or pass download=True."
        ) from None
    return Path(folder)


def _read_settings(folder: Path) -> tuple[Path, Terms]:
    """Return the folder of the network's files and what the scheduler says of it."""
    index_file = folder / "model_index.json"
    scheduler = None
    network = folder
    if index_file.is_file():
        index = read_settings(index_file)
        network = _component(folder, _network_of(index, folder), "config.json")
        scheduler = _component(folder, "scheduler", "scheduler_config.json")
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds neither a diffusers pipeline (model_index.json) nor a "
            f"{_MODELS} (config.json)."
        )
    elif (folder / "scheduler_config.json").is_file():
        scheduler = folder
    kind = read_settings(network / "config.json").get("_class_name")
    if kind not in KINDS:
        raise CheckpointError(f"{network} holds a {shown(kind)}; fewstep reads a {_MODELS}.")
    if scheduler is None:
        warnings.warn(
            f"{folder} holds a network without a scheduler_config.json: it is taken for one that "
            "predicts the noise of 1000 linear betas from 1e-4 to 0.02 and is clipped.",
            stacklevel=4,  # the line that called from_pretrained, which is wrapped
        )
        return network, terms_of_theirs("DDPMScheduler", {})
    return network, read_terms(scheduler / "scheduler_config.json")


def _network_of(index: dict[str, Any], folder: Path) -> str:
    """Return which component of a pipeline is its network.

    Raises:
        CheckpointError: it is not made of a network that fewstep reads, a scheduler, and perhaps
            the VAE of a DiT.
    """
    parts = {
        name: entry[1]
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1]
    }
    for name, kind in parts.items():
        known = KINDS.get(kind) if isinstance(kind, str) else None
        if known and known.folder == name and parts.keys() - known.beside == {name, "scheduler"}:
            return name
    found = ", ".join(f"{shown(name)} {shown(kind)}" for name, kind in parts.items())
    raise CheckpointError(
        f"{folder} holds a {shown(index.get('_class_name'))} ({found}); fewstep reads pipelines of "
        f"a {_MODELS} and a scheduler, such as DDPMPipeline, DDIMPipeline and DiTPipeline."
    )


def _component(folder: Path, name: str, file: str) -> Path:
    """Return where a component's files are: in its folder or, in the oldest models, at the top."""
    for place in (folder / name, folder):
        if (place / file).is_file():
            return place
    raise FileNotFoundError(f"{folder} lacks {name}/{file}; fetch the whole pipeline.")
