"""LD3's soft teacher forcing: near each noise, one that the student takes to the teacher's sample.

A student of few steps cannot end where its teacher does from every noise. With x' anywhere within a
ball around the noise x, min over x' of d(S(x'), T(x)) asks less of it (Tong et al. 2025, LD3). x'
takes one gradient step by the same backward pass as the table, is projected onto the ball, and kept
where the loss fell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Ball:
    """The noises that stand for those of the batches.

    Args:
        noises: (N, *shape) of each batch, the centres.
        std: of their coordinates.
        radius: as a share of a noise's expected length.
        rate: of the gradient step, for unit noise and the contributions' derivative times the
            number of coordinates.
    """

    def __init__(self, noises: list[Tensor], std: float, radius: float, rate: float) -> None:
        self._centres, self._std, self._rate = noises, std, rate
        self._radius = radius * std * math.sqrt(noises[0][0].numel())
        self.noises = [noise.clone() for noise in noises]

    def step(self, index: int, by_noise: Tensor) -> Tensor:
        """Return a batch's noises after a step (N, *shape), inside the ball; nothing is kept yet.

        Args:
            index: of the batch.
            by_noise: (N, *shape) the derivative of each contribution by its noise.
        """
        centre = self._centres[index]
        scale = self._rate * self._std**2 * centre[0].numel()
        away = self.noises[index] - scale * by_noise.to(centre) - centre
        column = (-1, *[1] * (centre.ndim - 1))
        length = away.flatten(1).norm(dim=1).view(column)
        return centre + away * (self._radius / length.clamp_min(self._radius))

    def keep(self, index: int, noises: Tensor, better: Tensor) -> None:
        """Take over noises (N, *shape) where they are better (N,)."""
        column = better.to(noises.device).view(-1, *[1] * (noises.ndim - 1))
        self.noises[index] = torch.where(column, noises, self.noises[index])
