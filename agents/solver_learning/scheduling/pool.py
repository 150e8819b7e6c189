"""The pool that a schedule is learned on: starts of rollouts, and what each should end at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ....envs import DiffusionMDP, Schedule
from ...denoisers.denoiser import Denoiser
from ..distillation.teacher import Teacher


class Batch(NamedTuple):
    """Initial states and targets.

    Attributes:
        noise: (N, *shape) where the rollouts start.
        target: (N, *shape) where they should be at the smallest level.
        finished: (N, *shape) what they should end as.
        clean: (N, *shape) the real samples behind both; None for a teacher's.
    """

    noise: Tensor
    target: Tensor
    finished: Tensor
    clean: Tensor | None

    def split(self, size: int) -> Iterator[Batch]:
        """Yield the batch in parts of so many samples."""
        for start in range(0, len(self.noise), size):
            part = slice(start, start + size)
            clean = None if self.clean is None else self.clean[part]
            yield Batch(self.noise[part], self.target[part], self.finished[part], clean)


def teacher_batch(
    mdp: DiffusionMDP, teacher: Teacher, denoiser: Denoiser, size: int, generator: torch.Generator
) -> Batch:
    """Draw noise, and take it where a fine solver takes it (MATH.md 3.6, the remedy).

    The teacher's targets begin with the state at the smallest level and end with the sample.
    """
    noise = mdp.initial(size, generator)
    states = teacher.states(denoiser, noise)
    return Batch(noise, states[0], states[-1], None)


def data_batch(
    mdp: DiffusionMDP, schedule: Schedule, size: int, generator: torch.Generator
) -> Batch:
    """Draw real samples, and noise them twice, independently: paper B's target (MATH.md 3.3)."""
    clean = mdp.target.sample(size, generator)
    ends = schedule.times[schedule.times > 0][[0, -1]].tolist()
    noised = [
        mdp.process.add_noise(clean, t, torch.empty_like(clean).normal_(generator=generator))
        for t in ends
    ]
    return Batch(noised[0], noised[1], clean, clean)


@dataclass
class Pool:
    """The batches to learn on, as many held-out ones to choose by, and one to report on, made once.

    They follow from the seed and the network as it was given: a resumed run makes them again.

    Attributes:
        mdp: the decision process.
        like: a schedule with the ends of the rollouts.
        teacher: where rollouts should end; None takes real samples.
        denoiser: the teacher's network.
        batch_size: samples a batch.
        count: batches to learn on.
        seed: seed of noise and data.
    """

    mdp: DiffusionMDP
    like: Schedule
    teacher: Teacher | None
    denoiser: Denoiser
    batch_size: int
    count: int
    seed: int

    _made: list[Batch] = field(init=False, repr=False, default_factory=list)

    @property
    def calls(self) -> int:
        """Network calls on single samples that making it takes."""
        calls = 0 if self.teacher is None else self.teacher.tableau.nfe
        return (2 * self.count + 1) * self.batch_size * calls

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
        if self.teacher is None:
            return data_batch(self.mdp, self.like, self.batch_size, generator)
        return teacher_batch(self.mdp, self.teacher, self.denoiser, self.batch_size, generator)
