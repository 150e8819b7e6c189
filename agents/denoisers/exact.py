"""Exact denoisers of Gaussian mixtures: networks without error, to judge solvers by (MATH.md A.5).

For data `sum_k w_k N(mu_k, s^2 I)` the best prediction of the clean sample is known in closed
form, so that all of a sampler's error is the solver's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...common.arguments import at_least, check_seed, checked
from ...envs import NoiseProcess, Target
from .denoiser import Denoiser


class MixtureBody(nn.Module):
    """E[eps | x_t] or E[x_0 | x_t] of a Gaussian mixture, as a network body.

    Args:
        process: the noise process.
        means: (M, d) the components' means.
        std: their common standard deviation s, > 0.
        prediction: "epsilon" or "sample".
        weights: (M,) positive; equal by default.

    Raises:
        TypeError: a value of another type.
        ValueError: misshapen or non-finite means, a deviation or weights that are not positive, or
            another prediction.
    """

    means: Tensor
    log_weights: Tensor

    @checked
    def __init__(
        self,
        process: NoiseProcess,
        means: Tensor,
        std: float,
        prediction: str = "epsilon",
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if means.ndim != 2 or not len(means) or not 0 < std < math.inf:
            raise ValueError("A mixture needs means (M, d) and a positive standard deviation.")
        if not bool(means.isfinite().all()):
            raise ValueError("The means of a mixture hold NaN or infinity.")
        if prediction not in ("epsilon", "sample"):
            raise ValueError(f"A mixture predicts 'epsilon' or 'sample', not {prediction!r}.")
        self.process, self.std, self.prediction = process, std, prediction
        shares = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        if shares.shape != means.shape[:1] or not bool((shares > 0).all()):
            raise ValueError(f"weights must be {len(means)} positive numbers, one for each mean.")
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (shares / shares.sum()).log().to(means))
        # Agents look for a denoiser's device in its parameters.
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the prediction (N, d) for samples (N, d) at network times (N,)."""
        t = time[:1] if time.stride(0) == 0 else time
        t = self.process.time_of_network(t)
        alpha = self.process.alpha(t).to(sample).unsqueeze(-1)
        sigma = self.process.sigma(t).to(sample).unsqueeze(-1)
        means = self.means.to(sample)
        variance = (alpha * self.std).square() + sigma.square()
        # ||x - alpha mu||^2 without a tensor (N, M, d).
        squares = (
            sample.square().sum(1, keepdim=True)
            - 2 * alpha * (sample @ means.T)
            + alpha.square() * means.square().sum(1)
        )
        shares = torch.softmax(self.log_weights.to(sample) - squares / (2 * variance), dim=1)
        mean = shares @ means
        away = sample - alpha * mean
        if self.prediction == "epsilon":
            return away * sigma / variance
        return mean + away * alpha * self.std**2 / variance


@checked
def mixture(
    process: NoiseProcess,
    *,
    prediction: str = "epsilon",
    components: int = 6,
    dimension: int = 16,
    std: float = 0.15,
    seed: int = 0,
) -> tuple[Denoiser, Target]:
    """Return a mixture with random means of unit variance: its exact denoiser and the target.

    Raises:
        TypeError: a value of another type.
        ValueError: as `MixtureBody`, or no components, dimensions or such a seed.
    """
    check_seed(seed)
    at_least(1, components=components, dimension=dimension)
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, dimension, generator=generator, dtype=torch.float64)

    def draw(n: int, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        which = torch.randint(components, (n,), generator=source)
        noise = torch.randn(n, dimension, generator=source)
        return (means[which] + std * noise).float()

    body = MixtureBody(process, means, std, prediction)
    return Denoiser(body, process, prediction), Target.from_sampler(draw, "Mixture", 10_000)
