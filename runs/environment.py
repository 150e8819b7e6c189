"""The environment that a command's flags name, with defaults for the process and the solver."""

from __future__ import annotations

from pathlib import Path

from ..agents import Denoiser
from ..agents.checkpoint import CheckpointError
from ..agents.solvers import SOLVERS, Options
from ..envs import VE, DiffusionMDP, Target
from ..envs.process import NoiseProcess
from ..envs.registration import ENVIRONMENTS, make_mdp
from ..envs.schedule import listed_times
from .settings import resolve_device


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
) -> DiffusionMDP:
    """Build the environment's decision process.

    Without a named schedule it gets `default_schedule`, or else the environment's, on a VE process
    Karras's; for a solver that works in log-SNR it ends at `process.t_min` instead of 0.

    Raises:
        ValueError: a name or an option that does not exist.
    """
    to_t_min = solver in SOLVERS and SOLVERS[solver].to_t_min
    if schedule is None and name in ENVIRONMENTS:
        own = "karras" if isinstance(process, VE) else ENVIRONMENTS[name].schedule
        schedule = default_schedule or own
        if to_t_min and listed_times(schedule) is None:
            end = (
                {"end": 1.0 if process is None else process.t_min}
                if schedule == "uniform"
                else {"append_zero": False}
            )
            schedule_options = {**end, **(schedule_options or {})}
    return make_mdp(
        name,
        steps=steps,
        schedule=schedule,
        schedule_options=schedule_options,
        process=process,
        device=resolve_device(device),
        target=target,
        data_dir=data_dir,
        download=download,
        image_size=image_size,
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
