"""The settings of a run as dataclasses: `tyro` turns them into flags, `config.json` keeps them.

An agent's hyper-parameters are declared once, in its constructor: `hyperparameters` derives a
dataclass from the signature and the docstring, so the command line cannot drift from the library.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import shlex
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from ...agents import AGENTS, BehaviorCloning
from ...agents.base import Agent
from ...agents.presets import preset
from ...agents.solvers import Options
from ...common.arguments import check_value
from ...common.checks import at_least, not_negative
from ...common.names import unknown_name
from ...common.reading import DAMAGE, INFINITIES, read_json, reason
from ...envs.registration import resolve_environment
from ..run.joining import check_own_gpu
from .foreign import Recorded, is_foreign, needs_flag

# Generators take twice as many; runs add a little to theirs.
LAST_SEED = 2**63 - 1
# Constructor arguments that the runner supplies itself.
SUPPLIED = {"env", "denoiser", "critic", "seed", "verbose", "tensorboard_log"}


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Train an agent; without a denoiser, clone one from the data first."""

    env: str = "SwissRoll"
    """Environment; `fewstep envs` lists them."""
    agent: str = "sft-pg"
    """Agent; `fewstep agents` lists them."""
    preset: str = "default"
    """Named budget and hyper-parameters: default, or long where there is one."""
    steps: int | None = None
    """Sampling steps K; the environment's default if omitted."""
    schedule: str | None = None
    """Times visited: uniform, quadratic, karras, log_snr, leading, trailing, linspace, quad,
    uniform_torch, ddim-uniform, fast_dpm, a list such as 1000,400,90,0, or the schedule.json of a
    run of schedule learning; if omitted the environment's default."""
    schedule_options: Options | None = None
    """Options of the schedule, as KEY VALUE pairs."""
    process: str | None = None
    """Noise process of a cloned denoiser: sigmoid-1000, linear-1000, cosine-1000 (any number of
    noisings), linear-1000/10 (the same levels in ten noisings), ve or ve-0.002-80; if omitted the
    environment's, on the toys with as many noisings as steps. A schedule.json brings its own."""
    rounds: int = 1
    """Rounds of training of the agent. Some agents have their own number instead: dode a fit and
    --refine-steps, schedule --schedule-rounds and --tuning-rounds, and variance with --kind gamma
    what --samples-per-time takes."""
    prediction: str | None = None
    """What a cloned denoiser predicts: epsilon, sample, v or edm; if omitted epsilon for vectors,
    sample for images, edm on a ve process."""
    body: str | None = None
    """Network of a cloned denoiser: mlp, residual-mlp, small-unet, unet-tiny, unet-cifar10,
    unet-celeba64 (the last three through diffusers), or a network of your own,
    package.module:factory, a function or class that is imported and returns a torch module
    body(x, t); if omitted by the sample's shape. With --denoiser, the network that it holds, if
    that is your own."""
    body_options: Options | None = None
    """Options of that body, as KEY VALUE pairs: width 16 levels 3."""
    denoiser: Path | None = None
    """Pretrained denoiser or run folder to start from, instead of cloning one; it brings its noise
    process."""
    pretrained: str | None = None
    """Start from a diffusers DDPM instead: a folder, or a name on the hub such as
    google/ddpm-cifar10-32 (with --download it is fetched if it is not in the local cache)."""
    seed: int = 0
    """Seed of initialisation and training."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    threads: int | None = None
    """CPU threads, at least 1; if omitted, PyTorch's default for images and 1 for vectors, whose
    tiny networks gain little from more and lose much on a busy machine."""
    log_dir: Path = Path("logs")
    """Folder under which the run folder is made."""
    data_dir: Path | None = None
    """Folder of environments whose data are files; if omitted $FEWSTEP_CACHE/data, without that
    variable ~/.cache/fewstep/data."""
    download: bool = False
    """Fetch missing data files into that folder."""
    image_size: int | None = None
    """Side in pixels to which ImageFolder's pictures are cropped and resized."""
    checkpoint_seconds: float = 20.0
    """Seconds between two checkpoints; 0 writes one every round."""
    log_interval: int = 10
    """Rounds between two log entries."""
    evaluations: int = 20
    """How often the live metric is computed during training; 0 leaves it out."""
    evaluation_samples: int = 200_000
    """Most samples of each metric, at least 2; of images never more than 10,000, and for the live
    metric never more than 10,000 vectors or 2,000 images."""
    inception_weights: Path | None = None
    """torch-fidelity's file of Inception weights, for FID on images of 32 pixels or more; if
    omitted where torch-fidelity keeps it, else a feature extractor of ours, which results name."""
    resume: Path | None = None
    """Go on with the run in this folder; no other flag goes with it, as its own settings hold, but
    --body where the network is your own."""
    config: Path | None = None
    """Take the settings of this config.json; flags beside it win."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's settings, resolved: the runner's own, the agent's, and those of behaviour cloning."""

    run: TrainSettings
    agent: dict[str, Any]
    cloning: dict[str, Any]

    def to_json(self) -> str:
        """Return the settings as JSON that `--config` reads back."""
        run = dataclasses.asdict(self.run)
        run["resume"] = run["config"] = None
        tree = {"run": run, "agent": self.agent, "cloning": self.cloning}
        return json.dumps(tree, indent=1, default=str)

    @classmethod
    def from_json(cls, path: Path) -> Settings:
        """Read a config.json. Raises FileNotFoundError or ValueError with the reason."""
        if not path.is_file():
            raise FileNotFoundError(f"No settings file at {path}.")
        tree = read_json(path, constants=INFINITIES)
        try:
            parts = [tree[part] for part in ("run", "agent", "cloning")]
            if not all(isinstance(part, dict) for part in parts):
                raise TypeError("run, agent and cloning must be objects")
            env, agent = parts[0]["env"], parts[0]["agent"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a fewstep config.json ({error!r}).") from None
        try:
            resolve_environment(str(env))
            if agent not in AGENTS:
                raise unknown_name("agent", agent, AGENTS)
            kinds: tuple[type[Any], ...] = (
                TrainSettings,
                hyperparameters(AGENTS[agent]),
                hyperparameters(BehaviorCloning, ROUNDS),
            )
            for part in ("run", "cloning"):
                if "rounds" not in tree[part]:
                    raise ValueError(f"{part} lacks rounds, which have no default")
            # What an older version did not know takes its default.
            run, of_agent, cloning = (
                _typed(part, kind) for part, kind in zip(parts, kinds, strict=True)
            )
            for key in ("denoiser", "log_dir", "data_dir", "inception_weights"):
                if run.get(key) is not None:
                    if run[key] == "":
                        raise ValueError(f"{key} is empty")
                    run[key] = Path(run[key])
            if is_foreign(run.get("body")):
                run["body"] = Recorded(run["body"])
            settings = cls(TrainSettings(**run), of_agent, cloning)
            check_numbers(settings)
        except DAMAGE as error:
            raise ValueError(f"{path}: {reason(error)}") from None
        return settings


# What the command line asks of behaviour cloning beside its constructor's arguments.
ROUNDS = (("rounds", int, dataclasses.field(default=1)),)


def _typed(values: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return settings from a file, checked against the fields of a dataclass; lists as tuples.

    Fields that it lacks have their defaults.

    Raises:
        TypeError: a value of another type than the field's.
        ValueError: a field that there is not.
    """
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise unknown_name("setting", name, hints)
    given = {name: check_value(name, value, hints[name]) for name, value in values.items()}
    return {**dataclasses.asdict(kind()), **given}


def hyperparameters(agent: type[Agent], extra: Sequence[tuple[str, Any, Any]] = ()) -> type[Any]:
    """Derive a dataclass of an agent's hyper-parameters from its constructor, help included."""
    hints = typing.get_type_hints(agent.__init__)
    fields: list[tuple[str, Any, Any]] = list(extra)
    for name, parameter in inspect.signature(agent).parameters.items():
        if name not in SUPPLIED:
            fields.append((name, hints[name], dataclasses.field(default=parameter.default)))
    made = dataclasses.make_dataclass(f"{agent.__name__}Settings", fields, frozen=True)
    made.__doc__ = inspect.getdoc(agent)
    return made


def parse(argv: Sequence[str], agent: str | None = None) -> Settings:
    """Resolve flags, `--config` and presets into settings.

    Args:
        argv: the flags.
        agent: fixes the agent (`fewstep pretrain` is training with behaviour cloning).

    Raises:
        ValueError: an environment, agent or preset that does not exist.
    """
    base = _base(argv, agent)
    kind = AGENTS[base.run.agent]
    run_type = TrainSettings
    agent_type = hyperparameters(kind)
    cloning_type = hyperparameters(BehaviorCloning, ROUNDS)
    everything = dataclasses.make_dataclass(
        "Flags",
        [
            ("run", Annotated[run_type, tyro.conf.arg(name="")]),
            ("agent", Annotated[agent_type, tyro.conf.arg(name="")]),
            ("pretrain", cloning_type),
        ],
    )
    flags = tyro.cli(
        everything,
        args=list(argv),
        default=everything(base.run, agent_type(**base.agent), cloning_type(**base.cloning)),
        prog=f"fewstep {'pretrain' if agent else 'train'}",
        description=inspect.getdoc(TrainSettings),
    )
    # A full id, fewstep/SwissRoll-v0, names the same environment.
    run = dataclasses.replace(flags.run, env=resolve_environment(flags.run.env))
    return Settings(run, dataclasses.asdict(flags.agent), dataclasses.asdict(flags.pretrain))


def _base(argv: Sequence[str], agent: str | None) -> Settings:
    """Read the flags that decide what the defaults of all the others are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--env", "--agent", "--preset", "--config", "--solver", "--body"):
        first.add_argument(name)
    chosen, _ = first.parse_known_args(list(argv))
    if chosen.config is not None:
        base = Settings.from_json(Path(chosen.config))
        if is_foreign(base.run.body) and chosen.body is None:
            raise needs_flag(chosen.config, base.run.body)
        wanted = agent or chosen.agent or base.run.agent
        if wanted != base.run.agent:
            raise ValueError(
                f"{chosen.config} holds the settings of agent '{base.run.agent}', not of "
                f"'{wanted}': start that from its own defaults, without --config."
            )
        return dataclasses.replace(
            base, run=dataclasses.replace(base.run, config=Path(chosen.config))
        )
    base = defaults(
        chosen.env or TrainSettings.env,
        agent or chosen.agent or TrainSettings.agent,
        chosen.preset or TrainSettings.preset,
    )
    if chosen.solver not in (None, base.agent["solver"]):
        # The preset's options are for its own solver.
        base = dataclasses.replace(base, agent={**base.agent, "solver_options": None})
    return base


def defaults(env: str, agent: str, preset_name: str = "default") -> Settings:
    """Return the settings of a preset, everything resolved.

    Raises:
        ValueError: an environment, agent or preset that does not exist.
    """
    env = resolve_environment(env)
    if agent not in AGENTS:
        raise unknown_name("agent", agent, AGENTS)
    budget = preset(env, agent, preset_name)
    run = TrainSettings(
        env=env,
        agent=agent,
        preset=preset_name,
        rounds=budget.rounds,
        process=budget.process,
        schedule=budget.schedule,
        body=budget.body,
        prediction=budget.prediction,
    )
    return Settings(
        run,
        {**dataclasses.asdict(hyperparameters(AGENTS[agent])()), **budget.agent},
        {**dataclasses.asdict(hyperparameters(BehaviorCloning)()), **budget.cloning},
    )


def default_rounds(run: TrainSettings) -> int:
    """Return the rounds of a run without the flag: those of its `--config`, or of its preset."""
    if run.config is not None:
        return Settings.from_json(run.config).run.rounds
    return defaults(run.env, run.agent, run.preset).run.rounds


def check_numbers(settings: Settings) -> None:
    """Raise ValueError for a number that the runner can do nothing with."""
    run = settings.run
    at_least(
        1,
        **{
            "--threads": run.threads,
            "--rounds": run.rounds,
            "--pretrain.rounds": settings.cloning.get("rounds"),
            "--log-interval": run.log_interval,
            "--steps": run.steps,
        },
    )
    at_least(2, **{"--evaluation-samples": run.evaluation_samples})
    not_negative(
        **{"--evaluations": run.evaluations, "--checkpoint-seconds": run.checkpoint_seconds}
    )
    check_seed(run.seed)


def check_seed(seed: int, flag: str = "--seed") -> None:
    """Raise ValueError for a seed that no generator takes."""
    if not 0 <= seed <= LAST_SEED:
        raise ValueError(f"{flag} must lie between 0 and {LAST_SEED}, got {seed}.")


def resumed_folder(argv: Sequence[str]) -> tuple[Path, str | None] | None:
    """Return the folder of `--resume`, if given, and not beside a question for help.

    With it comes what --body names, the only flag that goes with --resume.

    Raises:
        ValueError: other flags beside it, which would have no say in a resumed run.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=Path(sys.argv[0]).name)
    first.add_argument("--resume", type=Path)
    first.add_argument("--body")
    chosen, others = first.parse_known_args(list(argv))
    folder: Path | None = chosen.resume
    if folder is None or {"-h", "--help"} & set(others):
        return None
    if others:
        config = shlex.quote(str(folder / "config.json"))
        raise ValueError(
            f"--resume goes on with the run's own settings, without {shlex.join(others)}; to start "
            f"anew with other settings give --config {config} in place of --resume."
        )
    return folder, chosen.body


def resumed_settings(folder: Path, body: str | None) -> Settings:
    """Read the settings of a run that goes on.

    Args:
        folder: of the run.
        body: what --body names; needed where the run's network is the user's own.

    Raises:
        ValueError: it is missing there, or given where the network is fewstep's.
    """
    settings = Settings.from_json(folder / "config.json")
    if is_foreign(settings.run.body) and not is_foreign(body):
        raise needs_flag(folder, settings.run.body)
    if body is not None and not is_foreign(settings.run.body):
        raise ValueError(f"The network of {folder} is fewstep's own: leave out --body.")
    if body is None:
        return settings
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, body=body))


def resolve_device(name: str) -> torch.device:
    """Turn a --device flag into a device. Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("Device 'meta' computes nothing: give cpu, cuda or auto.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"No device {name!r} here: {str(error).splitlines()[0]}") from None
    check_own_gpu(device)
    return device
