"""What `evaluate` and `sample` share: a pretrained denoiser, its environment, and a solver."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from ...agents import Denoiser, Tableau
from ...agents.denoisers.files import STAGES
from ...agents.pretrained import pipeline_tableau
from ...agents.samplers.sampling import sampler_of
from ...agents.solvers import Options, default_solver_options, make_solver
from ...common.arguments import at_least
from ...common.shapes import is_image
from ...critics.metrics.evaluation import Sampler
from ...envs import DiffusionMDP, Target
from ...envs.registration import resolve_environment
from ..run.folder import tableau_file
from .conditions import under_terms
from .environment import build_environment, check_fits
from .foreign import check_body, foreign_body, is_foreign
from .sources import find_denoiser
from .train import Settings, TrainSettings, check_seed, resolve_device

DEFAULT_SOLVER = "ancestral"


@dataclasses.dataclass(frozen=True)
class PretrainedSettings:
    """Which denoiser, and how to sample with it."""

    denoiser: Annotated[Path, tyro.conf.Positional]
    """A run folder, a .safetensors file, a diffusers DDPM folder, or a name on the hub such as
    google/ddpm-cifar10-32."""
    body: str | None = None
    """Network of your own that the denoiser holds, package.module:factory, as it was named when it
    was trained."""
    body_options: Options | None = None
    """Options of that network, as KEY VALUE pairs; those of the run folder if omitted."""
    env: str | None = None
    """Environment; that of the run folder if omitted."""
    solver: str | None = None
    """Solver, or the JSON file of a tableau; `fewstep agents` lists the solvers. If omitted, the
    one it was trained with, tableau.json in the run folder or the table of an exported pipeline,
    else ancestral."""
    solver_options: Options | None = None
    """Options of the solver, as KEY VALUE pairs."""
    steps: int | None = None
    """Sampling steps K; the environment's default if omitted."""
    schedule: str | None = None
    """Times visited: uniform, quadratic, karras, log_snr, dmn, leading, trailing, linspace, quad,
    uniform_torch, ddim-uniform, fast_dpm, a list such as 1000,400,90,0, or the schedule.json of a
    run of schedule learning; if omitted the environment's default."""
    schedule_options: Options | None = None
    """Options of the schedule, as KEY VALUE pairs."""
    classes: int | None = None
    """Number of classes of a class-conditional network of diffusers, without "no class"; as many
    as it has class embeddings if omitted."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    data_dir: Path | None = None
    """Folder of environments whose data are files; ~/.cache/fewstep/data if omitted."""
    download: bool = False
    """Fetch missing data files, or a denoiser that is on the hub."""
    image_size: int | None = None
    """Side in pixels to which ImageFolder's pictures are cropped and resized."""
    guidance: float | None = None
    """Classifier-free guidance of a conditional denoiser; its own, or 1, if omitted."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma / alpha, low and high, between which it is guided; all if omitted."""
    guidance_rescale: float | None = None
    """Share of a guided answer that is rescaled to the spread of the unguided one, 0 to 1."""
    condition: str | None = None
    """Class or text that a conditional denoiser is asked for, or the .npy file of an embedding;
    those of the data if omitted."""


def load(
    settings: PretrainedSettings, needs_data: bool = True, needs_conditions: bool = True
) -> tuple[DiffusionMDP, Denoiser, Tableau]:
    """Build the environment, the denoiser and the solver's tableau.

    Args:
        settings: what to load.
        needs_data: False does without the data of images, whose shape the denoiser knows; the
            environment's target then is empty.
        needs_conditions: False does without the data of a conditional denoiser, too.

    Raises:
        FileNotFoundError: no denoiser there.
        ValueError: no environment named, a name that does not exist, or a corrupt checkpoint.
    """
    check_seed(settings.seed)
    counts = {"steps": settings.steps, "classes": settings.classes}
    at_least(1, **{f"--{name}": count for name, count in counts.items()})
    at_least(1, **{"--image-size": settings.image_size})
    device = resolve_device(settings.device)
    run = run_of(settings.denoiser, needed=settings.env is None)
    denoiser = find_denoiser(
        settings.denoiser,
        device,
        settings.download,
        own_network(settings, run),
        run.body if run and is_foreign(run.body) else None,
        settings.classes,
    )
    if run is not None and run.agent == "dode":
        # Its own terms are those of its solver: the file is the network's, as it was cloned.
        denoiser = under_terms(denoiser, run)
    denoiser = under_terms(denoiser, settings)
    tableau = finished_table(settings, denoiser)
    solver = settings.solver or DEFAULT_SOLVER
    shape = denoiser.shape or ()
    inpaint = run.inpaint if run else None
    # Conditions are drawn in the proportions of the data.
    draws = needs_conditions and denoiser.is_open
    without = not needs_data and is_image(shape) and inpaint is None and not draws
    name = settings.env or (run.env if run else None)
    if name is None and without:
        name = "ImageFolder"  # has the defaults of all images
    if name is None:
        raise ValueError(
            f"{settings.denoiser} does not say which environment it is for: give --env."
        )
    mdp = build_environment(
        resolve_environment(name),
        target=Target.without_samples(shape, device) if without else None,
        steps=settings.steps,
        schedule=settings.schedule,
        schedule_options=settings.schedule_options,
        process=denoiser.process,
        solver=solver,
        device=settings.device,
        data_dir=settings.data_dir or (run.data_dir if run else None),
        download=settings.download,
        image_size=settings.image_size or (run.image_size if run else None),
        inpaint=inpaint,
        conditional=denoiser.waits_for if draws else False,
    )
    check_fits(denoiser, mdp, settings.denoiser)
    check_body(denoiser, mdp.shape, settings.body)
    if tableau is not None:
        return mdp, denoiser, tableau
    given = settings.solver_options or {}
    options = default_solver_options(solver, denoiser, mdp.shape, given) | given
    return mdp, denoiser, make_solver(solver, mdp.schedule, denoiser, **options)


def own_network(settings: PretrainedSettings, run: TrainSettings | None) -> nn.Module | None:
    """Build the network that --body names; None without the flag.

    Raises:
        ValueError: the name of one of fewstep's own, or what `foreign_body` refuses.
    """
    if settings.body is None:
        return None
    if not is_foreign(settings.body):
        raise ValueError(
            "--body is for a network of your own, package.module:factory; those of fewstep are "
            f"rebuilt from the file, got {settings.body!r}."
        )
    options = settings.body_options
    return foreign_body(settings.body, run.body_options if run and options is None else options)


def check_samples(samples: Tensor, settings: PretrainedSettings, tableau: Tableau) -> None:
    """Raise ValueError, which names the denoiser and the table, for samples that are not finite."""
    if not samples.isfinite().all():
        table = tableau.name if settings.solver in (None, tableau.name) else settings.solver
        raise ValueError(
            f"{table} with {settings.denoiser} gives samples that hold NaN or infinity: take "
            "another solver, more steps or another denoiser."
        )


def finite_sampler(
    settings: PretrainedSettings, mdp: DiffusionMDP, denoiser: Denoiser, tableau: Tableau
) -> Sampler:
    """Return a sampler that raises ValueError instead of giving NaN or infinity."""
    draw = sampler_of(tableau, denoiser, mdp.shape, mdp)

    def checked(n: int, generator: torch.Generator, **options: Any) -> Tensor:
        try:
            samples = draw(n, generator, **options)
        except (ValueError, RuntimeError) as error:
            # torch refuses a coefficient of 1e308, which float32 has not, with a RuntimeError.
            if isinstance(error, RuntimeError) and "without overflow" not in str(error):
                raise
            raise ValueError(f"{settings.solver or settings.denoiser}: {error}") from None
        check_samples(samples, settings, tableau)
        return samples

    return checked


def finished_table(settings: PretrainedSettings, denoiser: Denoiser) -> Tableau | None:
    """Read the table that --solver names, or that the denoiser was trained or exported with.

    Returns:
        The table, or None where a solver is yet to make one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a corrupt tableau, one for another noise process, or settings that a finished
            table leaves no room for.
    """
    solver = settings.solver
    if solver is not None and not (solver.endswith(".json") or Path(solver).is_file()):
        return None
    file = tableau_file(settings.denoiser) if solver is None else Path(solver)
    path = file or settings.denoiser
    tableau = pipeline_tableau(path) if file is None else Tableau.load(file)
    if tableau is None:
        return None
    for name in ("steps", "schedule", "schedule_options", "solver_options"):
        if getattr(settings, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"{path} is a finished table with its own times: leave out --{flag}, or name a "
                "solver with --solver."
            )
    if tableau.process != denoiser.process:
        raise ValueError(
            f"{path} is made for {tableau.process!r}, the denoiser for {denoiser.process!r}."
        )
    return tableau


def run_of(path: Path, needed: bool = False) -> TrainSettings | None:
    """Return the settings of the run folder at `path` or around it; None if it is no run's.

    Args:
        path: a run folder, or a file in one.
        needed: raise ValueError if the settings of a run folder are damaged, rather than return
            None.
    """
    folder = path if path.is_dir() else path.parent
    try:
        return Settings.from_json(folder / "config.json").run
    except FileNotFoundError:
        return None
    except ValueError:
        # A folder of diffusers has a config.json of its own.
        if needed and any((folder / name).is_file() for name in STAGES):
            raise
        return None
