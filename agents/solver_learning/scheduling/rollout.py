"""Rollouts without gradients, as they come and in EDM's units."""

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


@torch.no_grad()
def rollout(
    tableau: Tableau, denoiser: Denoiser, noise: Tensor, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the first `steps` steps; return the states z_0 .. z_steps and the outputs O_0 .. ."""
    states, outputs = [noise], []
    for j in range(steps):
        outputs.append(tableau.evaluate(denoiser, states[j], j))
        states.append(tableau.advance(j, states, outputs))
    return states, outputs


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


def path_of(tableau: Tableau, denoiser: Denoiser, noise: Tensor) -> Path:
    """Roll a one-call-a-step tableau out, down to its smallest positive level."""
    times = torch.tensor(tableau.times)
    times = times[times > 0]
    levels = level_of_time(tableau.process, times)
    states, outputs = rollout(tableau, denoiser, noise, len(times) - 1)
    alphas = tableau.process.alpha(times).tolist()
    states = [state / alpha for state, alpha in zip(states, alphas, strict=True)]
    if tableau.output == "epsilon":
        outputs = [
            state - level * output
            for state, output, level in zip(states, outputs, levels.tolist(), strict=False)
        ]
    return Path(levels, states, outputs)
