"""Sampling whole sets with a tableau and a denoiser, in chunks, in the environment they are for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import at_least
from ...common.distributed import ALONE
from ...envs.mdp import DiffusionMDP
from ...envs.schedules import Schedule
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
    mdp: DiffusionMDP | None = None,
    **options: Any,
) -> Tensor:
    """Run a tableau from `start` fresh samples of its prior, or from states (N, *shape), in chunks.

    The prior is that of the table's first time, see `Tableau.prior_sample`.

    Args:
        tableau: the sampler.
        denoiser: the network.
        start: how many samples, or the states to start from.
        shape: of one sample.
        generator: source of randomness; the global one if None.
        return_trajectory: return all states (K + 1, N, *shape).
        mdp: the environment in which the samples begin and move, on the tableau's times; None is
            one that begins with the prior, and whose next state is the action.
        options: what its `episodes` takes, such as `known` of `Inpainting`, or the `condition` of a
            conditional environment, which draws conditions otherwise.

    Raises:
        ValueError: no samples, or states of another shape; an environment with transitions of its
            own, and a tableau that asks the network twice at one time, as Heun's does.
        TypeError: the environment takes no such options.
    """
    _check_start(start, shape)
    n = start if isinstance(start, int) else len(start)
    episodes = None if mdp is None else _episodes(tableau, mdp, n, generator, options)
    if episodes is not None:
        denoiser = denoiser.under(episodes.condition)
    if isinstance(start, int) and episodes is not None and not episodes.is_plain:
        start = episodes.initial(start, generator)
    elif isinstance(start, int):
        device = next(denoiser.parameters()).device
        start = tableau.prior_sample((start, *shape), generator, device=device)
    size = max(1, min(CHUNK, NUMBERS // math.prod(shape)))
    draw = functools.partial(ALONE.noise, generator=generator)
    chunks = []
    for first in range(0, n, size):
        rows = slice(first, first + size)
        transition = None
        if episodes is not None and not episodes.is_plain:
            transition = functools.partial(episodes.at(rows).transition, draw=draw)
        chunks.append(
            tableau.sample(
                denoiser.at(rows),
                start[rows],
                generator=generator,
                return_trajectory=return_trajectory,
                transition=transition,
            )
        )
    return torch.cat(chunks, dim=1 if return_trajectory else 0)


def _check_start(start: int | Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError for no samples, or for states (N, *shape) of another shape."""
    if isinstance(start, int):
        at_least(1, n=start)
    elif not len(start) or (shape and tuple(start.shape[1:]) != tuple(shape)):
        wanted = ", ".join(["N", *map(str, shape)])
        raise ValueError(f"noise must have shape ({wanted}), N > 0, got {tuple(start.shape)}.")


def _episodes(
    tableau: Tableau,
    mdp: DiffusionMDP,
    n: int,
    generator: torch.Generator | None,
    options: dict[str, Any],
) -> DiffusionMDP | None:
    """Begin n episodes on the tableau's times; None where the table alone says what happens.

    In a plain environment it does but for the conditions, so its schedule may be another there.
    """
    for name in options:
        if name not in mdp.episode_options:
            raise TypeError(f"this environment's episodes take no option {name!r}")
    if mdp.is_plain:
        return mdp.episodes(n, generator, **options) if mdp.conditional else None
    if (np.diff(tableau.times) >= 0).any():
        raise ValueError(
            f"'{tableau.name}' asks the network twice at one time; {type(mdp).__name__} moves "
            "samples in its own way and needs a sampler whose every step goes on in time, such as "
            "ddim or ancestral."
        )
    if not np.array_equal(tableau.times, mdp.schedule.times.numpy()):
        mdp = mdp.with_schedule(Schedule(tableau.process, tableau.times.tolist()))
    return mdp.episodes(n, generator, **options)


def sampler_of(
    tableau: Tableau,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    mdp: DiffusionMDP | None = None,
) -> Callable[..., Tensor]:
    """Bind all that sampling needs to a sampler `(n, generator) -> (n, *shape)`; see `sample`.

    It takes the options of the environment's episodes, too.
    """

    @torch.no_grad()
    def draw(n: int, generator: torch.Generator, **options: Any) -> Tensor:
        return sample(tableau, denoiser, n, shape=shape, generator=generator, mdp=mdp, **options)

    return draw


def evaluations_of(tableau: Tableau, denoiser: Denoiser) -> int:
    """Return how many network evaluations a sample costs: a guided answer costs two."""
    if denoiser.conditions is None:
        return tableau.nfe
    asked = (tableau.row(j) for j in range(tableau.steps))
    return sum(denoiser.evaluations(row.time) for row in asked if row.asked)
