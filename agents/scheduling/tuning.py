"""Stage two: the denoiser tuned where the schedule asks it (paper B, Eq. 12; MATH.md 3.7)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser
from .levels import time_of_level
from .weights import step_weights

TuningWeights = Literal["rollout", "lambda", "original"]


def tuning_loss(
    denoiser: Denoiser,
    levels: Tensor,
    clean: Tensor,
    weights: TuningWeights,
    last_weight: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the denoising loss on one batch, each sample at a level of the schedule.

    Args:
        denoiser: the network to tune.
        levels: (T,) descending noise levels; each sample draws one of them uniformly.
        clean: (N, *shape) real samples.
        weights: "lambda" weighs the error of the denoised sample with lambda_j, as paper B;
            "original" takes the loss that the denoiser was pretrained with.
        last_weight: of the last level, at which Eq. 12 has none although its answer is the sample.
        generator: source of levels and noise.
    """
    drawn = torch.randint(len(levels), (len(clean),), generator=generator, device=clean.device)
    noise = torch.empty_like(clean).normal_(generator=generator)
    t = time_of_level(denoiser.process, levels).to(clean)[drawn]
    noisy = denoiser.process.add_noise(clean, t, noise)
    if weights == "original":
        return (denoiser(noisy, t) - denoiser.training_target(clean, noise, t)).square().mean()
    shares = torch.cat([step_weights(levels), levels.new_tensor([last_weight])]).to(clean)
    errors = (denoiser.denoised(noisy, t) - clean).square().flatten(1).mean(1)
    return (shares[drawn] * errors).mean()
