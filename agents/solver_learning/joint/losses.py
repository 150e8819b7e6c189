"""What solver learning minimises: a number for each finished sample (MATH.md 5.3).

A loss is the mean of contributions e_i of the finished samples, so that the same numbers are
descended, and compared on held-out noise. Those of a teacher's distance need the sample alone;
those of a distance of distributions, the kernel MMD without bias,

    e_i = mean_{j != i} k(x_i, x_j) - 2 mean_m k(x_i, y_m) + mean_{m != n} k(y_m, y_n),

need all samples at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....critics.mmd import distances
from ....envs import Target
from .features import SampleFeatures
from .settings import OF_DATA, LossSettings


class EndLoss:
    """The contributions of finished samples.

    Args:
        settings: which.
        features: what compares them; None compares the samples themselves.
        real: real samples (M, *shape), where the distance is one of distributions.

    Attributes:
        coupled: whether a sample's contribution depends on the other samples.
    """

    def __init__(
        self, settings: LossSettings, features: SampleFeatures | None, real: Tensor | None
    ) -> None:
        self._settings, self._features = settings, features
        self.coupled = real is not None
        self._real: Tensor | None = None
        self._real_pairs = torch.zeros(())
        if real is not None:
            with torch.no_grad():
                self._real = self._seen(real)
                self._real_pairs = _pairs(self._kernel(self._real, self._real)).mean()

    def contributions(self, ends: Tensor, goal: Tensor) -> Tensor:
        """Return e (N,), differentiable in the ends.

        Args:
            ends: finished samples (N, *shape).
            goal: the teacher's from the same noise (N, *shape); distances of distributions do not
                look at it.
        """
        if self._real is None:
            square = (self._seen(ends) - self._seen(goal)).square().mean(1)
            if self._settings.distance == "l2":
                return square
            width = self._settings.huber_width
            return (square + width**2).sqrt() - width
        seen = self._seen(ends)
        if len(seen) < 2:
            raise ValueError("A distance of distributions needs at least two samples.")
        own = _pairs(self._kernel(seen, seen)).mean(1)
        return own - 2 * self._kernel(seen, self._real).mean(1) + self._real_pairs

    def _seen(self, samples: Tensor) -> Tensor:
        return samples.flatten(1) if self._features is None else self._features(samples)

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        if self._settings.distance == "mmd":
            # The distance of a point to itself has no derivative.
            return -distances(x, y)
        return (x @ y.to(x).T / x.shape[1] + 1) ** 3


def end_loss(
    settings: LossSettings, features: SampleFeatures | None, target: Target, seed: int, draw: int
) -> EndLoss:
    """Return the loss that settings name.

    Args:
        settings: of the loss.
        features: what compares samples, where it is not they themselves.
        target: gives the real samples, where the distance is one of distributions.
        seed: of these samples.
        draw: which of the sets of real samples that follow from the seed, 0, 1, ...

    Raises:
        ValueError: features are to be compared, and there are none.
    """
    if settings.compared == "features" and features is None:
        raise ValueError(
            "loss.compared='features' needs features=, an extractor such as `ClassifierFeatures`."
        )
    real = None
    if settings.distance in OF_DATA:
        generator = torch.Generator(target.device).manual_seed(seed)
        for _ in range(draw + 1):
            real = target.sample(settings.real_samples, generator)
    return EndLoss(settings, features, real)


def _pairs(values: Tensor) -> Tensor:
    """Return (N, N - 1): a matrix (N, N) without its diagonal."""
    n = len(values)
    off = ~torch.eye(n, dtype=torch.bool, device=values.device)
    return values[off].view(n, n - 1)
