"""Sampling whole sets with a tableau and a denoiser, in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..denoisers.denoiser import Denoiser
from .tableau import Tableau

# Chunks of this many samples, or numbers, stay in the processor's caches and bound the memory.
CHUNK, NUMBERS = 16_384, 2**20


def sample(
    tableau: Tableau,
    denoiser: Denoiser,
    start: int | Tensor,
    *,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    return_trajectory: bool = False,
) -> Tensor:
    """Run a tableau from `start` fresh samples of its prior, or from states (N, *shape), in chunks.

    The prior is that of the table's first time, see `Tableau.prior_sample`.
    """
    if isinstance(start, int):
        device = next(denoiser.parameters()).device
        start = tableau.prior_sample((start, *shape), generator, device=device)
    size = max(1, min(CHUNK, NUMBERS // math.prod(shape)))
    chunks = [
        tableau.sample(denoiser, chunk, generator=generator, return_trajectory=return_trajectory)
        for chunk in start.split(size)
    ]
    return torch.cat(chunks, dim=1 if return_trajectory else 0)


def sampler_of(
    tableau: Tableau, denoiser: Denoiser, shape: tuple[int, ...]
) -> Callable[[int, torch.Generator], Tensor]:
    """Bind a tableau and a denoiser to a sampler `(n, generator) -> (n, *shape)`."""

    @torch.no_grad()
    def draw(n: int, generator: torch.Generator) -> Tensor:
        return sample(tableau, denoiser, n, shape=shape, generator=generator)

    return draw
