"""GaussianChain: a noisy one-step sampler as a stochastic policy over transitions (MATH.md S.1).

    p_theta(x_s | x_t) = N( p_j x_t + W_jj epsilon_theta(x_t, t_j), s_j^2 I )

One method computes mean and standard deviation for the rollout and for the update, and one function
the log-density, so the importance ratio is 1 before any update.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .tableau import Tableau

Reduction = Literal["sum", "mean"]


def gaussian_log_density(
    sample: Tensor, mean: Tensor, std: Tensor | float, reduction: Reduction = "sum"
) -> Tensor:
    """Return log N(sample; mean, std^2 I), shape (N,), for samples and means (N, *shape).

    Args:
        sample: where the density is evaluated.
        mean: the means.
        std: standard deviation, a number or a tensor that broadcasts against `mean`.
        reduction: over dimensions: "sum" is the log-density itself, "mean" divides it by the number
            of dimensions (what paper A does for images).
    """
    std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    z = (sample - mean) / std
    per_dimension = -0.5 * z.square() - (std.log() + 0.5 * math.log(2 * math.pi))
    flat = per_dimension.flatten(1)
    return flat.sum(1) if reduction == "sum" else flat.mean(1)


class GaussianChain(nn.Module):
    """The stochastic policy that a one-step tableau and a denoiser define.

    Args:
        denoiser: the network theta.
        tableau: a sampler whose steps use only their own state and output, with noise on each step.
        learn_std: make the K standard deviations trainable (their logarithms are the parameter).

    Raises:
        ValueError: a tableau with memory (multistep or anchored), or with a noise-free step, which
            has no density: build it with `ancestral(schedule, last_std=...)`, for example.
    """

    def __init__(self, denoiser: Denoiser, tableau: Tableau, learn_std: bool = False) -> None:
        super().__init__()
        if not tableau.one_step:
            raise ValueError(
                f"'{tableau.name}' uses earlier states or outputs; a Gaussian policy needs a "
                "one-step sampler such as ancestral or ddim."
            )
        if (tableau.noise == 0).any():
            step = int(np.flatnonzero(tableau.noise == 0)[0])
            raise ValueError(
                f"'{tableau.name}' adds no noise in step {step} of {tableau.steps}, so the policy "
                "has no density there; give it one, as in ancestral(..., last_std=0.001)."
            )
        self.denoiser = denoiser
        self.tableau = tableau
        self.steps = tableau.steps
        # As Python numbers too: asking a device for one would wait for it.
        self._times: list[float] = tableau.times[:-1].tolist()
        times = torch.from_numpy(tableau.times[:-1])
        if (times == times.round()).all():
            times = times.long()
        self.register_buffer("times", times, persistent=False)
        self.register_buffer("scale", _float32(tableau.scale), persistent=False)
        self.register_buffer("weight", _float32(np.diag(tableau.weights)), persistent=False)
        self.log_std = nn.Parameter(_float32(np.log(tableau.noise)), requires_grad=learn_std)

    times: Tensor
    scale: Tensor
    weight: Tensor

    def distribution(self, sample: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (N, *shape) and standard deviation (broadcastable) of p(x_s | x_t).

        Args:
            sample: states x_t (N, *shape).
            step: the step j they are at: one number for all, or (N,) int64.
        """
        if isinstance(step, int):
            t: float | Tensor = self._times[step]
        else:
            t = self.times[step]
            step = step.view(-1, *[1] * (sample.ndim - 1))
        output = (
            self.denoiser.epsilon(sample, t)
            if self.tableau.output == "epsilon"
            else self.denoiser.denoised(sample, t)
        )
        mean = torch.addcmul(self.scale[step] * sample, self.weight[step], output)
        return mean, self.log_std[step].exp()

    def log_density(
        self, next_sample: Tensor, sample: Tensor, step: int | Tensor, reduction: Reduction = "sum"
    ) -> Tensor:
        """Return log p_theta(x_s | x_t), shape (N,); see `gaussian_log_density`."""
        mean, std = self.distribution(sample, step)
        return gaussian_log_density(next_sample, mean, std, reduction)

    def rollout(self, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample whole trajectories (K + 1, N, *shape) from prior samples `noise` (N, *shape).

        State 0 is `noise`, state K the finished sample. Gradients flow through the chain unless the
        caller is under `torch.no_grad()`; trajectories are written in place when they need none.
        """
        if torch.is_grad_enabled():
            states = [noise]
            for step in range(self.steps):
                states.append(self.step(states[-1], step, generator))
            return torch.stack(states)
        trajectory = noise.new_empty(self.steps + 1, *noise.shape)
        trajectory[0] = noise
        fresh = torch.empty_like(trajectory[1:]).normal_(generator=generator)
        for step in range(self.steps):
            mean, std = self.distribution(trajectory[step], step)
            torch.addcmul(mean, std, fresh[step], out=trajectory[step + 1])
        return trajectory

    def export(self) -> Tableau:
        """Return the tableau with the standard deviations as they are now."""
        noise = self.log_std.detach().exp().double().cpu().numpy()
        return dataclasses.replace(self.tableau, noise=noise)

    def step(self, sample: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample x_s (N, *shape) given x_t (N, *shape), reparameterised."""
        mean, std = self.distribution(sample, step)
        fresh = torch.empty_like(mean).normal_(generator=generator)
        return torch.addcmul(mean, std, fresh)


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))
