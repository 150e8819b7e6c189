"""Equation 14 of Huang (2024): an estimate of the gradient that never leaves a single network call.

It keeps one of the three ways in which a level changes Euler's finished sample, the network's
answer at that level:

    dL / dl_j  ~  2 lambda_j < x_{T-1} - target, dD(x_j; l_j) / dl_j >                    (14)

The paper leaves open what stands for the residual and what the network sees; MATH.md 3.5 lists
the readings, and how far each is from the exact gradient (`adjoint`). All in EDM's units, x /
alpha, so that variance-preserving denoisers fit in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .....common.names import unknown_name
from ....denoisers.denoiser import Denoiser
from ..levels import step_weights
from ..rollout import Path
from .loss import denoised_at

Residual = Literal["rollout", "one-shot", "convex"]
Input = Literal["rollout", "moving", "noised"]


@dataclass(frozen=True)
class Reading:
    """How Eq. 14 is read.

    Args:
        residual: what stands for x_{T-1} - target: "rollout", the rollout's own; "one-shot", the
            network's error on data at the smallest level (line 6 of the paper's Algorithm 1; nearly
            0); "convex", the weighted errors on data at all levels.
        input: what the network sees at a level: "rollout", the state there, held fixed; "moving",
            the state as it moves along the previous step; "noised", data with fresh noise.
        weight_term: add the change of the weights lambda, which the paper's Theorem 1 needs.

    Raises:
        ValueError: an unknown name.
    """

    residual: Residual = "rollout"
    input: Input = "moving"
    weight_term: bool = False

    def __post_init__(self) -> None:
        if self.residual not in get_args(Residual):
            raise unknown_name("residual", self.residual, get_args(Residual))
        if self.input not in get_args(Input):
            raise unknown_name("input", self.input, get_args(Input))

    @property
    def needs_data(self) -> bool:
        """Whether it compares with real samples, which a teacher's target has no part in."""
        return self.residual != "rollout" or self.input == "noised"


def surrogate_gradient(
    denoiser: Denoiser,
    path: Path,
    target: Tensor,
    reading: Reading,
    clean: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the derivatives of E||x_{T-1} - target||^2 by the levels.

    Args:
        denoiser: the network; differentiable in its time.
        path: an Euler rollout from pure noise, or for a target of data from noised data.
        target: (N, *shape) what the rollout should end at; the clean samples themselves for data.
        reading: how to read Eq. 14.
        clean: (N, *shape) the real samples, for readings that need them.
        generator: source of fresh noise, for the same.

    Returns:
        (T,) float64; 0 for the first and the last level, which stay fixed.
    """
    levels, last = path.levels, len(path.levels) - 1
    weights = step_weights(levels)
    answers: dict[int, Tensor] = {}

    def noised(j: int) -> Tensor:
        assert clean is not None
        return levels[j].to(clean) * torch.empty_like(clean).normal_(generator=generator)

    if reading.residual == "rollout":
        residual = path.states[-1] - target
    elif reading.residual == "one-shot":
        assert clean is not None
        with torch.no_grad():
            residual = denoised_at(denoiser, clean + noised(last), levels[last]) - clean
    else:
        assert clean is not None
        residual = path.states[0] - clean  # level_0 times the first noise
        residual = residual * float(levels[-1] / levels[0])
        with torch.no_grad():
            for j in range(last):
                answers[j] = denoised_at(denoiser, clean + noised(j), levels[j])
                residual = residual + float(weights[j]) * (answers[j] - clean)
    gradient = torch.zeros_like(levels)
    for j in range(1, last):
        level = levels[j].detach().requires_grad_()
        with torch.enable_grad():
            seen = path.states[j]
            if reading.input == "moving":
                slope = (path.states[j - 1] - path.outputs[j - 1]) / float(levels[j - 1])
                seen = seen + (level - levels[j]).to(seen) * slope
            elif reading.input == "noised":
                assert clean is not None
                unit = noised(j) / float(levels[j])
                seen = clean + level.to(clean) * unit
            answer = denoised_at(denoiser, seen, level)
            along = (residual * answer).flatten(1).sum(1).mean()
        gradient[j] = 2 * weights[j] * torch.autograd.grad(along, level)[0]
        if reading.weight_term:
            change = (residual * (path.outputs[j] - path.outputs[j - 1])).flatten(1).sum(1).mean()
            gradient[j] += 2 * levels[-1] / levels[j] ** 2 * float(change)
    return gradient
