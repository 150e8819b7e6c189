"""Trajectories: what a rollout leaves for training, where it lies, in which portions it is read.

Where the samples lie and as what, how many of them a network sees at once, and which are this
process's: all that is settled here, so that an algorithm reads as if it had one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.distributed import ALONE, Processes
from ...envs.mdp import DiffusionMDP
from .settings import Buffer

# Where trajectories are kept (None: beside the networks) and as what.
BUFFERS: dict[str, tuple[str | None, torch.dtype]] = {
    "float32": (None, torch.float32),
    "float16": (None, torch.float16),
    "cpu": ("cpu", torch.float32),
    "cpu-float16": ("cpu", torch.float16),
}


class Piece(NamedTuple):
    """Some transitions, as the policy takes them.

    Attributes:
        sample: the states x_t (n, *shape).
        action: the next samples that the policy asked for (n, *shape).
        step: the steps (n,) int64.
        place: (n,) int64, which of the flattened (K, M) transitions these are.
        condition: those (n, ...) of their episodes, in a conditional environment.
    """

    sample: Tensor
    action: Tensor
    step: Tensor
    place: Tensor
    condition: Tensor | None = None


@dataclass
class Trajectories:
    """The trajectories of M episodes, kept by `DiffusionMDP.rollout`.

    Args:
        steps: K.
        batch_size: the M episodes are batches of so many, one after the other.
        device: where the networks are.
        buffer: where and as what samples are kept, a key of `BUFFERS`.
        micro_batch_size: most samples that a network sees at once; None shows it all.
        processes: those whose episodes these are, each of which keeps its own.

    Attributes:
        episodes: the decision process of these episodes.
        states: (K + 1, M, *shape), the noisiest first, as they are kept.
        actions: (K, M, *shape) what the policy asked for, where that is not the next state; else
            None, and the next states are the actions.
    """

    steps: int
    batch_size: int
    device: torch.device
    buffer: Buffer = "float32"
    micro_batch_size: int | None = None
    processes: Processes = ALONE

    episodes: DiffusionMDP = field(init=False)
    states: Tensor = field(init=False)
    actions: Tensor | None = field(init=False)

    def begin(self, episodes: DiffusionMDP) -> None:
        """Keep the decision process of the episodes."""
        self.episodes = episodes

    def keep(self, step: int, sample: Tensor, action: Tensor | None = None) -> Tensor:
        """Keep state number `step`, and the action before it where the two differ.

        Returns:
            The state as it will be read: the rollout goes on from the rounded sample.
        """
        if step == 0:
            self.states, self.actions = self._room(self.steps + 1, sample), None
        if action is not None and action is not sample and self.actions is None:
            self.actions = self._room(self.steps, sample)
            self.actions[: step - 1] = self.states[1:step]
        if action is not None and self.actions is not None:
            self.actions[step - 1] = action
        self.states[step] = sample
        # Without reading back from another device.
        return sample.to(self.states.dtype).to(sample.dtype)

    def _room(self, rows: int, sample: Tensor) -> Tensor:
        place, dtype = BUFFERS[self.buffer]
        device = self.device if place is None else torch.device(place)
        # Pinned memory is copied from a GPU several times as fast.
        pinned = device.type == "cpu" and self.device.type == "cuda"
        return torch.empty((rows, *sample.shape), dtype=dtype, device=device, pin_memory=pinned)

    def fetch(self, stored: Tensor) -> Tensor:
        """Return samples of the buffer as the networks take them."""
        return stored.to(self.device, torch.float32)

    def batches(self) -> Iterator[tuple[DiffusionMDP, Tensor]]:
        """Yield each batch: its episodes, and their states (K + 1, batch_size, *shape), as kept."""
        for first in range(0, self.states.shape[1], self.batch_size):
            rows = slice(first, first + self.batch_size)
            yield self.episodes.at(rows), self.states[:, rows]

    def at(self, step: int) -> Iterator[tuple[DiffusionMDP, Tensor]]:
        """Yield all episodes and their states number `step`, (m, *shape), a portion at a time."""
        stored = self.states[step]
        size = self.micro_batch_size or len(stored)
        for first in range(0, len(stored), size):
            rows = slice(first, first + size)
            yield self.episodes.at(rows), self.fetch(stored[rows])

    def starts(self, number: int) -> Iterator[tuple[int, DiffusionMDP, Tensor]]:
        """Go through the states before each of the K steps of one of the batches.

        Args:
            number: of the batch; beyond the last it begins again with the first.

        Yields:
            A step, the decision process of some episodes, their states (n, *shape) before that
            step: a portion at a time.
        """
        first = number * self.batch_size % self.states.shape[1]
        end = first + self.batch_size
        size = self.micro_batch_size or self.batch_size
        for begin in range(first, end, size):
            rows = slice(begin, min(begin + size, end))
            episodes = self.episodes.at(rows)
            for step in range(self.steps):
                yield step, episodes, self.fetch(self.states[step, rows])

    def minibatches(self, count: int, size: int, generator: torch.Generator) -> list[Tensor]:
        """Draw `count` minibatches of `size` transitions, none twice; see `Piece.place`.

        Several processes draw from the transitions of all of them, and each keeps its own: it may
        have no share in a tiny minibatch.
        """
        processes, batch = self.processes, self.batch_size
        everyone = processes.count * self.steps * self.states.shape[1]
        order = torch.randperm(everyone, generator=generator, device=self.device)
        size *= processes.count
        chosen = order[: count * size].split(size)
        if processes.count == 1:
            return list(chosen)
        mine = []
        for index in chosen:
            # (step, batch, process, place in the batch), as the rollout shared them out.
            batch_of_all, place = index // batch, index % batch
            kept = batch_of_all % processes.count == processes.rank
            mine.append((batch_of_all // processes.count * batch + place)[kept])
        return mine

    def pieces(self, minibatch: Tensor) -> Iterator[Piece]:
        """Yield the transitions of a minibatch of `minibatches`, a portion at a time."""
        samples = self.states[:-1].flatten(0, 1)
        actions = (self.states[1:] if self.actions is None else self.actions).flatten(0, 1)
        size = self.micro_batch_size or len(minibatch)
        episodes = self.states.shape[1]
        given = self.episodes.condition
        for index in minibatch.split(size) if len(minibatch) else ():
            stored, step = index.to(samples.device), index // episodes
            condition = None if given is None else given[index % episodes]
            yield Piece(
                self.fetch(samples[stored]), self.fetch(actions[stored]), step, index, condition
            )


class Begun:
    """What a rollout keeps if only its episodes are wanted, their conditions for instance."""

    episodes: DiffusionMDP

    def begin(self, episodes: DiffusionMDP) -> None:
        """Keep the decision process of the episodes."""
        self.episodes = episodes

    def keep(self, step: int, sample: Tensor, action: Tensor | None = None) -> Tensor:
        """Keep nothing."""
        return sample
