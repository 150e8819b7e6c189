"""Denoisers from diffusers: pipelines and models in a folder, or by their name on the hub.

A pipeline of an unconditional `UNet2DModel`, such as google/ddpm-cifar10-32, holds a network and a
scheduler; of the scheduler a denoiser needs the betas, the prediction type and whether samples are
clipped. Weights are read from safetensors files only, and the internet is asked only on demand.
`Denoiser.from_pretrained` is this function; `fewstep.agents.pipelines` writes such folders.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..critics.reading import read_json
from ..envs.process import DiscreteVP, NoiseProcess
from .checkpoint import CheckpointError, carries_pickle, check_finite, unreadable
from .denoiser import Denoiser, Prediction
from .unet import UNet2D, require_diffusers

if TYPE_CHECKING:
    from .pipeline_scheduler import TableauScheduler

# Schedulers of the chain that the network was trained on; diffusers reads each one's config into
# any other of them.
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"

_SETTINGS = ["model_index.json", "*config.json"]
_WEIGHTS = [WEIGHTS, f"unet/{WEIGHTS}"]


class _Terms(NamedTuple):
    """What a scheduler says of the network beside it."""

    process: NoiseProcess
    prediction: Prediction
    sigma_data: float = 0.5
    clip: bool = False
    time_range: list[float] | None = None


def from_pretrained(
    name_or_folder: str | Path, *, device: str | torch.device = "cpu", download: bool = False
) -> Denoiser:
    """Read a denoiser from a diffusers pipeline or model.

    Args:
        name_or_folder: a folder that holds a pipeline (model_index.json, with unet/ and scheduler/
            or with all files at its top) or a `UNet2DModel` alone (config.json); or the hub's name
            of one, "owner/name", in the local hub cache. A model without a scheduler_config.json is
            taken for one of Ho et al.'s: 1000 linear betas, noise prediction, clipped; a warning
            says so.
        device: where its weights go.
        download: fetch what the cache lacks from the hub.

    Returns:
        A denoiser with a `UNet2D` body, `clip` as the scheduler has it.

    Raises:
        FileNotFoundError: no such folder, no such name in the cache (or on the hub), or files are
            missing.
        CheckpointError: another kind of pipeline, network or scheduler; settings that fewstep does
            not honour; weights that are pickled, truncated, not finite or do not fit.
        ImportError: diffusers is not installed.
    """
    require_diffusers("Denoiser.from_pretrained")
    given = Path(name_or_folder).expanduser()
    if given.is_dir():
        unet, terms = _read_settings(given)
    else:
        name = str(name_or_folder)
        _check_name(name, given)
        unet, terms = _read_settings(_snapshot(name, _SETTINGS, download))
        # The weights only now: they may be large, and of a network that cannot be read.
        _snapshot(name, _SETTINGS + _WEIGHTS, download)
    body = _read_body(unet, terms.time_range)
    denoiser = Denoiser(body, terms.process, terms.prediction, terms.sigma_data, clip=terms.clip)
    return denoiser.to(device)


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
            f"`hf download {name}`, or pass download=True (--download)."
        ) from None
    return Path(folder)


def _read_settings(folder: Path) -> tuple[Path, _Terms]:
    """Return the folder of the network's files and what the scheduler says of it."""
    index_file = folder / "model_index.json"
    scheduler = None
    unet = folder
    if index_file.is_file():
        index = _read_json(index_file)
        _check_index(index, folder)
        unet = _component(folder, "unet", "config.json")
        scheduler = _component(folder, "scheduler", "scheduler_config.json")
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds neither a diffusers pipeline (model_index.json) nor a UNet2DModel "
            "(config.json)."
        )
    elif (folder / "scheduler_config.json").is_file():
        scheduler = folder
    kind = _read_json(unet / "config.json").get("_class_name")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{unet} holds a {kind}; fewstep reads an unconditional UNet2DModel.")
    if scheduler is None:
        warnings.warn(
            f"{folder} holds a network without a scheduler_config.json: it is taken for one that "
            "predicts the noise of 1000 linear betas from 1e-4 to 0.02 and is clipped.",
            stacklevel=4,  # the line that called Denoiser.from_pretrained
        )
        return unet, _terms_of_theirs("DDPMScheduler", {})
    return unet, _read_scheduler(scheduler / "scheduler_config.json")


def _check_index(index: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError for a pipeline that is not a UNet2DModel with a scheduler."""
    parts = {
        name: entry[1]
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1]
    }
    if parts.keys() == {"unet", "scheduler"} and parts["unet"] == "UNet2DModel":
        return
    found = ", ".join(f"{name} {kind}" for name, kind in parts.items())
    raise CheckpointError(
        f"{folder} holds a {index.get('_class_name')} ({found}); fewstep reads pipelines of an "
        "unconditional UNet2DModel and a scheduler alone, such as DDPMPipeline and DDIMPipeline."
    )


def _component(folder: Path, name: str, file: str) -> Path:
    """Return where a component's files are: in its folder or, in the oldest models, at the top."""
    for place in (folder / name, folder):
        if (place / file).is_file():
            return place
    raise FileNotFoundError(f"{folder} lacks {name}/{file}; fetch the whole pipeline.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no settings.")
    return value


def _read_scheduler(path: Path) -> _Terms:
    config = _read_json(path)
    kind = config.get("_class_name")
    try:
        if kind == "TableauScheduler":
            return _terms_of_ours(config)
        if kind in SCHEDULERS:
            return _terms_of_theirs(kind, config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    raise CheckpointError(
        f"{path} describes a {kind}; fewstep reads {', '.join(SCHEDULERS)} and its own "
        "TableauScheduler."
    )


def _terms_of_ours(config: dict[str, Any]) -> _Terms:
    from .pipeline_scheduler import TableauScheduler

    scheduler: TableauScheduler = TableauScheduler.from_config(config)
    settings = scheduler.config
    return _Terms(
        scheduler.tableau.process,
        settings["prediction"],
        settings["sigma_data"],
        settings["clip"],
        settings["time_range"],
    )


def _terms_of_theirs(kind: str, config: dict[str, Any]) -> _Terms:
    import diffusers

    scheduler = getattr(diffusers, kind).from_config(config)
    settings = scheduler.config
    clip = bool(settings.get("clip_sample", False))
    clip_range = settings.get("clip_sample_range", 1.0)
    refused = {
        "rescale_betas_zero_snr=True": settings.get("rescale_betas_zero_snr"),
        "thresholding=True": settings.get("thresholding"),
        f"clip_sample_range={clip_range}": clip and clip_range != 1.0,
        "a learned variance": "learned" in str(settings.get("variance_type")),
        "other num_train_timesteps than betas": len(scheduler.betas)
        != settings["num_train_timesteps"],
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"the scheduler has {what}, which fewstep does not honour.")
    prediction = settings["prediction_type"]
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"the scheduler has prediction_type={prediction!r}; fewstep reads "
            f"{', '.join(PREDICTIONS)}."
        )
    process = _process(settings, scheduler.betas)
    return _Terms(process, PREDICTIONS[prediction], clip=clip)


def _process(settings: Mapping[str, Any], betas: Tensor) -> DiscreteVP:
    """Return the chain of a diffusers scheduler, whose betas are rounded to float32.

    Betas that are listed in its settings are there in full. Those of the two common formulas become
    the same process as `make_process` builds, so that tables and environments of it fit.
    """
    if settings.get("trained_betas") is not None:
        return DiscreteVP(settings["trained_betas"])
    exact = None
    if settings["beta_schedule"] == "linear":
        exact = DiscreteVP.linear(len(betas), settings["beta_start"], settings["beta_end"])
    elif settings["beta_schedule"] == "squaredcos_cap_v2":
        exact = DiscreteVP.cosine(len(betas))
    if exact is not None and torch.allclose(exact.betas, betas.double(), rtol=1e-6, atol=0):
        return exact
    return DiscreteVP(betas)


def _read_body(folder: Path, time_range: list[float] | None) -> UNet2D:
    """Read a UNet2DModel and its safetensors weights from a folder."""
    from diffusers import UNet2DModel

    path = folder / WEIGHTS
    if not path.is_file():
        for file in sorted(folder.iterdir()):
            if file.suffix in (".bin", ".ckpt", ".pt", ".pth"):
                raise carries_pickle(file)
        raise FileNotFoundError(f"{folder} lacks the weights, {WEIGHTS}.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from None
    try:
        model, found = UNet2DModel.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        body = UNet2D.from_model(model.float(), time_range)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} and the config.json beside it give no UNet2DModel: {_first(error)}"
        ) from None
    strangers = [*found["missing_keys"], *found["unexpected_keys"]]
    if strangers:
        raise CheckpointError(
            f"{path} does not fit the config.json beside it: {len(strangers)} of its weights are "
            f"missing or unknown, such as {strangers[0]}."
        )
    check_finite(body.unet, path)
    return body


def _first(error: Exception) -> str:
    """Return the line that says what is wrong, of which torch and diffusers write several."""
    lines = [line.strip() for line in str(error).splitlines()] or [repr(error)]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0])
