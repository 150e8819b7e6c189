"""Where a pretrained denoiser comes from: a file or run folder of ours, or diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...agents import Denoiser
from ...agents.pretrained import from_pretrained
from ...common.checkpoint import ForeignBodyError
from ..run.folder import denoiser_file
from .foreign import foreign_body, needs_flag
from .train import TrainSettings


def find_denoiser(
    source: Path,
    device: torch.device | str = "cpu",
    download: bool = False,
    body: nn.Module | None = None,
    body_name: str | None = None,
    classes: int | None = None,
) -> Denoiser:
    """Load a denoiser from wherever it is.

    Args:
        source: a run folder, a .safetensors file, a folder that diffusers wrote, or the name of a
            model on the hub, such as google/ddpm-cifar10-32.
        device: where its weights go.
        download: fetch it from the hub if it is not in the local cache.
        body: the network, where it is the user's own.
        body_name: what the user called it, for the sentence that asks for it.
        classes: of a network of diffusers, where its folder does not say it.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: a corrupt or foreign file.
        ValueError: a pipeline that fewstep does not read, or classes for a file of ours.
    """
    diffusers = source.is_dir() and (
        (source / "model_index.json").is_file() or "_class_name" in _text(source / "config.json")
    )
    try:
        denoiser = Denoiser.load(denoiser_file(source), device, body)
        if classes not in (None, denoiser.classes):
            raise ValueError(
                f"{source} says how many classes its denoiser knows, "
                f"{denoiser.classes or 'none'}: leave out --classes, which is for networks of "
                "diffusers."
            )
        return denoiser
    except ForeignBodyError:
        raise needs_flag(source, body_name) from None
    except FileNotFoundError:
        if not diffusers and (source.exists() or len(source.parts) != 2):
            raise
    if body is not None:
        raise ValueError(f"{source} is of diffusers and brings its network: leave out --body.")
    return from_pretrained(str(source), device=device, download=download, classes=classes)


def starting_denoiser(run: TrainSettings, device: torch.device | str = "cpu") -> Denoiser | None:
    """Load the denoiser that a run starts from; None if it is to clone one.

    Raises:
        ValueError: more than one of --denoiser, --pretrained and --start-from; or what
            `find_denoiser` raises.
    """
    if sum(source is not None for source in (run.denoiser, run.pretrained, run.start_from)) > 1:
        raise ValueError("Give one of --denoiser, --pretrained and --start-from.")
    if run.pretrained is not None:
        return from_pretrained(
            run.pretrained, device=device, download=run.download, classes=run.classes
        )
    source = run.denoiser or run.start_from
    if source is None:
        if run.classes is not None:
            raise ValueError(
                "--classes is for a denoiser of diffusers: give --pretrained, too; a network that "
                "is cloned has the classes of its environment."
            )
        return None
    body = foreign_body(run.body, run.body_options)
    return find_denoiser(source, device, run.download, body, classes=run.classes)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
