"""What was learned for a pipeline, as the folder of a scheduler that the pipeline loads."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...common.files import remove_leftovers, temporary_suffix, write_atomically
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau


def save_scheduler(tableau: Tableau, denoiser: Denoiser, folder: str | Path) -> None:
    """Write a folder that `TableauScheduler.from_pretrained` opens.

    Args:
        tableau: what runs in the pipeline.
        denoiser: of the pipeline, whose prediction it is told.
        folder: where to; a scheduler that is there is replaced.

    Raises:
        ValueError: a table of another process.
    """
    tableau.check_process(denoiser)
    from ..pretrained.scheduler import TableauScheduler  # a class of diffusers', which loads here

    scheduler: Any = TableauScheduler(
        tableau=json.loads(tableau.to_json()),
        prediction=denoiser.prediction,
        sigma_data=denoiser.sigma_data,
        clip=denoiser.clip,
        variance=denoiser.variance,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with TemporaryDirectory(prefix=".", suffix=temporary_suffix(), dir=folder) as temporary:
        scheduler.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            write_atomically(folder / path.name, path.replace)
