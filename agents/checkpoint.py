"""Checkpoints: one safetensors file that holds a tree of tensors and plain values, and no code.

The tree (nested dicts and lists) is split into its tensors, which safetensors stores, and a JSON
skeleton in the file's header. Nothing is unpickled on loading. Files are written atomically.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..critics.reading import CONSTANTS, damage_named, parse_json
from ..envs.files import write_atomically

FORMAT = "fewstep-checkpoint-1"
_TENSOR = "$tensor"


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated, foreign, or made for something else."""


def save_checkpoint(path: str | Path, tree: dict[str, Any]) -> None:
    """Write a tree of tensors, dicts, lists, strings, numbers, booleans and None to `path`."""
    tensors: dict[str, Tensor] = {}
    skeleton = _split(tree, "", tensors)
    metadata = {"format": FORMAT, "tree": json.dumps(skeleton)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read the tree that `save_checkpoint` wrote.

    Raises:
        CheckpointError: no such file, a truncated or corrupt file, one that carries a pickle, or a
            file that fewstep did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a fewstep checkpoint: its format is {metadata.get('format')!r}, "
            f"expected {FORMAT!r}."
        )
    with damage_named(path, CheckpointError):
        tree = _join(parse_json(metadata["tree"], constants=CONSTANTS), tensors)
        if not isinstance(tree, dict):
            raise TypeError("its tree is no dict")
        return tree


def not_finite(module: nn.Module) -> str | None:
    """Return the name of a module's first weight that holds NaN or infinity, if one does."""
    named = module.named_parameters()
    return next((name for name, weight in named if not weight.isfinite().all()), None)


def check_finite(module: nn.Module, path: Path | str) -> None:
    """Raise CheckpointError if the weights that were read from a file are not finite."""
    if (name := not_finite(module)) is not None:
        raise CheckpointError(
            f"{path} is damaged: its weight {name} holds NaN or infinity; use an earlier file."
        )


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Build the error for a file that safetensors could not read: a pickle, or a broken file."""
    # Only now: a safetensors file may begin with the same bytes, the length of its header.
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK" or magic[:1] == b"\x80":
        return carries_pickle(path)
    return CheckpointError(
        f"{path} is truncated or not a safetensors file ({error}); use an earlier one, or in a run "
        "folder delete it: the run then resumes from the stage before."
    )


def carries_pickle(path: Path) -> CheckpointError:
    """Build the error for a file that only unpickling could read."""
    return CheckpointError(
        f"{path} carries a pickle (a torch.save or zip file), which could run code on loading; "
        "fewstep reads only safetensors checkpoints."
    )


def _split(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        # A copy: safetensors refuses tensors that share memory, such as a weight and its alias.
        while name in tensors:  # {"a/b": ..., "a": {"b": ...}}, or the keys 1 and "1"
            name += "'"
        tensors[name] = node.detach().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(node, dict):
        # A list of pairs keeps integer keys (optimizer states have them) and insertion order.
        return {
            "$dict": [[key, _split(value, f"{name}/{key}", tensors)] for key, value in node.items()]
        }
    if isinstance(node, list | tuple):
        return [_split(value, f"{name}/{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(
        f"A checkpoint holds tensors and JSON values; {name} is a {type(node).__name__}."
    )


def _join(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_join(value, tensors) for value in node]
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors[node[_TENSOR]]
        return {key: _join(value, tensors) for key, value in node["$dict"]}
    return node
