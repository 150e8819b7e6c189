"""Joining the processes that `torchrun` starts, and leaving them.

For example: `torchrun --nproc-per-node 4 --no-python fewstep train --env CIFAR10 ...`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ...common.distributed import Processes
from ..reports.console import console

# While the first process evaluates, the others wait for its next gradient.
PATIENCE = timedelta(hours=2)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, each on a GPU of its own where there are any.

    Without torchrun there is one process. Only the first writes to the screen.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    gpus = torch.cuda.device_count()
    if local_rank() < gpus:
        torch.cuda.set_device(local_rank())
    # Tensors travel by the way of the device they are on, which a flag decides later.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    lost = False
    try:
        processes = Processes.current()
        console.quiet = not processes.first
        yield processes
    except RuntimeError as error:
        lost = is_lost_peer(error)
        if not lost:
            raise
        raise LostPeerError from None
    finally:
        console.quiet = False
        # What is left of a group that lost a process stays: to take it apart may abort this one.
        if not lost:
            dist.destroy_process_group()


class LostPeerError(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""

    def __init__(self) -> None:
        super().__init__(
            "Another process of this run has ended, and what ended it is said where that one "
            "writes. What was saved is good: go on with --resume and the run's folder."
        )


def is_lost_peer(error: RuntimeError) -> bool:
    """Tell whether an error means that another process is gone, and not a fault of this one."""
    libraries = ("gloo", "NCCL", "TCPStore")
    signs = ("closed by peer", "reset by peer", "Broken pipe", "refused", "remote process")
    of_library = isinstance(error, dist.DistError) or any(name in str(error) for name in libraries)
    return of_library and any(sign in str(error) for sign in signs)


def local_rank() -> int:
    """Return this process's number on its machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_own_gpu(device: torch.device) -> None:
    """Raise ValueError if this process cannot have a GPU of its own."""
    if device.type != "cuda" or Processes.current().count == 1:
        return
    if device.index is not None:
        raise ValueError(
            f"Under torchrun each process takes a GPU of its own: give --device cuda, not {device}."
        )
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"This machine has {torch.cuda.device_count()} GPUs: start at most as many processes "
            "with --nproc-per-node, or give --device cpu."
        )


def agreed_path(path: Path | None, processes: Processes) -> Path:
    """Return the path that the first process has; the others pass None."""
    message = [str(path)]
    if processes.count > 1:
        dist.broadcast_object_list(message, src=0)
    return Path(message[0])
