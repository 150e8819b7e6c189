"""Sampling whole sets with a tableau and a denoiser, in chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoiser
from .solvers import Options
from .tableau import Tableau

# Chunks of this many samples stay in the processor's caches, and bound the memory.
CHUNK = 16_384


def sample(
    tableau: Tableau,
    denoiser: Denoiser,
    start: int | Tensor,
    *,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    return_trajectory: bool = False,
) -> Tensor:
    """Run a tableau on `start` fresh prior samples, or from given states (N, *shape), in chunks."""
    if isinstance(start, int):
        device = next(denoiser.parameters()).device
        start = denoiser.process.prior_sample((start, *shape), generator, device=device)
    chunks = [
        tableau.sample(denoiser, chunk, generator=generator, return_trajectory=return_trajectory)
        for chunk in start.split(CHUNK)
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


def default_solver_options(solver: str, shape: tuple[int, ...]) -> Options:
    """Return paper A's: variance beta for vectors, small with a last std of 0.001 for images."""
    if solver != "ancestral":
        return {}
    return {"variance": "small", "last_std": 0.001} if len(shape) == 3 else {"variance": "beta"}
