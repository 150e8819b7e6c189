"""Tensors in a safetensors file, with a checksum in its header.

A bit that flips on a disk or on the way to it mostly leaves a number that looks like any other.
The checksum is a CRC-32: it finds every burst of up to 32 bits, misses other damage once in four
thousand million times, and costs a fifth of the time of writing (sha256 twice that); against
forgery, which a hash in the same file cannot prevent, it is not meant.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CHECKSUM = "checksum"


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write contiguous tensors and strings, and their checksum, to `path`.

    The file gets the access rights that the umask leaves to any new file.

    Raises:
        OSError: the file cannot be written, on a full disk for instance; the message names it.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    metadata = {**metadata, _CHECKSUM: _checksum(tensors, metadata)}
    # safetensors leaves a file that its owner alone may read: it goes by way of a temporary one.
    with path.open("ab"):
        mode = path.stat().st_mode & 0o777
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        failure = OSError(f"Cannot write {path}: {error}.")
        failure.strerror = str(error)  # for who knows the file by another name
        raise failure from None
    path.chmod(mode)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote: tensors on the CPU, and strings.

    A file without a checksum, from before there was one, is accepted.

    Raises:
        SafetensorError: not a safetensors file, or a truncated one.
        OSError: it cannot be read.
        ValueError: the contents have changed since they were written.
    """
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    written = metadata.pop(_CHECKSUM, None)
    if written not in (None, _checksum(tensors, metadata)):
        raise ValueError("its contents do not fit its checksum: they have changed on the disk")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the CRC-32 of strings and tensors: their names, types, shapes and contents."""
    value = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"crc32:{value:08x}"
