"""The pool that a schedule is learned on: starts of rollouts, and what each should end at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....common.portions import portions
from ....envs import DiffusionMDP, Schedule
from ...denoisers.denoiser import Denoiser
from ..distillation.teacher import Teacher

# Batches are joined up to so many numbers of noise. Where samples are small, the operations around
# a network cost more than it does, and they are as many for a thousand samples as for one.
JOINED_NUMBERS = 2**16


class Batch(NamedTuple):
    """Initial states and targets.

    Attributes:
        noise: (N, *shape) where the rollouts start.
        target: (N, *shape) where they should be at the smallest level.
        finished: (N, *shape) what they should end as.
        condition: the conditions (N, ...) of a conditional environment.
    """

    noise: Tensor
    target: Tensor
    finished: Tensor
    condition: Tensor | None = None

    def split(self, size: int) -> Iterator[Batch]:
        """Yield the batch in parts of so many samples."""
        for parts in portions(self, size):
            yield Batch(*parts)


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """Return the samples of batches of one size in fewer batches of one size, in their order."""
    most = max(JOINED_NUMBERS // batches[0].noise.numel(), 1)
    size = max(n for n in range(1, len(batches) + 1) if n <= most and len(batches) % n == 0)
    groups = (batches[i : i + size] for i in range(0, len(batches), size))
    return [_one(group) for group in groups]


def _one(batches: Sequence[Batch]) -> Batch:
    parts: Iterator[Any] = (
        None if each[0] is None else torch.cat(each) for each in zip(*batches, strict=True)
    )
    return Batch(*parts)


@dataclass
class Pool:
    """The batches to learn on, as many held-out ones to choose by, and one to report on, made once.

    They follow from the seed and the network as it was given: a resumed run makes them again.

    Attributes:
        mdp: the decision process.
        like: a schedule with the ends of the rollouts.
        teacher: gives where they should be, at the smallest level and at the end.
        denoiser: the teacher's network.
        batch_size: samples a batch.
        count: batches to learn on.
        seed: seed of noise and data.
    """

    mdp: DiffusionMDP
    like: Schedule
    teacher: Teacher
    denoiser: Denoiser
    batch_size: int
    count: int
    seed: int

    _made: list[Batch] = field(init=False, repr=False, default_factory=list)

    @property
    def batches(self) -> list[Batch]:
        """All of them; made now if they have not been."""
        if not self._made:
            generator = self.fresh_generator()
            self._made = [self._draw(generator) for _ in range(2 * self.count + 1)]
        return self._made

    @property
    def fitted(self) -> list[Batch]:
        """The batches to learn on."""
        return self.batches[: self.count]

    @property
    def held_out(self) -> list[Batch]:
        """The batches that choose: between levels, and between networks."""
        return self.batches[self.count : 2 * self.count]

    @property
    def reported(self) -> list[Batch]:
        """The batch that reported errors are measured on; it takes no part in any choice."""
        return self.batches[2 * self.count :]

    def forget(self) -> None:
        """Drop the batches: the teacher's network has changed."""
        self._made = []

    def fresh_generator(self) -> torch.Generator:
        """Return a generator on the decision process's device, at the seed."""
        return torch.Generator(self.mdp.device).manual_seed(self.seed)

    def _draw(self, generator: torch.Generator) -> Batch:
        """Draw noise, and take it where the fine solver takes it (MATH.md 3.6, the remedy)."""
        condition = self.mdp.episodes(self.batch_size, generator).condition
        noise = self.mdp.initial(self.batch_size, generator)
        states = self.teacher.states(self.denoiser.under(condition), noise)
        return Batch(noise, states[0], states[-1], condition)
