"""Denoisers from diffusers: pipelines and models in a folder, or by their name on the hub.

A pipeline of an unconditional `UNet2DModel`, such as google/ddpm-cifar10-32, holds a network and a
scheduler; of the scheduler a denoiser needs the betas, the prediction type, the variance and
whether samples are clipped. Weights are read from safetensors files only, and the internet is asked
only on demand.
`fewstep.agents.pretrained.pipelines` writes such folders.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...common.checkpoint import CheckpointError, carries_pickle, check_finite, unreadable
from ...common.reading import DAMAGE, INFINITIES, damage_named, read_json, reason, shown
from ...envs.processes import DiscreteVP, NoiseProcess
from ..denoisers.denoiser import Denoiser, Variance
from ..denoisers.networks.unet import UNet2D, check_config, require_diffusers
from ..denoisers.parameterisations import PARAMETERISATIONS

# Schedulers of the chain that the network was trained on; diffusers reads each one's config into
# any other of them. How they step is not asked: that is the solver's to say.
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
# Longest chain that is read.
MOST_NOISINGS = 100_000
_STEM = "diffusion_pytorch_model"
WEIGHTS = f"{_STEM}.safetensors"
VARIANT = "fp16"
# The "log" kinds are the same numbers, kept as logarithms.
VARIANCES: dict[str, Variance] = {
    "fixed_small": "small",
    "fixed_large": "large",
    "fixed_small_log": "small",
    "fixed_large_log": "large",
}

# What a network predicts, by diffusers' name of it.
PREDICTIONS = {
    kind.pipeline_name: name for name, kind in PARAMETERISATIONS.items() if kind.pipeline_name
}

_SETTINGS = ["model_index.json", "*config.json"]


def _patterns(variant: str | None) -> list[str]:
    """Return the names of files of weights: whole, or an index and shards."""
    tag = "" if variant is None else f".{variant}"
    files = [
        f"{_STEM}{tag}.safetensors",
        f"{WEIGHTS}.index{tag}.json",
        f"{_STEM}{tag}-*.safetensors",
    ]
    return files + [f"unet/{file}" for file in files]


class _Terms(NamedTuple):
    """What a scheduler says of the network beside it."""

    process: NoiseProcess
    prediction: str
    sigma_data: float = 0.5
    clip: bool = False
    time_range: list[float] | None = None
    variance: Variance | None = None


def from_pretrained(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    download: bool = False,
    variant: str | None = None,
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
        variant: which of a repository's weights to read, such as "fp16" or "non_ema", as diffusers
            names them; by default those without a name, and where there are none those of "fp16".
            They become float32.

    Returns:
        A denoiser with a `UNet2D` body, `clip` and `variance` as the scheduler has them: the
        "ancestral" solver on `Schedule.leading` draws what the DDPMPipeline does.

    Raises:
        FileNotFoundError: no such folder, no such name in the cache (or on the hub), or files are
            missing.
        CheckpointError: another kind of pipeline, network or scheduler; settings that fewstep does
            not honour; weights that are pickled, truncated, not finite or do not fit.
        ImportError: diffusers is not installed.
    """
    require_diffusers("from_pretrained")
    given = Path(name_or_folder).expanduser()
    if given.is_dir():
        unet, terms = _read_settings(given)
    else:
        name = str(name_or_folder)
        _check_name(name, given)
        unet, terms = _read_settings(_snapshot(name, _SETTINGS, download))
        # The weights only now: they may be large, and of a network that cannot be read.
        for wanted in (None, VARIANT) if variant is None else (variant,):
            _snapshot(name, _SETTINGS + _patterns(wanted), download)
            if _weights_of(unet, wanted):
                break
    body = _read_body(unet, terms.time_range, variant)
    with damage_named(unet.parent, CheckpointError):
        denoiser = Denoiser(
            body, terms.process, terms.prediction, terms.sigma_data, terms.clip, terms.variance
        )
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
            f"`hf download {name}`, or pass download=True."
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
    config = _read_json(unet / "config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise CheckpointError(
            f"{unet} holds a {shown(kind)}; fewstep reads an unconditional UNet2DModel."
        )
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise CheckpointError(
            f"{unet} holds a class-conditional UNet2DModel: fewstep does not read conditional "
            "networks yet."
        )
    if scheduler is None:
        warnings.warn(
            f"{folder} holds a network without a scheduler_config.json: it is taken for one that "
            "predicts the noise of 1000 linear betas from 1e-4 to 0.02 and is clipped.",
            stacklevel=3,  # the line that called from_pretrained
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
    found = ", ".join(f"{shown(name)} {shown(kind)}" for name, kind in parts.items())
    raise CheckpointError(
        f"{folder} holds a {shown(index.get('_class_name'))} ({found}); fewstep reads pipelines of "
        "an unconditional UNet2DModel and a scheduler alone, such as DDPMPipeline and DDIMPipeline."
    )


def _component(folder: Path, name: str, file: str) -> Path:
    """Return where a component's files are: in its folder or, in the oldest models, at the top."""
    for place in (folder / name, folder):
        if (place / file).is_file():
            return place
    raise FileNotFoundError(f"{folder} lacks {name}/{file}; fetch the whole pipeline.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        # diffusers writes the infinite bounds of some schedulers.
        value = read_json(path, constants=INFINITIES)
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
    except DAMAGE as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    raise CheckpointError(
        f"{path} describes a {shown(kind)}; fewstep reads {', '.join(SCHEDULERS)} and its own "
        "TableauScheduler."
    )


def _terms_of_ours(config: dict[str, Any]) -> _Terms:
    from .scheduler import TableauScheduler  # a class of diffusers', which loads only here

    scheduler: TableauScheduler = TableauScheduler.from_config(config)
    settings = scheduler.config
    if not isinstance(settings["clip"], bool):
        raise ValueError(f"clip must be true or false, got {settings['clip']!r}.")
    return _Terms(
        scheduler.tableau.process,
        settings["prediction"],
        settings["sigma_data"],
        settings["clip"],
        settings["time_range"],
        settings.get("variance"),
    )


def _terms_of_theirs(kind: str, config: dict[str, Any]) -> _Terms:
    import diffusers

    declared = inspect.signature(getattr(diffusers, kind)).parameters
    settings = {name: each.default for name, each in declared.items()} | config
    noisings = settings["num_train_timesteps"]
    if not isinstance(noisings, int) or not 1 <= noisings <= MOST_NOISINGS:
        raise ValueError(f"num_train_timesteps must be 1 to {MOST_NOISINGS}, got {noisings!r}.")
    # All have the same formulas for betas; some compute their steps when they are built, too.
    scheduler: Any = diffusers.DDPMScheduler(**{name: settings[name] for name in _BETAS})
    betas = scheduler.betas
    clip = settings.get("clip_sample", False)
    if not isinstance(clip, bool):
        raise ValueError(f"clip_sample must be true or false, got {clip!r}.")
    clip_range = settings.get("clip_sample_range", 1.0)
    refused = {
        "rescale_betas_zero_snr=True": settings.get("rescale_betas_zero_snr"),
        "thresholding=True": settings.get("thresholding"),
        f"clip_sample_range={clip_range}": clip and clip_range != 1.0,
        "use_flow_sigmas=True": settings.get("use_flow_sigmas"),
        "timestep_type='continuous'": settings.get("timestep_type") == "continuous",
        "a learned variance": "learned" in str(settings.get("variance_type")),
        "other num_train_timesteps than betas": len(betas) != noisings,
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"the scheduler has {what}, which fewstep does not honour.")
    if settings.get("variance_type") not in (None, *VARIANCES):
        raise ValueError(
            f"the scheduler has variance_type={settings['variance_type']!r}; fewstep reads "
            f"{', '.join(VARIANCES)}."
        )
    prediction = settings["prediction_type"]
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"the scheduler has prediction_type={prediction!r}; fewstep reads "
            f"{', '.join(PREDICTIONS)}."
        )
    process = _process(settings, betas)
    # Schedulers without the setting, such as DDIM's, are read by DDPMPipeline with its default.
    variance = VARIANCES[settings.get("variance_type") or "fixed_small"]
    return _Terms(process, PREDICTIONS[prediction], clip=clip, variance=variance)


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


def _read_body(folder: Path, time_range: list[float] | None, variant: str | None) -> UNet2D:
    """Read a UNet2DModel and its safetensors weights from a folder."""
    from diffusers import UNet2DModel

    for wanted in (None, VARIANT) if variant is None else (variant,):
        files = _weights_of(folder, wanted)
        if files:
            break
    else:
        raise _no_weights(folder, variant)
    path, tensors, size = files[0], 0, 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors += len(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(file, error) from None
        size += file.stat().st_size
    try:
        _check_size(folder, tensors, size)
        model, found = UNet2DModel.from_pretrained(
            folder,
            variant=wanted,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        body = UNet2D.from_model(model.float(), time_range)
    except (OSError, *DAMAGE) as error:
        raise CheckpointError(
            f"{path} and the config.json beside it give no UNet2DModel: {reason(error)}"
        ) from None
    strangers = [*found["missing_keys"], *found["unexpected_keys"]]
    if strangers:
        raise CheckpointError(
            f"{path} does not fit the config.json beside it: {len(strangers)} of its weights are "
            f"missing or unknown, such as {strangers[0]}."
        )
    check_finite(body.unet, path)
    return body


def _weights_of(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a network's weights, one or the shards that an index names; or none.

    Raises:
        CheckpointError: a damaged index.
        FileNotFoundError: a shard is missing.
    """
    whole, index = (folder / name for name in _patterns(variant)[:2])
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    shards = _read_json(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and _all_text(shards) else set()
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} is damaged: its weight_map names no files beside it.")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which {index.name} names.")
    return [folder / name for name in sorted(names)]


def _all_text(values: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in values.values())


def _no_weights(folder: Path, variant: str | None) -> Exception:
    """Build the error for a folder without the weights that are asked for."""
    name = _patterns(variant)[0]
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


def _check_size(folder: Path, tensors: int, size: int) -> None:
    """Raise ValueError for a network that is larger than its files, before it is built."""
    from diffusers import UNet2DModel

    config = _read_json(folder / "config.json")
    defaults = inspect.signature(UNet2DModel).parameters
    check_config({name: config.get(name, each.default) for name, each in defaults.items()})
    layers = config.get("layers_per_block", 1)
    if not isinstance(layers, int) or layers > tensors:
        raise ValueError(f"layers_per_block is {layers!r}, and the weights are {tensors} tensors")
    with torch.device("meta"):
        model = UNet2DModel.from_config(config)
    if (weights := sum(weight.numel() for weight in model.parameters())) > size:
        raise ValueError(f"the network has {weights} weights, the files have {size} bytes")
