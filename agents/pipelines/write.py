"""What was learned for a pipeline, as the folder of a scheduler, or of the whole pipeline."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...common.files import unwritable, write_folder
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau
from .body import PipelineBody
from .folder import INDEX


def save_scheduler(tableau: Tableau, denoiser: Denoiser, folder: str | Path) -> None:
    """Write a folder that `TableauScheduler.from_pretrained` opens.

    Args:
        tableau: what runs in the pipeline.
        denoiser: of the pipeline, whose prediction it is told.
        folder: where to; a scheduler that is there is replaced.

    Raises:
        ValueError: a table of another process.
    """
    write_folder(Path(folder), scheduler_of(tableau, denoiser).save_pretrained)


def save_pipeline(denoiser: Denoiser, folder: str | Path, tableau: Tableau | None = None) -> None:
    """Write the pipeline with a denoiser's network, as `open_pipeline` and diffusers open it.

    Args:
        denoiser: of a pipeline, such as an agent's `sampling_denoiser` whose network was trained.
            The condition and the guidance of a view are not saved: a pipeline is told them.
        folder: where to; files of an earlier pipeline are replaced one by one, the index last.
        tableau: what the pipeline samples with; its own scheduler if None.

    Raises:
        ValueError: a denoiser of no pipeline, or a table of another process.
        OSError: a file cannot be written.
    """
    body = denoiser.body
    if not isinstance(body, PipelineBody):
        raise ValueError(
            f"save_pipeline writes the pipeline that a denoiser was opened from, and this one's "
            f"body is a {type(body).__name__}."
        )
    family = body.family
    changed: dict[str, Any] = {family.network_name: family.network}
    if tableau is not None:
        changed["scheduler"] = scheduler_of(tableau, denoiser)
    pipeline = copy.copy(family.pipeline)  # the one that is open stays as it is
    pipeline.register_modules(**changed)

    def write(temporary: Path) -> None:
        try:
            pipeline.save_pretrained(temporary)
        except (OSError, SafetensorError) as error:
            raise unwritable(Path(folder), error) from None

    write_folder(Path(folder), write, last=INDEX)


def scheduler_of(tableau: Tableau, denoiser: Denoiser) -> Any:
    """Return the scheduler that runs a table in the denoiser's pipeline.

    Raises:
        ValueError: a table of another process.
    """
    tableau.check_process(denoiser)
    from ..pretrained.scheduler import TableauScheduler  # a class of diffusers', which loads here

    return TableauScheduler(
        tableau=json.loads(tableau.to_json()),
        prediction=denoiser.prediction,
        sigma_data=denoiser.sigma_data,
        clip=denoiser.clip,
        variance=denoiser.variance,
    )
