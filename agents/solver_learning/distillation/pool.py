"""The noises of a distillation, with the teacher's states: to fit, to choose by, to report on."""

from __future__ import annotations

import math
from functools import cached_property

import torch

from ....envs import DiffusionMDP
from ...denoisers.denoiser import Denoiser
from ..settings import DODESettings
from .fit import Batch
from .teacher import Teacher

# By default a fit sees about this many numbers, in at most so many batches.
_FITTED_NUMBERS, _MOST_BATCHES = 100_000, 10

# As many noises as this share of the fitted ones, and at least so many unless those are fewer, are
# held out to choose the table by; as many more to report its error.
_HELD_OUT_SHARE, _LEAST_HELD_OUT = 4, 25


class Pool:
    """Batches of noise, made when they are first asked for.

    They follow from the seed alone: a resumed run makes the same ones again.

    Args:
        mdp: the source of noise.
        teacher: gives the states that the steps should lead to.
        denoiser: the network.
        settings: how many there are.
        seed: of the noise.
    """

    def __init__(
        self,
        mdp: DiffusionMDP,
        teacher: Teacher,
        denoiser: Denoiser,
        settings: DODESettings,
        seed: int,
    ) -> None:
        self._mdp, self.teacher, self._denoiser, self._seed = mdp, teacher, denoiser, seed
        size = settings.batch_size
        most = -(-_FITTED_NUMBERS // (size * math.prod(mdp.shape)))
        count = self._count = settings.batches or min(most, _MOST_BATCHES)
        share = max(count * size // _HELD_OUT_SHARE, min(count * size, _LEAST_HELD_OUT))
        # A refinement tries many tables: their choice needs as many noises as the fit.
        chosen_by = [size] * count if settings.refine == "end-to-end" else [share]
        self._sizes = [*[size] * count, *chosen_by, share]

    @cached_property
    def batches(self) -> list[Batch]:
        """All batches."""
        generator = torch.Generator(self._mdp.device).manual_seed(self._seed)
        made = []
        for i, size in enumerate(self._sizes):
            condition = self._mdp.episodes(size, generator).condition
            noise = self._mdp.initial(size, generator)
            # On the CPU: they are as many as the student's steps.
            states = self.teacher.states(self._denoiser.under(condition), noise, "cpu")
            # Of noise that is not fitted only the finished samples count.
            kept = states if i < self._count else states[-1:].clone()
            made.append(Batch(noise, kept, condition))
        return made

    @property
    def fitted(self) -> list[Batch]:
        """The batches that are fitted."""
        return self.batches[: self._count]

    @property
    def held_out(self) -> list[Batch]:
        """The batches that choose between tables."""
        return self.batches[self._count : -1]

    @property
    def reported(self) -> list[Batch]:
        """The batch that reported errors are measured on; it takes no part in any choice."""
        return self.batches[-1:]
