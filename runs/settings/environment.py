"""The environment that a command's flags name, with defaults for the process and the solver."""

from __future__ import annotations

from pathlib import Path

from ...agents import Denoiser
from ...agents.solvers import Options
from ...agents.solvers import default_schedule as solver_schedule
from ...common.checkpoint import CheckpointError
from ...common.conditions import Conditional
from ...envs import DiffusionMDP, Schedule, Target
from ...envs.processes import NoiseProcess
from ...envs.registration import ENVIRONMENTS, make_mdp
from ...envs.schedules import listed_times
from .train import resolve_device


def build_environment(
    name: str,
    *,
    steps: int | None,
    schedule: str | None,
    schedule_options: Options | None,
    process: NoiseProcess | None,
    solver: str,
    device: str,
    data_dir: Path | None,
    download: bool = False,
    image_size: int | None = None,
    default_schedule: str | None = None,
    target: Target | None = None,
    inpaint: str | None = None,
    conditional: Conditional = False,
) -> DiffusionMDP:
    """Build the environment's decision process.

    Without a named schedule it gets the solver's default one (`solvers.default_schedule`), on the
    grid `default_schedule`, or else the environment's.

    Raises:
        ValueError: a name or an option that does not exist.
    """
    times: str | Schedule | None = schedule
    if schedule is None and name in ENVIRONMENTS:
        known = ENVIRONMENTS[name]
        grid = default_schedule or known.schedule
        count = known.steps if steps is None else steps
        if count >= 1 and listed_times(grid or "") is None:
            process = process or known.process(count)
            times = solver_schedule(solver, process, count, grid, **(schedule_options or {}))
            schedule_options = None
        else:
            times = grid
    return make_mdp(
        name,
        steps=steps,
        schedule=times,
        schedule_options=schedule_options,
        process=process,
        device=resolve_device(device),
        target=target,
        data_dir=data_dir,
        download=download,
        image_size=image_size,
        inpaint=inpaint,
        conditional=conditional,
    )


def check_fits(denoiser: Denoiser, mdp: DiffusionMDP, origin: Path | str | None) -> None:
    """Raise CheckpointError, which names a denoiser's file, if its samples have another shape."""
    try:
        denoiser.check_shape(mdp.shape, str(origin))
    except ValueError as error:
        message, shape = str(error), denoiser.shape or (0,)
        if mdp.target.name == "ImageFolder" and shape == (3, shape[-1], shape[-1]):
            message = f"{message.removesuffix('.')}; give --image-size {shape[-1]}."
        raise CheckpointError(message) from None
