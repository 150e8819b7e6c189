"""The JSON file of a distilled solver: a tableau anyone can run, with its training beside it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....common.checkpoint import CheckpointError
from ....common.reading import read_json
from ...samplers.tableau import Tableau

# What the file holds besides the tableau: in its "training" block, and beside it.
_TRAINING = ("settings", "environment", "num_timesteps", "rounds")
_STATE = ("fits", "errors", "refinement", "returned", "refined_from")


def write_distilled(tableau: Tableau, training: Mapping[str, Any], **state: Any) -> str:
    """Return the JSON of a tableau with its training beside it, and a checksum of both.

    The checksum finds a digit that a disk or a copy has changed. Only an agent that takes its
    training up again asks for it: the tableau may be edited and run.
    """
    tree = json.loads(tableau.to_json(training=training, **state))
    return tableau.to_json(training={**training, "checksum": _checksum(tree)}, **state)


def _checksum(tree: Mapping[str, Any]) -> int:
    """Return the CRC-32 of a tree of JSON, whatever its layout."""
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def read_distilled(path: str | Path, agent: str) -> tuple[Tableau, dict[str, Any]]:
    """Read and validate a file that an agent of this name wrote.

    Returns:
        The tableau, and the whole file as a tree.

    Raises:
        CheckpointError: a missing, corrupt or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No tableau at {path}.")
    try:
        tableau = Tableau.load(path)
        tree = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    training = tree.get("training")
    if not isinstance(training, dict) or training.get("agent") != agent:
        writer = training.get("agent") if isinstance(training, dict) else None
        raise CheckpointError(
            f"{path} is a tableau, but not one that {agent}'s training wrote"
            + (f": it was written by {writer!r}." if writer else ".")
        )
    missing = [field for field in _TRAINING if field not in training]
    missing += [field for field in _STATE if field not in tree]
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(missing)}.")
    # Older files have none.
    if "checksum" in training and training.pop("checksum") != _checksum(tree):
        raise CheckpointError(
            f"{path} is damaged: its checksum does not fit; its tableau may still be run by name."
        )
    return tableau, tree
