"""L_diff (Huang 2024, Eq. 12): the denoising errors on data at the schedule's levels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ....denoisers.denoiser import Denoiser
from ..levels import level_of_time, step_weights, time_of_level
from ..programmes import cheapest_levels

TuningWeights = Literal["lambda", "original"]


def denoised_at(denoiser: Denoiser, sample: Tensor, level: Tensor) -> Tensor:
    """Ask any denoiser as EDM's are asked: D(x_0 + level * noise; level) (MATH.md 0.1).

    Args:
        denoiser: the network, on any process.
        sample: (N, *shape) in EDM's units, x / alpha.
        level: () float64 noise level sigma / alpha; gradients flow through it.
    """
    t = time_of_level(denoiser.process, level)
    return denoiser.denoised(denoiser.process.alpha(t).to(sample) * sample, t)


def diffusion_loss(
    denoiser: Denoiser, levels: Tensor, clean: Tensor, generator: torch.Generator
) -> tuple[float, Tensor]:
    """Return L_diff on a batch, and its derivatives by the levels.

    L_diff = sum_j lambda_j mean ||D(x + l_j noise; l_j) - x||^2 (Eq. 12, its first term): both the
    weights and the network's answers depend on the levels. One level's graph is alive at a time.

    Args:
        denoiser: the network; differentiable in its time.
        levels: (T,) descending noise levels.
        clean: (N, *shape) real samples.
        generator: source of the noise, fresh for each level.

    Returns:
        The loss and its derivatives (T,) float64.
    """
    leaf = levels.detach().requires_grad_()
    weights = step_weights(leaf)
    gradient = torch.zeros_like(leaf)
    loss = 0.0
    for j in range(len(levels) - 1):
        noise = torch.empty_like(clean).normal_(generator=generator)
        level = levels[j].detach().requires_grad_()
        with torch.enable_grad():
            noisy = clean + level.to(clean) * noise
            error = squared_error(denoised_at(denoiser, noisy, level), clean)
        (by_level,) = torch.autograd.grad(error, level)
        (by_weight,) = torch.autograd.grad(weights[j], leaf, retain_graph=True)
        gradient += float(error.detach()) * by_weight
        gradient[j] += float(weights[j].detach()) * by_level
        loss += float(weights[j].detach()) * float(error.detach())
    return loss, gradient


def squared_error(samples: Tensor, goal: Tensor) -> Tensor:
    """Return the squared distance of samples (N, *shape), the mean over them."""
    return (samples - goal).square().flatten(1).sum(1).mean()


@torch.no_grad()
def denoising_errors(
    denoiser: Denoiser, times: Tensor, clean: Tensor, generator: torch.Generator
) -> Tensor:
    """Tabulate mmse(t) = E||D(x_t; t) - x||^2 at times (M,); (M,) float64.

    All times see the same noise, so that their comparison is not its.
    """
    noise = torch.empty_like(clean).normal_(generator=generator)
    errors = []
    for t in times.tolist():
        noisy = denoiser.process.add_noise(clean, t, noise)
        errors.append(float(squared_error(denoiser.denoised(noisy, t), clean)))
    return torch.tensor(errors, dtype=torch.float64)


def diffusion_programme(
    denoiser: Denoiser,
    times: Tensor,
    count: int,
    clean: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Find the levels that minimise L_diff exactly (MATH.md 3.6, last paragraph).

    With mmse(l) tabulated once, L_diff = l_{T-1} sum_j (1 / l_{j+1} - 1 / l_j) mmse(l_j) is an
    upper Riemann sum, and its best nodes are a cheapest path.

    Args:
        denoiser: the network.
        times: (M,) descending times > 0 to choose from; the first and the last are kept.
        count: T, how many, at least 3.
        clean: (N, *shape) real samples.
        generator: source of noise.

    Returns:
        (T,) descending levels.
    """
    errors = denoising_errors(denoiser, times, clean, generator).numpy()
    grid = level_of_time(denoiser.process, times)
    inverse = (1 / grid).numpy()
    cost = errors[:, None] * (inverse[None, :] - inverse[:, None])
    return cheapest_levels(grid, cost, count)


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
        weights: "lambda" weighs the error of the denoised sample with lambda_j;
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
