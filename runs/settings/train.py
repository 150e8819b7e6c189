"""The settings of a run as dataclasses: `tyro` turns them into flags, `config.json` keeps them.

An agent's own settings are declared beside the agent, and taken from there.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from ...agents import AGENTS
from ...agents.cloning import CloningSettings
from ...agents.presets import preset, preset_settings, recommended_agent
from ...agents.solvers import Options
from ...common.names import unknown_name
from ...common.reading import DAMAGE, INFINITIES, read_json, reason
from ...common.settings import Settings as AnySettings
from ...common.settings import bounded
from ...envs.registration import resolve_environment
from ..run.joining import check_own_gpu
from .conditions import ConditionalFlag
from .flags import parse_flags, read_early
from .foreign import Recorded, is_foreign, needs_flag

# The agent that trains a denoiser from nothing, before the others.
CLONER = "behavior-cloning"
# What a run has of the one that it starts from, unless it says otherwise.
INHERITED = (
    *("env", "image_size", "inpaint", "conditional", "data_dir", "inception_weights"),
    *("guidance", "guidance_interval", "guidance_rescale", "condition"),
)
# What has options of its own.
OPTIONED = ("solver", "schedule", "body")
# Generators take twice as many; runs add a little to theirs.
LAST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class TrainSettings(AnySettings):
    """Train an agent; without a denoiser, clone one from the data first."""

    env: str = "SwissRoll"
    """Environment; `fewstep envs` lists them."""
    agent: str = "sft-pg"
    """Agent; `fewstep agents` lists them. If omitted the one that serves the environment best:
    sft-v for the toys with a curve and ten steps or more, sft for MNIST and Fashion-MNIST, else
    sft-pg."""
    preset: str = "default"
    """Named budget and hyper-parameters: default, or long where there is one."""
    steps: int | None = bounded(None, least=1)
    """Sampling steps K; the environment's default if omitted."""
    schedule: str | None = None
    """Times visited: uniform, quadratic, karras, log_snr, dmn, leading, trailing, linspace, quad,
    uniform_torch, ddim-uniform, fast_dpm, a list such as 1000,400,90,0, or the schedule.json of a
    run of schedule learning; if omitted the environment's default."""
    schedule_options: Options | None = None
    """Options of the schedule, as KEY VALUE pairs."""
    process: str | None = None
    """Noise process of a cloned denoiser: sigmoid-1000, linear-1000, cosine-1000 (any number of
    noisings), linear-1000/10 (the same levels in ten noisings), linear-1000-zero-snr (no signal is
    left after the last noising), ve or ve-0.002-80, flow or flow-3 (a rectified flow, with the
    shift 3), vp or vp-0.1-20 (the SDE of score networks); if omitted the environment's, on the toys
    with as many noisings as steps. A schedule.json brings its own."""
    prediction: str | None = None
    """What a cloned denoiser predicts: epsilon, sample, v, flow, score or edm; if omitted epsilon
    for vectors (v where the last noising leaves no signal), sample for images, edm on a ve process,
    flow on a flow."""
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
    start_from: Path | None = None
    """Earlier run to go on from with another agent: its network and, where the agent takes one, its
    finished table; other agents build their solver on the table's times. Its environment is the
    default; with --steps or --schedule it gives the network alone."""
    pretrained: str | None = None
    """Start from a diffusers DDPM instead: a folder, or a name on the hub such as
    google/ddpm-cifar10-32 (with --download it is fetched if it is not in the local cache)."""
    classes: int | None = bounded(None, least=1)
    """Number of classes of a class-conditional network of diffusers, without "no class"; as many
    as it has class embeddings if omitted."""
    seed: int = bounded(0, least=0, most=LAST_SEED)
    """Seed of initialisation and training."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    threads: int | None = bounded(None, least=1)
    """CPU threads, at least 1; if omitted, PyTorch's default for images and 1 for vectors, whose
    tiny networks gain little from more and lose much on a busy machine."""
    log_dir: Path = Path("logs")
    """Folder under which the run folder is made."""
    data_dir: Path | None = None
    """Folder of environments whose data are files; if omitted $FEWSTEP_CACHE/data, without that
    variable ~/.cache/fewstep/data."""
    download: bool = False
    """Fetch missing data files into that folder."""
    image_size: int | None = bounded(None, least=1)
    """Side in pixels to which ImageFolder's pictures are cropped and resized."""
    inpaint: str | None = None
    """A part of each sample is known, and put back after every step: half, quarter or random; if
    omitted nothing is known."""
    conditional: ConditionalFlag = False
    """Play each episode under a condition of the data's, and clone a conditional denoiser:
    classes if nothing is named, captions, or embeddings."""
    guidance: float | None = bounded(None, least=0)
    """Classifier-free guidance of a conditional denoiser: 1 asks it with the condition alone, more
    costs two network evaluations a call; the denoiser's own, or 1, if omitted."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma / alpha, low and high, between which it is guided; all if omitted."""
    guidance_rescale: float | None = bounded(None, least=0, most=1)
    """Share of a guided answer that is rescaled to the spread of the unguided one, 0 to 1."""
    condition: str | int | None = None
    """Class or text under which a conditional denoiser is asked in an environment that is not; of
    embeddings the .npy file of one."""
    checkpoint_seconds: float = bounded(20.0, least=0)
    """Seconds between two checkpoints; 0 writes one every round."""
    log_interval: int = bounded(10, least=1)
    """Rounds between two log entries."""
    evaluations: int = bounded(20, least=0)
    """How often the live metric is computed during training; 0 leaves it out."""
    evaluation_samples: int = bounded(200_000, least=2)
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

    @property
    def adopts(self) -> bool:
        """Whether it starts from a denoiser that the user names, and clones none."""
        sources = (self.denoiser, self.pretrained, self.start_from)
        return any(source is not None for source in sources)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's settings, resolved: the runner's own, the agent's, and those of behaviour cloning."""

    run: TrainSettings
    agent: Any
    cloning: CloningSettings

    def to_json(self) -> str:
        """Return the settings as JSON that `--config` reads back."""
        run = {**self.run.to_tree(), "resume": None, "config": None}
        tree = {"run": run, "agent": self.agent.to_tree(), "cloning": self.cloning.to_tree()}
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
            if agent not in AGENTS:
                raise unknown_name("agent", agent, AGENTS)
            # What an older version did not know takes its default.
            run = {**parts[0], "env": resolve_environment(str(env))}
            for key in ("denoiser", "start_from", "log_dir", "data_dir", "inception_weights"):
                if run.get(key) == "":
                    raise ValueError(f"{key} is empty")
                if isinstance(run.get(key), str):
                    run[key] = Path(run[key])
            if is_foreign(run.get("body")):
                run["body"] = Recorded(run["body"])
            settings = cls(
                TrainSettings.from_tree(run),
                AGENTS[agent].Settings.from_tree(parts[1]),
                CloningSettings.from_tree(parts[2]),
            )
        except DAMAGE as error:
            raise ValueError(f"{path}: {reason(error)}") from None
        return settings


def parse(argv: Sequence[str], agent: str | None = None) -> Settings:
    """Resolve flags, `--config` and presets into settings.

    Args:
        argv: the flags.
        agent: fixes the agent (`fewstep pretrain` is training with behaviour cloning).

    Raises:
        ValueError: an environment, agent or preset that does not exist.
    """
    base = _base(argv, agent)
    everything = dataclasses.make_dataclass(
        "Flags",
        [
            ("run", Annotated[TrainSettings, tyro.conf.arg(name="")]),
            ("agent", Annotated[AGENTS[base.run.agent].Settings, tyro.conf.arg(name="")]),
            ("pretrain", CloningSettings),
        ],
    )
    flags = parse_flags(
        everything,
        argv,
        default=everything(base.run, base.agent, base.cloning),
        prog=f"fewstep {'pretrain' if agent else 'train'}",
        description=inspect.getdoc(TrainSettings),
    )
    # A full id, fewstep/SwissRoll-v0, names the same environment.
    run = dataclasses.replace(flags.run, env=resolve_environment(flags.run.env))
    _check_stages(run, argv)
    return Settings(_without_inherited_terms(run, argv), flags.agent, flags.pretrain)


def _without_inherited_terms(run: TrainSettings, argv: Sequence[str]) -> TrainSettings:
    """Leave out what an earlier run says of its guidance, where there is none here."""
    if run.guidance != 1:
        return run
    named = {word.partition("=")[0].replace("_", "-") for word in argv}
    terms = {"--guidance-interval": "guidance_interval", "--guidance-rescale": "guidance_rescale"}
    inherited = [name for flag, name in terms.items() if flag not in named]
    return run.replace(**dict.fromkeys(inherited))


def _check_stages(run: TrainSettings, argv: Sequence[str]) -> None:
    """Raise ValueError for a flag of a stage before the agent's that this run does not have."""
    given = [word.partition("=")[0] for word in argv if word.startswith("--pretrain.")]
    if not given:
        return
    if not AGENTS[run.agent].needs_denoiser:
        raise ValueError(
            f"{given[0]} is for the stage before another agent's; of --agent {run.agent} it is "
            f"--{given[0].removeprefix('--pretrain.')}."
        )
    if run.adopts:
        raise ValueError(f"{given[0]} is for a denoiser that is cloned; here one is given.")


def _base(argv: Sequence[str], agent: str | None) -> Settings:
    """Read the flags that decide what the defaults of all the others are."""
    names = ("env", "agent", "preset", "config", "steps", "process", "denoiser", "start-from")
    chosen, _ = read_early(argv, *names, *OPTIONED, "pretrain.solver")
    if agent is not None and chosen.agent not in (None, agent):
        if chosen.agent not in AGENTS:
            raise unknown_name("agent", chosen.agent, AGENTS)
        raise ValueError(
            f"fewstep pretrain clones a denoiser, with --agent {agent}; for --agent "
            f"{chosen.agent} there is fewstep train."
        )
    if chosen.config is not None:
        base = Settings.from_json(Path(chosen.config))
        if is_foreign(base.run.body) and chosen.body is None:
            raise needs_flag(chosen.config, base.run.body)
        wanted = agent or chosen.agent or base.run.agent
        if chosen.preset is not None:
            raise ValueError(
                f"{chosen.config} holds all that --preset chooses: leave out --preset or --config."
            )
        if wanted != base.run.agent:
            raise ValueError(
                f"{chosen.config} holds the settings of agent '{base.run.agent}', not of "
                f"'{wanted}': start that from its own defaults, without --config."
            )
        run = dataclasses.replace(base.run, config=Path(chosen.config))
        return _with_own_options(dataclasses.replace(base, run=run), vars(chosen))
    earlier = None if chosen.start_from is None else _earlier(Path(chosen.start_from))
    env = resolve_environment(chosen.env or (earlier.env if earlier else TrainSettings.env))
    # What is no number is refused where all flags are read.
    steps = int(chosen.steps) if (chosen.steps or "").isdecimal() else None
    base = defaults(
        env,
        agent
        or chosen.agent
        or recommended_agent(
            env, steps, chosen.process or _process_of(chosen.start_from or chosen.denoiser)
        ),
        chosen.preset or TrainSettings.preset,
    )
    if earlier is not None:
        same = {name: getattr(earlier, name) for name in INHERITED}
        base = dataclasses.replace(base, run=dataclasses.replace(base.run, **same))
    return _with_own_options(base, vars(chosen))


def _with_own_options(base: Settings, named: Mapping[str, str | None]) -> Settings:
    """Leave out the options of each solver, schedule or network that a flag names another of.

    A preset's options, and a settings file's, are for the one that they came with.

    Args:
        base: what the other flags change.
        named: what the flags name, None where they say nothing.
    """

    def own(settings: AnySettings, *names: str, group: str = "") -> Any:
        others = [
            name for name in names if named[f"{group}{name}"] not in (None, getattr(settings, name))
        ]
        return settings.replace(**{f"{name}_options": None for name in others})

    return Settings(
        own(base.run, "schedule", "body"),
        own(base.agent, "solver"),
        own(base.cloning, "solver", group="pretrain."),
    )


def _earlier(folder: Path) -> TrainSettings:
    """Return the settings of the run that another goes on from."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"No run at {folder} to start from: give the folder of one, which has a config.json."
        )
    return Settings.from_json(folder / "config.json").run


def _process_of(denoiser: str | None) -> str | None:
    """Return the name of the process that the run of a denoiser was given; None where none was."""
    if denoiser is None:
        return None
    path = Path(denoiser)
    try:
        return Settings.from_json(
            (path if path.is_dir() else path.parent) / "config.json"
        ).run.process
    except (FileNotFoundError, ValueError):
        return None  # whoever opens the denoiser says what is wrong with it


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
        process=budget.process,
        schedule=budget.schedule,
        body=budget.body,
        prediction=budget.prediction,
    )
    return Settings(
        run,
        preset_settings(AGENTS[agent].Settings, budget.agent, {}),
        preset_settings(CloningSettings, budget.cloning, {}),
    )


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
    chosen, others = read_early(argv, "resume", "body")
    if chosen.resume is None or {"-h", "--help"} & set(others):
        return None
    folder = Path(chosen.resume)
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
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what asks "the" GPU means this one
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"No device {name!r} here: {str(error).splitlines()[0]}") from None
    check_own_gpu(device)
    return device
