"""Sampling whole sets with a tableau and a denoiser, in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoiser
from .solvers import SOLVERS, Options
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


def default_solver_options(solver: str, shape: tuple[int, ...], clip: bool = False) -> Options:
    """Return paper A's: variance beta for vectors, small with a last std of 0.001 for images.

    Args:
        solver: its name.
        shape: of one sample.
        clip: clamp the predicted clean sample where the solver can, as a pretrained pipeline may
            ask (`Denoiser.clip`). Fine-tuning does not: paper A's chain is Gaussian in its mean.
    """
    options: Options = {}
    if solver == "ancestral":
        options = (
            {"variance": "small", "last_std": 0.001} if len(shape) == 3 else {"variance": "beta"}
        )
    elif solver in SOLVERS and SOLVERS[solver].needs is not None and len(shape) != 3:
        # These clamp to an image's [-1, 1] and count in grey levels.
        options = {"clip": False, "late_clip": math.inf}
    if clip and solver in SOLVERS and "clip" in SOLVERS[solver].options:
        options["clip"] = True
    return options
