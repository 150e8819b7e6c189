"""What a run is made of, built and checked before a folder is made: environment and denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...agents import AGENTS, Denoiser
from ...agents.denoisers.bodies import new_denoiser
from ...agents.finished_table import on_times_of
from ...agents.policy_gradient.noised_critic import NoRepresentationError
from ...agents.presets import SMALL_CRITIC, preset_names
from ...common.distributed import Processes
from ...common.optimisation import seeded
from ...envs import DiffusionMDP
from ...envs.processes import NoiseProcess, make_process
from ..settings.conditions import under_terms
from ..settings.environment import build_environment, check_fits
from ..settings.foreign import check_body, foreign_body, is_foreign
from ..settings.sources import starting_denoiser
from ..settings.train import (
    CLONER,
    Settings,
    TrainSettings,
    defaults,
)
from .starting import starting_table

# Settings of a denoiser that the run clones itself.
CLONED = ("body", "body_options", "prediction")


def check(settings: Settings) -> DiffusionMDP:
    """Build all that the settings name, to refuse bad ones before a folder is made.

    Returns:
        The environment.

    Raises:
        ValueError: settings that do not go together, or are not possible.
    """
    run = settings.run
    denoiser = starting_denoiser(run)
    mdp = build_mdp(settings, denoiser)
    if denoiser is None:
        denoiser = denoiser_of(mdp, run)
    elif not AGENTS[run.agent].needs_denoiser:
        raise ValueError(
            "Behaviour cloning starts from nothing: --denoiser, --pretrained and --start-from are "
            "for the other agents."
        )
    else:
        check_fits(denoiser, mdp, run.denoiser or run.pretrained or run.start_from)
        of_preset = defaults(run.env, run.agent, run.preset).run
        check_body(denoiser, mdp.shape, run.body)
        for flag in ("prediction",) if is_foreign(run.body) else CLONED:
            if getattr(run, flag) != getattr(of_preset, flag):
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} is for a denoiser that is cloned; here one is given.")
        asked = run.process if run.process != of_preset.process else None
        if asked is not None and make_process(asked) != denoiser.process:
            raise ValueError(
                f"--process {asked} is not that of the given denoiser, {denoiser.process!r}; leave "
                "it out."
            )
    if run.conditional and run.condition is not None:
        raise ValueError(
            "--condition names the condition in an environment without any; leave out "
            "--conditional, whose episodes have conditions of their own."
        )
    cloner = not AGENTS[run.agent].needs_denoiser
    terms = (run.guidance, run.guidance_interval, run.guidance_rescale, run.condition)
    if cloner and any(term is not None for term in terms):
        raise ValueError(
            "Behaviour cloning trains under each condition: --guidance, its options and "
            "--condition are for the agents that come after it, and for evaluate and sample."
        )
    if run.inception_weights is not None and not run.inception_weights.is_file():
        raise FileNotFoundError(f"No Inception weights at {run.inception_weights}.")
    if not run.adopts:
        cloned = AGENTS[CLONER](mdp, denoiser, settings.cloning).sampling_denoiser
        # As it will be when it is cloned: dropped labels allow guidance.
        denoiser.conditioning = cloned.conditioning
    denoiser = under_terms(denoiser, run)
    if denoiser.is_open and not run.conditional:
        kind = denoiser.waits_for
        flag = "--conditional" if kind == "classes" else f"--conditional {kind}"
        raise ValueError(
            f"{run.denoiser or run.start_from} is conditional: give {flag} for an environment of "
            f"{kind}, or one condition, --condition {'3' if kind == 'classes' else '...'}."
        )
    try:
        AGENTS[run.agent](mdp, denoiser, settings.agent, **taken_up(run))
    except NoRepresentationError as error:
        if SMALL_CRITIC in preset_names(run.env, run.agent):
            error.args = (f"{error} Or take --preset {SMALL_CRITIC}, whose critic is such a one.",)
        raise
    return mdp


def taken_up(run: TrainSettings, kept: Path | None = None) -> dict[str, Any]:
    """Return the agent's argument for the table that it starts from, if it takes one."""
    table = starting_table(run, kept)
    return {"tableau": table} if table is not None and AGENTS[run.agent].takes_tableau else {}


def build_mdp(
    settings: Settings, denoiser: Denoiser | None = None, kept: Path | None = None
) -> DiffusionMDP:
    """Build the environment that the settings name.

    Args:
        settings: of the run.
        denoiser: the one that the run starts from, if it is loaded already.
        kept: the run's own copy of the table that it starts from.
    """
    run, processes = settings.run, Processes.current()
    denoiser = denoiser or starting_denoiser(run)
    if denoiser is not None:
        process: NoiseProcess | None = denoiser.process
    elif run.process is None or (run.schedule or "").endswith(".json"):
        process = None
    else:
        process = make_process(run.process)
    if run.download and not processes.first:
        processes.wait()  # for the files that the first is fetching
    mdp = build_environment(
        run.env,
        steps=run.steps,
        schedule=run.schedule,
        schedule_options=run.schedule_options,
        process=process,
        solver=settings.agent.solver or "",
        device=run.device,
        data_dir=run.data_dir,
        download=run.download,
        image_size=run.image_size,
        inpaint=run.inpaint,
        conditional=run.conditional,
        default_schedule=AGENTS[run.agent].grid,
    )
    if run.download and processes.first:
        processes.wait()
    table = starting_table(run, kept)
    return mdp if table is None else on_times_of(mdp, table)


def denoiser_of(mdp: DiffusionMDP, run: TrainSettings) -> Denoiser:
    """Build the untrained denoiser that a run's settings name."""
    with seeded(run.seed):
        body = foreign_body(run.body, run.body_options)
    if body is None:
        return new_denoiser(mdp, run.seed, run.prediction, run.body, run.body_options)
    denoiser = new_denoiser(mdp, run.seed, run.prediction, body)
    check_body(denoiser, mdp.shape, run.body)
    return denoiser
