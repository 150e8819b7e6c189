"""Where a fine solver takes noise: the states that a network is trained towards and judged by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.distributed import Processes
from ...envs import DiffusionMDP
from ..denoisers.denoiser import Denoiser
from ..solver_learning.distillation.teacher import Teacher


class Trajectories(NamedTuple):
    """A fine solver's states from some noises.

    Attributes:
        states: (J + 1, N, *shape): the noise, and the states at the J times that were wanted.
        condition: the conditions (N, ...) of a conditional environment.
    """

    states: Tensor
    condition: Tensor | None


def pieces(n: int, size: int | None) -> Iterator[slice]:
    """Yield the rows of n samples in pieces of at most `size`; None takes them whole."""
    size = size or n
    for first in range(0, n, size):
        yield slice(first, min(first + size, n))


def draw_trajectories(
    mdp: DiffusionMDP,
    teacher: Teacher,
    denoiser: Denoiser,
    n: int,
    generator: torch.Generator,
    processes: Processes,
    micro_batch_size: int | None = None,
) -> Trajectories:
    """Draw noise for all processes, and take this one's share of it where the teacher takes it.

    Args:
        mdp: the source of noise and conditions.
        teacher: the fine solver, and which of its states are wanted.
        denoiser: its network.
        n: trajectories of each process.
        generator: source of randomness, the same on all processes.
        processes: those that train together.
        micro_batch_size: most samples that the network sees at once.
    """
    everyone = n * processes.count
    condition = mdp.episodes(everyone, generator).condition
    noise = processes.share(mdp.initial(everyone, generator))
    condition = None if condition is None else processes.share(condition)
    under = denoiser.under(condition)
    parts = [
        torch.cat([noise[None, rows], teacher.states(under.at(rows), noise[rows])])
        for rows in pieces(len(noise), micro_batch_size)
    ]
    return Trajectories(torch.cat(parts, dim=1), condition)


class HeldOut:
    """Trajectories to choose by, and as many to report on, made once and kept.

    Attributes:
        chosen: those that the network is chosen by; None before they are made.
        reported: those that only report; likewise.
    """

    def __init__(self) -> None:
        self.chosen: Trajectories | None = None
        self.reported: Trajectories | None = None

    def state(self) -> dict[str, Any] | None:
        """Return the trajectories: a resumed training need not make them again."""
        if self.chosen is None or self.reported is None:
            return None
        return {"chosen": self.chosen._asdict(), "reported": self.reported._asdict()}

    def load_state(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Restore what `state` returned."""
        self.chosen = self.reported = None
        if state is not None:
            self.chosen = _restored(state["chosen"], device)
            self.reported = _restored(state["reported"], device)


def _restored(found: dict[str, Any], device: torch.device) -> Trajectories:
    condition = found["condition"]
    return Trajectories(
        found["states"].to(device), None if condition is None else condition.to(device)
    )
