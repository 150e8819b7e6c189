"""What a scheduler of diffusers says of the network beside it: noise levels, prediction, variance.

How the scheduler itself steps is not asked: that is the solver's to say. `settings_of` says the
same of a network of ours.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.checkpoint import CheckpointError
from ...common.reading import DAMAGE, INFINITIES, read_json, reason, shown
from ...envs.processes import VE, DiscreteVP, NoiseProcess, RectifiedFlow
from ..denoisers.denoiser import Variance
from ..denoisers.parameterisations import PARAMETERISATIONS, Parameterisation
from ..samplers.tableau import Tableau

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
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
KNOWN = (*SCHEDULERS, *FLOWS, *EDMS)
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
# What a network of a flow predicts, for those schedulers that serve others as well.
FLOW_PREDICTION = "flow_prediction"
# Longest chain that is read.
MOST_NOISINGS = 100_000
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


class Terms(NamedTuple):
    """What a scheduler says of the network beside it."""

    process: NoiseProcess
    prediction: str
    sigma_data: float = 0.5
    clip: bool = False
    time_range: list[float] | None = None
    variance: Variance | None = None


def read_terms(path: Path) -> Terms:
    """Read a scheduler's settings, `path`.

    Raises:
        CheckpointError: a scheduler of no chain, or settings that fewstep does not honour.
    """
    config = read_settings(path)
    kind = config.get("_class_name")
    try:
        if kind == "TableauScheduler":
            return _terms_of_ours(config)
        if kind in KNOWN:
            return terms_of_theirs(kind, config)
    except DAMAGE as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    raise CheckpointError(
        f"{path} describes a {shown(kind)}; fewstep reads {', '.join(KNOWN)} and its own "
        "TableauScheduler."
    )


def terms_of(scheduler: Any, mu: float | None = None) -> Terms:
    """Return what the settings of a scheduler say, ours or one of diffusers.

    Args:
        scheduler: the object.
        mu: the dynamic shift of a flow that has one.

    Raises:
        ValueError: a scheduler of another kind, or settings that fewstep does not honour.
    """
    names = [each.__name__ for each in type(scheduler).__mro__]
    if "TableauScheduler" in names:
        return _terms_of_ours(dict(scheduler.config))
    for kind in names:
        if kind in KNOWN:
            return terms_of_theirs(kind, dict(scheduler.config), mu)
    raise ValueError(
        f"fewstep does not know the noise levels of a {names[0]}, but those of {', '.join(KNOWN)}."
    )


def _terms_of_ours(config: dict[str, Any]) -> Terms:
    if not isinstance(clip := config.get("clip", False), bool):
        raise ValueError(f"clip must be true or false, got {clip!r}.")
    return Terms(
        Tableau.from_json(json.dumps(config.get("tableau"))).process,
        config.get("prediction", "epsilon"),
        config.get("sigma_data", 0.5),
        clip,
        config.get("time_range"),
        config.get("variance"),
    )


def terms_of_theirs(kind: str, config: dict[str, Any], mu: float | None = None) -> Terms:
    """Return what the settings of a scheduler of diffusers say; see `terms_of`.

    Raises:
        ValueError: settings that fewstep does not honour.
    """
    import diffusers

    declared = inspect.signature(getattr(diffusers, kind)).parameters
    settings = {name: each.default for name, each in declared.items()} | config
    if kind in EDMS:
        return _terms_of_edm(settings)
    if kind in FLOWS or settings.get("use_flow_sigmas"):
        return _terms_of_flow(kind, settings, mu)
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
        "thresholding=True": settings.get("thresholding"),
        f"clip_sample_range={clip_range}": clip and clip_range != 1.0,
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
    if settings.get("rescale_betas_zero_snr") and process.levels(process.t_max)[0] > 0:
        process = process.zero_terminal_snr()
    # Schedulers without the setting, such as DDIM's, are read by DDPMPipeline with its default.
    variance = VARIANCES[settings.get("variance_type") or "fixed_small"]
    return Terms(process, PREDICTIONS[prediction], clip=clip, variance=variance)


def _terms_of_edm(settings: Mapping[str, Any]) -> Terms:
    if (prediction := settings["prediction_type"]) != "epsilon":
        raise ValueError(
            f"the scheduler has EDM's levels with prediction_type={prediction!r}, where fewstep "
            "reads 'epsilon'."
        )
    process = VE(settings["sigma_min"], settings["sigma_max"])
    return Terms(process, "edm", sigma_data=settings["sigma_data"])


def _terms_of_flow(kind: str, settings: Mapping[str, Any], mu: float | None) -> Terms:
    prediction = settings.get("prediction_type", FLOW_PREDICTION)
    if kind not in FLOWS and prediction != FLOW_PREDICTION:
        raise ValueError(
            f"the scheduler has use_flow_sigmas=True with prediction_type={prediction!r}, where "
            f"fewstep reads {FLOW_PREDICTION!r}."
        )
    if settings.get("invert_sigmas"):
        raise ValueError("the scheduler has invert_sigmas=True, which fewstep does not honour.")
    shift = settings["shift"] if kind in FLOWS else settings["flow_shift"]
    if settings.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError(
                "the scheduler shifts its levels by the size of the picture "
                "(use_dynamic_shifting=True): pass mu, the shift that the table is made for."
            )
        linear = settings.get("time_shift_type") == "linear"
        shift = mu if linear else math.exp(mu)
    return Terms(RectifiedFlow(shift, settings["num_train_timesteps"]), "flow")


def settings_of(parameterisation: Parameterisation, clip: bool) -> dict[str, Any]:
    """Return what diffusers' own schedulers are told of a network.

    Returns:
        Entries of a scheduler's config: `DDIMScheduler.from_config` and the like have this
        network's noise levels. Empty for what none of them knows.
    """
    process, name = parameterisation.process, parameterisation.pipeline_name
    if process.betas is not None and name is not None:
        rescaled = {"rescale_betas_zero_snr": True} if process.betas[-1] == 1 else {}
        return {
            "num_train_timesteps": len(process.betas),
            "trained_betas": process.betas.tolist(),
            "prediction_type": name,
            "clip_sample": clip,
            **rescaled,
        }
    entries = process.to_config()
    # Networks of diffusers are asked at a whole multiple of the level.
    if parameterisation.name == process.prediction == "flow" and process.time_scale > 1:
        return {
            "num_train_timesteps": round(process.time_scale),
            "prediction_type": FLOW_PREDICTION,
            "shift": entries["shift"],
            # What DPM-Solver, UniPC and the like call them. Flux's pipelines then name no sigmas.
            "flow_shift": entries["shift"],
            "use_flow_sigmas": True,
        }
    if parameterisation.name == "edm" and process.time_is_level:
        return {
            # How many levels those of EDM list at first; none of them are kept.
            "num_train_timesteps": 1000,
            "sigma_min": process.t_min,
            "sigma_max": process.t_max,
            "prediction_type": "epsilon",
        }
    return {}


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


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings; CheckpointError if it holds none."""
    try:
        # diffusers writes the infinite bounds of some schedulers.
        value = read_json(path, constants=INFINITIES)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no settings.")
    return value
