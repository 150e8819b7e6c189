"""Denoisers for diffusers: folders that its `DDPMPipeline` or `DiTPipeline` opens.

`from_pretrained` of `pretrained.diffusers` reads both kinds of folder back. diffusers has no
pipeline for a class-conditional `UNet2DModel`: of such a folder `DDPMPipeline.from_pretrained`
gives network and scheduler, and docs/conditions.md has the loop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...common.arguments import checked
from ...common.conditions import Classes
from ...common.files import unwritable, write_folder
from ...common.reading import damage_named, read_json
from ...envs.schedules import Schedule
from ..denoisers.conditioning import Conditioning
from ..denoisers.denoiser import Denoiser
from ..denoisers.networks import DiT, UNet2D
from ..denoisers.networks.unet import require_diffusers
from ..denoisers.parameterisations.rescaled import Rescaled
from ..samplers.tableau import Tableau
from ..solvers.heun import heun
from .chains import settings_of
from .models import CLASS_ENTRIES, Body

# EDM's choice for CIFAR-10: 18 steps, 35 calls.
EDM_STEPS = 18


@checked
def save_pretrained(denoiser: Denoiser, folder: str | Path, *, vae: Any = None) -> None:
    """Write a folder that `from_pretrained` and diffusers' own pipeline open.

    The scheduler is a `DDPMScheduler` with the process's betas, or that of Euler's method for a
    `RectifiedFlow` whose networks are asked at a multiple of the level, as diffusers' are. EDM's
    preconditioning has no place in those: such a denoiser is exported with Heun's method in 18
    steps, see `export_pipeline`.

    Args:
        denoiser: one whose body is a `UNet2D` or a `DiT`. Its weights, classes, betas, prediction,
            `clip` and `variance` are saved, what else it may have is not, such as the condition and
            the guidance of a view: a pipeline is told them at each call.
        folder: where to; files of an earlier pipeline are replaced one by one, the index last.
        vae: the `AutoencoderKL` that goes with a `DiT`. Without it, give one to
            `DiTPipeline.from_pretrained(folder, vae=...)`.

    Raises:
        ValueError: another body, a process or a `time_range` that those schedulers cannot say, or a
            `vae` beside a `UNet2D`.
        ImportError: diffusers is not installed.
    """
    body = _network_of(denoiser, "save_pretrained", vae)
    process, parameterisation = denoiser.process, denoiser.parameterisation
    if parameterisation.scales_input:
        table = heun(Schedule.karras(process, EDM_STEPS))
        return export_pipeline(denoiser, folder, table, vae=vae)
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    settings = settings_of(parameterisation, denoiser.clip)
    if settings.get("use_flow_sigmas") and body.time_range is None:
        shift, top = settings["shift"], settings["num_train_timesteps"]
        flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=top, shift=shift)
        return _write(folder, denoiser, body, flow, vae)
    betas, name = process.betas, parameterisation.pipeline_name
    if betas is None or name is None or body.time_range is not None:
        what = f"the process {process!r}" if body.time_range is None else "a time_range"
        raise ValueError(
            f"A DDPMScheduler cannot describe {what} with prediction={denoiser.prediction!r}; "
            "`denoiser.save` keeps such a denoiser."
        )
    # Ours with noise in the last step too, "beta", is diffusers' large one in all the others.
    variance = "fixed_small" if denoiser.variance in (None, "small") else "fixed_large"
    scheduler = DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=name,
        clip_sample=denoiser.clip,
        variance_type=variance,
    )
    return _write(folder, denoiser, body, scheduler, vae)


@checked
def export_pipeline(
    denoiser: Denoiser, folder: str | Path, tableau: Tableau, *, vae: Any = None
) -> None:
    """Write a pipeline that samples with a tableau: a DDPMPipeline, or that of a DiT.

    `pipeline(batch_size, num_inference_steps=tableau.steps)` then draws what `tableau.sample` does
    from the same noise; on EDM's process see `TableauScheduler` for how the noise starts. A script
    imports `fewstep.agents.pretrained.scheduler` before it opens the folder. `from_pretrained`
    reads the denoiser back. diffusers has no pipeline for a conditional `UNet2D`: the loop that
    samples with the network and the scheduler of such a folder is in docs/conditions.md.

    Args:
        denoiser: one whose body is a `UNet2D` or a `DiT`. It is the pipeline's caller who says
            class and guidance.
        folder: as for `save_pretrained`.
        tableau: any table for its process.
        vae: as for `save_pretrained`.

    Raises:
        ValueError: another body, a table of another process, or one that takes variances from a
            second head; prediction other than "edm" on a VE process; a `vae` beside a `UNet2D`.
        ImportError: diffusers is not installed.
    """
    body = _network_of(denoiser, "export_pipeline", vae)
    tableau.check_process(denoiser)
    process = denoiser.process
    if process.prior_std(process.t_max) != 1 and not denoiser.parameterisation.scales_input:
        raise ValueError(
            f"A pipeline starts from unit noise and scales nothing: it runs prediction='edm' on "
            f"{process!r}, not {denoiser.prediction!r}."
        )
    from .scheduler import TableauScheduler  # a class of diffusers', which loads only here

    # By keyword: diffusers forgets positional arguments when it copies a scheduler.
    scheduler = TableauScheduler(
        tableau=json.loads(tableau.to_json()),
        prediction=denoiser.prediction,
        sigma_data=denoiser.sigma_data,
        time_range=body.time_range,
        clip=denoiser.clip,
        variance=denoiser.variance,
    )
    _write(folder, denoiser, body, scheduler, vae)


@checked
def pipeline_tableau(folder: str | Path) -> Tableau | None:
    """Read the table of a folder that `export_pipeline` or a `TableauScheduler` wrote.

    None for any other folder or file.

    Raises:
        ValueError: a corrupt table; the sentence names its file.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        path = Path(folder) / path.name
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict) or config.get("_class_name") != "TableauScheduler":
        return None
    with damage_named(path):
        return Tableau.from_json(json.dumps(config.get("tableau")))


def _network_of(denoiser: Denoiser, action: str, vae: Any) -> Body:
    require_diffusers(action)
    if isinstance(denoiser.parameterisation, Rescaled):
        raise ValueError(
            f"{action} cannot say in a pipeline of diffusers that a denoiser is rescaled: "
            "`denoiser.save` keeps such a denoiser."
        )
    body = denoiser.body
    if not isinstance(body, UNet2D | DiT):
        raise ValueError(
            f"{action} writes a diffusers UNet2DModel or DiTTransformer2DModel, and this "
            f"denoiser's body is a {type(body).__name__}; `denoiser.save` keeps any body, UNet2D "
            "and DiT are those that diffusers opens."
        )
    if vae is not None and isinstance(body, UNet2D):
        raise ValueError("A vae goes with a DiT; the pipeline of a UNet2D has none.")
    return body


def _write(folder: str | Path, denoiser: Denoiser, body: Body, scheduler: Any, vae: Any) -> None:
    """Write a pipeline, each file atomically and model_index.json last."""
    from diffusers import DDPMPipeline, DiTPipeline

    pipeline: Any
    if isinstance(body, UNet2D):
        pipeline = DDPMPipeline(body.unet, scheduler)
    else:
        pipeline = DiTPipeline(body.transformer, vae, scheduler)

    def write(temporary: Path) -> None:
        try:
            pipeline.save_pretrained(temporary, max_shard_size="100GB")
            if isinstance(body, UNet2D) and denoiser.conditioning is not None:
                _note_classes(temporary / "unet" / "config.json", denoiser.conditioning)
        except (OSError, SafetensorError) as error:
            raise unwritable(Path(folder), error) from None

    write_folder(Path(folder), write, last="model_index.json")


def _note_classes(path: Path, terms: Conditioning) -> None:
    """Write into a network's settings what a UNet2DModel does not say of its classes."""
    assert isinstance(terms.conditions, Classes), "Networks of diffusers know classes alone."
    noted = dict(zip(CLASS_ENTRIES, (terms.conditions.count, terms.drops), strict=True))
    path.write_text(json.dumps({**read_json(path), **noted}, indent=2) + "\n")
