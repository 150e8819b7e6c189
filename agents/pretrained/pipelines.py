"""Denoisers for diffusers: folders that `diffusers.DDPMPipeline.from_pretrained` opens.

`from_pretrained` of `pretrained.diffusers` reads both kinds of folder back.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from ...common.files import remove_leftovers, temporary_suffix, unwritable, write_atomically
from ...common.reading import damage_named, read_json
from ...envs.schedules import Schedule
from ..denoisers.denoiser import Denoiser
from ..denoisers.networks.unet import UNet2D, require_diffusers
from ..denoisers.parameterisations.rescaled import Rescaled
from ..samplers.tableau import Tableau
from ..solvers.heun import heun

# EDM's choice for CIFAR-10: 18 steps, 35 calls.
EDM_STEPS = 18


def save_pretrained(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a folder that `diffusers.DDPMPipeline.from_pretrained` and `from_pretrained` open.

    The scheduler is a `DDPMScheduler` with the process's betas. EDM's preconditioning has no place
    in that: such a denoiser is exported with Heun's method in 18 steps, see `export_pipeline`.

    Args:
        denoiser: one whose body is a `UNet2D`. Its weights, betas, prediction, `clip` and
            `variance` are saved, what else it may have is not.
        folder: where to; files of an earlier pipeline are replaced one by one, the index last.

    Raises:
        ValueError: another body, or a process or a `time_range` that a DDPMScheduler cannot say.
        ImportError: diffusers is not installed.
    """
    body = _unet_of(denoiser, "save_pretrained")
    process, parameterisation = denoiser.process, denoiser.parameterisation
    if parameterisation.scales_input:
        return export_pipeline(denoiser, folder, heun(Schedule.karras(process, EDM_STEPS)))
    betas, name = process.betas, parameterisation.pipeline_name
    if betas is None or name is None or body.time_range is not None:
        what = f"the process {process!r}" if body.time_range is None else "a time_range"
        raise ValueError(
            f"A DDPMScheduler cannot describe {what} with prediction={denoiser.prediction!r}; "
            "`denoiser.save` keeps such a denoiser."
        )
    from diffusers import DDPMScheduler

    # Ours with noise in the last step too, "beta", is diffusers' large one in all the others.
    variance = "fixed_small" if denoiser.variance in (None, "small") else "fixed_large"
    scheduler = DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=name,
        clip_sample=denoiser.clip,
        variance_type=variance,
    )
    return _write(folder, body, scheduler)


def export_pipeline(denoiser: Denoiser, folder: str | Path, tableau: Tableau) -> None:
    """Write a DDPMPipeline that samples with a tableau.

    `pipeline(batch_size, num_inference_steps=tableau.steps)` then draws what `tableau.sample` does
    from the same noise; on EDM's process see `TableauScheduler` for how the noise starts. A script
    imports `fewstep.agents.pretrained.scheduler` before it opens the folder. `from_pretrained`
    reads the denoiser back.

    Args:
        denoiser: one whose body is a `UNet2D`.
        folder: as for `save_pretrained`.
        tableau: any table for its process.

    Raises:
        ValueError: another body, a table of another process, or one that takes variances from a
            second head; prediction other than "edm" on a VE process.
        ImportError: diffusers is not installed.
    """
    body = _unet_of(denoiser, "export_pipeline")
    tableau.check_process(denoiser)
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
    _write(folder, body, scheduler)


def pipeline_tableau(folder: str | Path) -> Tableau | None:
    """Read the table of a folder that `export_pipeline` wrote; None for any other folder or file.

    Raises:
        ValueError: a corrupt table; the sentence names its file.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict) or config.get("_class_name") != "TableauScheduler":
        return None
    with damage_named(path):
        return Tableau.from_json(json.dumps(config.get("tableau")))


def _unet_of(denoiser: Denoiser, action: str) -> UNet2D:
    require_diffusers(action)
    if denoiser.conditions is not None:
        raise ValueError(
            f"{action} writes unconditional pipelines, and this denoiser is conditional: "
            "`denoiser.save` keeps such a denoiser."
        )
    if isinstance(denoiser.parameterisation, Rescaled):
        raise ValueError(
            f"{action} cannot say in a pipeline of diffusers that a denoiser is rescaled: "
            "`denoiser.save` keeps such a denoiser."
        )
    if not isinstance(denoiser.body, UNet2D):
        raise ValueError(
            f"{action} writes a diffusers UNet2DModel, and this denoiser's body is a "
            f"{type(denoiser.body).__name__}; `denoiser.save` keeps any body, UNet2D is one that "
            "diffusers opens."
        )
    return denoiser.body


def _write(folder: str | Path, body: UNet2D, scheduler: Any) -> None:
    """Write a DDPMPipeline, each file atomically and model_index.json last."""
    from diffusers import DDPMPipeline

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with TemporaryDirectory(prefix=".", suffix=temporary_suffix(), dir=folder) as temporary:
        pipeline: Any = DDPMPipeline(body.unet, scheduler)
        try:
            pipeline.save_pretrained(temporary, max_shard_size="100GB")
        except (OSError, SafetensorError) as error:
            raise unwritable(folder, error) from None
        files = [path for path in Path(temporary).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "model_index.json"):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            # diffusers leaves weights that their owner alone may read.
            write_atomically(target, path.replace)
