"""What `evaluate` and `sample` share: a pretrained denoiser, its environment, and a solver."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ..agents import Denoiser, Tableau
from ..agents.sampling import default_solver_options
from ..agents.solvers import make_solver
from ..envs import DiffusionMDP
from ..envs.registration import make_mdp, resolve_environment
from .folder import denoiser_file
from .settings import Settings, resolve_device


@dataclasses.dataclass(frozen=True)
class PretrainedSettings:
    """Which denoiser, and how to sample with it."""

    denoiser: Annotated[Path, tyro.conf.Positional]
    """A run folder or a .safetensors file."""
    env: str | None = None
    """Environment; that of the run folder if omitted."""
    solver: str = "ancestral"
    """Solver; `fewstep agents` lists them."""
    solver_options: dict[str, float | str] | None = None
    """Options of the solver, as KEY VALUE pairs."""
    steps: int | None = None
    """Sampling steps K; the environment's default if omitted."""
    schedule: str | None = None
    """Times visited: uniform, quadratic, karras, log_snr; the environment's default if omitted."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    data_dir: Path | None = None
    """Folder of environments whose data are files."""


def load(settings: PretrainedSettings) -> tuple[DiffusionMDP, Denoiser, Tableau]:
    """Build the environment, the denoiser and the solver's tableau.

    Raises:
        FileNotFoundError: no denoiser there.
        ValueError: no environment named, a name that does not exist, or a corrupt checkpoint.
    """
    file = denoiser_file(settings.denoiser)
    device = resolve_device(settings.device)
    denoiser = Denoiser.load(file, device)
    mdp = make_mdp(
        environment_of(settings.denoiser, settings.env),
        steps=settings.steps,
        schedule=settings.schedule,
        process=denoiser.process,
        device=device,
        data_dir=settings.data_dir,
    )
    options = settings.solver_options
    if options is None:
        options = default_solver_options(settings.solver, mdp.shape)
    return mdp, denoiser, make_solver(settings.solver, mdp.schedule, **options)


def environment_of(path: Path, name: str | None) -> str:
    """Return the named environment, else that of the run folder at `path`."""
    if name is not None:
        return resolve_environment(name)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{path} does not say which environment it is for: give --env.")
    return Settings.from_json(config).run.env
