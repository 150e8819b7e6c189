"""RunFolder: where a run keeps its settings, checkpoints, logs, results and pictures.

logs/SwissRoll__sft-pg__seed0__learning_rate=0.001__20260101-120000/
    config.json              resolved settings; `--config` reads them back
    denoiser.safetensors     the cloned denoiser's training, where every agent starts
    checkpoint.safetensors   the agent's training; `--resume` goes on from it (D-ODE: tableau.json)
    start.json               the table of the earlier run that it started from, if it did
    tableau.json             the sampler that the agent trains: times, weights, noise
    schedule.json            the times that schedule learning found
    progress.csv tensorboard/ results.json samples.png trajectories.png curve.png
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ...agents import AGENTS
from ...agents.base import Agent
from ...agents.denoisers.files import STAGES
from ...common.checkpoint import CheckpointError
from ...common.files import write_atomically
from ...common.reading import CONSTANTS, read_json
from ..settings.train import Settings, defaults

CLONING, CHECKPOINT = "denoiser.safetensors", Agent.checkpoint_name
TABLEAU, SCHEDULE, START = "tableau.json", "schedule.json", "start.json"


class RunFolder:
    """A run's folder. Use `create` or `reopen`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, settings: Settings) -> RunFolder:
        """Make a new folder under `log_dir` and write config.json.

        Raises:
            PermissionError: the folder cannot be written.
        """
        run = settings.run
        parts = [run.env, run.agent]
        if run.preset != "default":
            parts.append(run.preset)
        if run.steps is not None:
            parts.append(f"K{run.steps}")
        parts += [f"seed{run.seed}", *described_changes(settings)]
        parts.append(time.strftime("%Y%m%d-%H%M%S"))
        return cls.at(new_folder(run.log_dir / "__".join(parts)), settings)

    @classmethod
    def at(cls, path: Path, settings: Settings) -> RunFolder:
        """Make this folder if it is not there, with its config.json.

        Raises:
            PermissionError: the folder cannot be written.
        """
        config = path / "config.json"
        if not config.is_file():
            try:
                write_atomically(config, lambda file: file.write_text(settings.to_json()))
            except OSError as error:
                raise unwritable_folder(path, error) from None
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Open a folder to resume.

        Raises:
            FileNotFoundError: no such folder.
            CheckpointError: a folder with no checkpoint.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"No run folder at {path}.")
        folder = cls(path)
        check_output_folder(path, "--resume")
        if not folder.can_resume:
            raise CheckpointError(
                f"{path} holds no checkpoint to resume; start anew: --config {path}/config.json."
                if (path / "config.json").is_file()
                else f"{path} holds no checkpoint to resume and is not a run folder."
            )
        return folder

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        files = [CLONING, *(agent.checkpoint_name for agent in AGENTS.values())]
        return any((self.path / name).is_file() for name in files)

    @property
    def cloning(self) -> Path:
        """Checkpoint of behaviour cloning."""
        return self.path / CLONING

    @property
    def start(self) -> Path:
        """The table that the run started from."""
        return self.path / START

    def checkpoint(self, agent: Agent) -> Path:
        """Checkpoint of an agent."""
        return self.path / agent.checkpoint_name

    def results(self) -> dict[str, Any]:
        """Return results.json as far as it is written.

        Raises:
            ValueError: a damaged file.
        """
        path = self.path / "results.json"
        if not path.is_file():
            return {}
        results = read_record(path)
        if not isinstance(results.get("seconds", 0.0), int | float):
            raise ValueError(
                f"{path} is damaged: its seconds are no number. Delete it, and it is written anew."
            )
        return results

    def update_results(self, **values: Any) -> dict[str, Any]:
        """Merge values into results.json, atomically; return the whole."""
        results = {**self.results(), **values}
        write_json(self.path / "results.json", results)
        return results


def read_record(path: Path, *needed: str) -> dict[str, Any]:
    """Read an object that `write_json` wrote.

    Args:
        path: the file.
        needed: keys that it has to have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or a key is missing.
    """
    try:
        record = read_json(path, constants=CONSTANTS)
        if not isinstance(record, dict):
            raise ValueError(f"{path} is damaged: it holds no record.")
        if missing := [key for key in needed if key not in record]:
            raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}.")
    except ValueError as error:
        raise ValueError(f"{error} Delete it, and it is written anew.") from None
    return record


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))


def check_output(path: Path) -> None:
    """Raise OSError if no file can be written at `path`, before any work is done for it."""
    if path.is_dir():
        raise IsADirectoryError(f"--output {path} is a folder: name a file.")
    _check_writable(path, path.absolute().parent)


def check_output_folder(path: Path, what: str = "--output") -> None:
    """Raise OSError if no file can be written into the folder `path`, likewise."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Cannot write {what} {path}: it is a file.")
    _check_writable(path, path.absolute(), what)


def _check_writable(path: Path, folder: Path, what: str = "--output") -> None:
    """Raise PermissionError if `folder` cannot be written into, or made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        TemporaryFile(dir=there).close()
    except OSError:
        message = f"Cannot write {what} {path}: {there} is no writable folder."
        raise PermissionError(message) from None


def new_folder(path: Path) -> Path:
    """Make a folder that nobody else has, `path` or `path`-2, -3, ..., and return it.

    Two runs that start together get two folders: making one is a single act of the file system.

    Raises:
        PermissionError: it cannot be made.
    """
    candidate, number = path, 1
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            candidate.mkdir()
            return candidate
        except FileExistsError as error:
            if not candidate.exists():  # it is `path.parent`, or one above, that is a file
                raise unwritable_folder(path, error) from None
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise unwritable_folder(path, error) from None


def unwritable_folder(path: Path, error: OSError) -> PermissionError:
    """Build the error for a log folder that cannot be written."""
    return PermissionError(
        f"Cannot write the log folder {path} ({error.strerror or error}); choose another with "
        "--log-dir."
    )


# What is not told apart: where and how a run computes, is watched and is written.
_UNTOLD = {"env", "agent", "preset", "steps", "seed", "config", "resume", "log_dir", "data_dir"} | {
    "device", "threads", "download", "checkpoint_seconds", "log_interval", "evaluations",
    "evaluation_samples", "inception_weights",
}  # fmt: skip
_LONGEST = 100


def described_changes(settings: Settings) -> list[str]:
    """Name the settings that differ from the preset's, for the name of a run's folder.

    So the runs of a sweep tell themselves apart, in a listing and in TensorBoard. What does not fit
    into 100 characters is shortened to a hash.
    """
    run = settings.run
    usual = defaults(run.env, run.agent, run.preset)
    changes = []
    for prefix, mine, theirs in (
        ("", run.to_tree(), usual.run.to_tree()),
        ("", flat(settings.agent.to_tree()), flat(usual.agent.to_tree())),
        ("pretrain.", flat(settings.cloning.to_tree()), flat(usual.cloning.to_tree())),
    ):
        for key, value in mine.items():
            if (prefix or key not in _UNTOLD) and value != theirs.get(key):
                changes.append(f"{prefix}{key}={_short(value)}")
    text = "__".join(changes)
    if len(text) <= _LONGEST:
        return changes
    kept = [change for i, change in enumerate(changes) if len("__".join(changes[: i + 1])) <= 80]
    return [*kept, f"{zlib.crc32(text.encode()):08x}"]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary of settings with the names of flags: `critic.width`."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not key.endswith("options"):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def _short(value: Any) -> str:
    """Write a value so that it can stand in a file's name."""
    if isinstance(value, dict):
        value = ",".join(f"{key}-{part}" for key, part in value.items())
    elif isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, Path):
        value = value.name
    return re.sub(r"[^\w.,+-]+", "-", str(value))


def denoiser_file(path: Path) -> Path:
    """Find the file to load a denoiser from: a file itself, or a run folder's newest stage.

    Raises:
        FileNotFoundError: neither.
    """
    for candidate in (path, *(path / name for name in STAGES)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"No denoiser at {path}: give a .safetensors file or a run folder with "
        f"{os.fspath(CHECKPOINT)} or {CLONING}."
    )


def tableau_file(path: Path) -> Path | None:
    """Find the learned tableau of a run folder, or of a file's folder; None if it has none."""
    candidate = (path if path.is_dir() else path.parent) / TABLEAU
    return candidate if candidate.is_file() else None
