"""RunFolder: where a run keeps its settings, checkpoints, logs, results and pictures.

logs/SwissRoll__sft-pg__seed0__20260101-120000/
    config.json              resolved settings; `--config` reads them back
    denoiser.safetensors     the cloned denoiser's training, where every agent starts
    checkpoint.safetensors   the agent's training; `--resume` goes on from it (D-ODE: tableau.json)
    tableau.json             the sampler that the agent trains: times, weights, noise
    schedule.json            the times that schedule learning found
    progress.csv tensorboard/ results.json samples.png trajectories.png curve.png
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ..agents import AGENTS, DODE
from ..agents.base import Agent
from ..agents.checkpoint import CheckpointError
from ..agents.denoiser import STAGES
from ..critics.reading import CONSTANTS, read_json
from ..envs.files import write_atomically
from .settings import Settings

CLONING, CHECKPOINT = "denoiser.safetensors", Agent.checkpoint_name
TABLEAU, SCHEDULE = DODE.checkpoint_name, "schedule.json"


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
        parts += [f"seed{run.seed}", time.strftime("%Y%m%d-%H%M%S")]
        return cls.at(unused(run.log_dir / "__".join(parts)), settings)

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
                raise PermissionError(
                    f"Cannot write the log folder {path} ({error.strerror}); choose another with "
                    "--log-dir."
                ) from None
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
        files = [CLONING, *(agent.checkpoint_name for agent in AGENTS.values())]
        if not any((path / name).is_file() for name in files):
            raise CheckpointError(
                f"{path} holds no checkpoint to resume; start anew: --config {path}/config.json."
                if (path / "config.json").is_file()
                else f"{path} holds no checkpoint to resume and is not a run folder."
            )
        return folder

    @property
    def cloning(self) -> Path:
        """Checkpoint of behaviour cloning."""
        return self.path / CLONING

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
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PermissionError(f"Cannot write --output {path}: {there} is no writable folder.")


def unused(path: Path) -> Path:
    """Return `path`, or `path`-2, -3, ... if something is there already."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


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
