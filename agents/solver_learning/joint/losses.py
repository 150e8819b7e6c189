"""What solver learning minimises: a number for each finished sample (MATH.md 5.3).

A loss is the mean of contributions e_i of the finished samples, so that the same numbers are
descended, and compared on held-out noise. Those of a teacher's distance need the sample alone;
those of a distance of distributions, the kernel MMD without bias,

    e_i = mean_{j != i} k(x_i, x_j) - 2 mean_m k(x_i, y_m) + mean_{m != n} k(y_m, y_n),

need all samples at once. Their spread says little about that of their mean, which both samples and
real ones vary: for that there are `EndLoss.shares`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....critics.energy import first_order
from ....critics.joint import Joined
from ....critics.mmd import distances
from ....envs import DiffusionMDP
from .features import SampleFeatures
from .settings import OF_DATA, LossSettings


class EndLoss:
    """The contributions of finished samples.

    Args:
        settings: which.
        features: what compares them; None compares the samples themselves.
        real: real samples (M, *shape), where the distance is one of distributions.
        condition: theirs (M, ...); then it is one of samples together with their conditions.
        points: gives conditions as vectors, see `Conditions.points`.

    Attributes:
        coupled: whether a sample's contribution depends on the other samples.
    """

    def __init__(
        self,
        settings: LossSettings,
        features: SampleFeatures | None,
        real: Tensor | None,
        condition: Tensor | None = None,
        points: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._settings, self._features = settings, features
        self.coupled = real is not None
        self._real: Tensor | None = None
        self._joined: Joined | None = None
        # Each real sample's mean kernel with the others (M,).
        self._real_own = torch.zeros(0)
        if real is not None:
            with torch.no_grad():
                if condition is not None and points is not None:
                    self._joined = Joined(points, self._seen(real), condition)
                self._real = self._compared(real, condition)
                self._real_own = _others(self._kernel(self._real, self._real)).mean(1)

    def contributions(self, ends: Tensor, goal: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return e (N,), differentiable in the ends.

        Args:
            ends: finished samples (N, *shape).
            goal: the teacher's from the same noise (N, *shape); distances of distributions do not
                look at it.
            condition: (N, ...) of the samples.
        """
        if self._real is None:
            square = (self._seen(ends) - self._seen(goal)).square().mean(1)
            if self._settings.distance == "l2":
                return square
            width = self._settings.huber_width
            return (square + width**2).sqrt() - width
        own, to_real = self._kernels(ends, condition, self._real)
        return own - 2 * to_real.mean(1) + self._real_own.mean()

    @torch.no_grad()
    def shares(self, ends: Tensor, goal: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return numbers whose mean is the loss, and that tell it from chance; float64 on the CPU.

        The standard deviation over the root of their number is the loss's standard error: those of
        a distance of distributions are (N + M,), see `first_order`. Other losses have their
        contributions (N,).

        Args:
            ends: see `contributions`, as the others.
            goal: likewise.
            condition: likewise.
        """
        if self._real is None:
            return self.contributions(ends, goal).double().cpu()
        own, to_real = self._kernels(ends, condition, self._real)
        return first_order(own - to_real.mean(1), self._real_own.to(to_real) - to_real.mean(0))

    def _kernels(
        self, ends: Tensor, condition: Tensor | None, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the samples' mean kernel with the others (N,), and with real ones (N, M)."""
        compared = self._compared(ends, condition)
        if len(compared) < 2:
            raise ValueError("A distance of distributions needs at least two samples.")
        return _others(self._kernel(compared, compared)).mean(1), self._kernel(compared, real)

    def _compared(self, samples: Tensor, condition: Tensor | None) -> Tensor:
        seen = self._seen(samples)
        if self._joined is None or condition is None:
            return seen
        return self._joined(seen, condition)

    def _seen(self, samples: Tensor) -> Tensor:
        return samples.flatten(1) if self._features is None else self._features(samples)

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        if self._settings.distance == "mmd":
            # The distance of a point to itself has no derivative.
            return -distances(x, y)
        return (x @ y.to(x).T / x.shape[1] + 1) ** 3


def end_loss(
    settings: LossSettings,
    features: SampleFeatures | None,
    mdp: DiffusionMDP,
    seed: int,
    draw: int,
) -> EndLoss:
    """Return the loss that settings name.

    Args:
        settings: of the loss.
        features: what compares samples, where it is not they themselves.
        mdp: gives the real samples, where the distance is one of distributions: of conditions as
            its episodes have them.
        seed: of these samples.
        draw: which of the sets of real samples that follow from the seed, 0, 1, ...

    Raises:
        ValueError: features are to be compared, and there are none; or there is no real sample
            under a condition of the episodes.
    """
    if settings.compared == "features" and features is None:
        raise ValueError(
            "loss.compared='features' needs features=, an extractor such as `ClassifierFeatures`."
        )
    if settings.distance not in OF_DATA:
        return EndLoss(settings, features, None)
    generator = torch.Generator(mdp.target.device).manual_seed(seed)
    for _ in range(draw + 1):
        real, condition = _drawn(mdp, settings.real_samples, generator)
    points = None if mdp.conditions is None else mdp.conditions.points
    return EndLoss(settings, features, real, condition, points)


def _drawn(
    mdp: DiffusionMDP, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Return real samples (count, *shape), and the conditions of as many episodes they are of."""
    if mdp.kind is None:
        return mdp.target.sample(count, generator), None
    condition = mdp.episodes(count, generator).condition
    assert condition is not None  # there is a kind
    return mdp.target.sample_of(condition, generator, mdp.kind), condition


def _others(values: Tensor) -> Tensor:
    """Return (N, N - 1): a matrix (N, N) without its diagonal."""
    n = len(values)
    off = ~torch.eye(n, dtype=torch.bool, device=values.device)
    return values[off].view(n, n - 1)
