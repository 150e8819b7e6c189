"""How much each network output weighs in Euler's finished sample, and the loss that this makes.

Divided by the noise level, Euler's steps telescope (paper B, Eq. 8; MATH.md 3.2). With levels
l_0 > ... > l_{T-1} in sampling order, as everywhere here,

    x_{T-1} = (l_{T-1} / l_0) x_0 + sum_{j < T-1} lambda_j D_j,
    lambda_j = l_{T-1} / l_{j+1} - l_{T-1} / l_j

(in the paper's indices, which count the other way, the sum stops at t = 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from .levels import time_of_level


def step_weights(levels: Tensor) -> Tensor:
    """Return lambda (T - 1,) of T descending levels; they add up to 1 - l_{T-1} / l_0."""
    return levels[-1] * (1 / levels).diff()


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
    """Return paper B's L_diff on a batch, and its derivatives by the levels.

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
