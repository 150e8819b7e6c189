"""Rollouts without gradients in EDM's units, and how many of them are stored at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from .levels import level_of_time

# Whoever stores states splits the samples into chunks whose states hold at most so many numbers.
STORED_NUMBERS = 2**22


def chunk_size(states: int, noise: Tensor) -> int:
    """Return how many of the samples (N, *shape) go into a chunk that stores so many states."""
    return max(STORED_NUMBERS // (states * noise[0].numel()), 1)


@dataclass(frozen=True)
class Path:
    """A rollout of one network call a step, in EDM's units, x / alpha.

    Attributes:
        levels: (T,) descending float64 noise levels sigma / alpha.
        states: the T states (N, *shape), the noisiest first.
        outputs: the T - 1 denoised samples on the way.
    """

    levels: Tensor
    states: list[Tensor]
    outputs: list[Tensor]


@torch.no_grad()
def path_of(tableau: Tableau, denoiser: Denoiser, noise: Tensor) -> Path:
    """Roll a one-call-a-step tableau out, down to its smallest positive level."""
    times = torch.tensor(tableau.times)
    times = times[times > 0]
    levels = level_of_time(tableau.process, times)
    states, outputs = [noise], []
    for j in range(len(times) - 1):
        outputs.append(tableau.evaluate(denoiser, states[j], j))
        states.append(tableau.advance(j, states, outputs))
    alphas = tableau.process.alpha(times).tolist()
    states = [state / alpha for state, alpha in zip(states, alphas, strict=True)]
    if tableau.output == "epsilon":
        outputs = [
            state - level * output
            for state, output, level in zip(states, outputs, levels.tolist(), strict=False)
        ]
    return Path(levels, states, outputs)
