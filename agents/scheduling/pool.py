"""The pool that a schedule is learned on: starts of rollouts, and what each should end at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...envs import DiffusionMDP, Schedule
from ..denoiser import Denoiser
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
