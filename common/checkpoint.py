"""Checkpoints: one safetensors file that holds a tree of tensors and plain values, and no code.

The tree (nested dicts and lists) is split into its tensors, which safetensors stores, and a JSON
skeleton in the file's header. Nothing is unpickled on loading. Files are written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .files import write_atomically
from .reading import CONSTANTS, damage_named, parse_json, quoted
from .tensor_files import read_tensors, write_tensors

FORMAT = "fewstep-checkpoint-1"
_TENSOR = "$tensor"
_INSTEAD = "use an earlier one."


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated, foreign, or made for something else."""


class NotFiniteError(ValueError):
    """A tree with NaN or infinity in one of its tensors; `.name` says in which."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} holds NaN or infinity.")
        self.name = name


class ForeignBodyError(CheckpointError):
    """A checkpoint of a network that is not fewstep's: it must be given, with `body=...`."""


def save_checkpoint(path: str | Path, tree: dict[str, Any]) -> None:
    """Write a tree of tensors, dicts, lists, strings, numbers, booleans and None to `path`.

    Raises:
        NotFiniteError: a tensor, or a list of numbers, holds NaN or infinity; an older file stays
            as it is.
        OSError: the file cannot be written; an older file stays as it is.
    """
    if (name := not_finite(tree)) is not None:
        raise NotFiniteError(name)
    tensors: dict[str, Tensor] = {}
    skeleton = _split(tree, "", tensors)
    metadata = {"format": FORMAT, "tree": json.dumps(skeleton)}
    write_atomically(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read the tree that `save_checkpoint` wrote.

    Raises:
        CheckpointError: no such file, a truncated or corrupt file, one that carries a pickle, one
            with NaN or infinity, or a file that fewstep did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at {path}.")
    try:
        tensors, metadata = read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; {_INSTEAD}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a fewstep checkpoint: its format is {metadata.get('format')!r}, "
            f"expected {FORMAT!r}."
        )
    with damage_named(path, CheckpointError):
        tree = _join(parse_json(metadata["tree"], constants=CONSTANTS), tensors)
        if not isinstance(tree, dict):
            raise TypeError("its tree is no dict")
    if (name := not_finite(tree)) is not None:
        raise CheckpointError(f"{path} is damaged: {name} holds NaN or infinity; {_INSTEAD}")
    return tree


def not_finite(tree: Any) -> str | None:
    """Return where in a tree the first tensor, or list of numbers, is with NaN or infinity.

    A single number may be infinite: a measured error, for instance.
    """
    # One wait for each device, not for each tensor. A finite sum proves all terms finite in a
    # fast pass; only an overflow needs the closer look.
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in _numbers(tree, ""):
        by_device.setdefault(tensor.device, []).append((name, tensor))
    for named in by_device.values():
        sums = torch.stack([tensor.detach().sum().float() for _, tensor in named])
        for finite, (name, tensor) in zip(sums.isfinite().tolist(), named, strict=True):
            if not finite and not tensor.isfinite().all():
                return name
    return None


def check_finite(module: nn.Module, path: Path | str) -> None:
    """Raise CheckpointError if the weights that were read from a file are not finite."""
    if (name := not_finite(module.state_dict())) is not None:
        raise CheckpointError(f"{path} is damaged: its weight {name} holds NaN or infinity.")


def counter(tree: dict[str, Any], name: str, origin: str) -> int:
    """Return a count from a file's tree. Raises CheckpointError if it is no whole number >= 0."""
    value = tree.get(name)
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{origin} is damaged: {name} must be a whole number >= 0, and it is {quoted(value)}."
        )
    return value


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Build the error for a file that safetensors could not read: a pickle, or a broken file."""
    # Only now: a safetensors file may begin with the same bytes, the length of its header.
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK" or magic[:1] == b"\x80":
        return carries_pickle(path)
    return CheckpointError(f"{path} is truncated or not a safetensors file ({error}); {_INSTEAD}")


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
        node = node.detach()
        tensors[name] = (node.clone() if node.device.type == "cpu" else node.cpu()).contiguous()
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


def _numbers(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors and the lists of numbers of a tree, under their names."""
    if isinstance(node, Tensor):
        if node.is_floating_point():
            yield name, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(value, f"{name}/{key}" if name else str(key))
    elif isinstance(node, list | tuple):
        yield name, torch.tensor([v for v in node if isinstance(v, float)], dtype=torch.float64)
        for i, value in enumerate(node):
            if isinstance(value, Tensor | Mapping | list | tuple):
                yield from _numbers(value, f"{name}/{i}")


def _join(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_join(value, tensors) for value in node]
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors[node[_TENSOR]]
        return {key: _join(value, tensors) for key, value in node["$dict"]}
    return node
