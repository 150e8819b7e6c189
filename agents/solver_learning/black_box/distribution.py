"""The distribution that tables are drawn from, and the two ways in which rewards move it.

Vectors are in standard deviations of the start: the start is N(0, I).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ....common.optimisation import learning_rate, set_learning_rate
from .settings import CrossEntropySettings, PolicyGradientSettings

# Elites that are all alike would leave nothing to draw.
_LEAST_STD = 1e-9


class TableDistribution:
    """N(mean, diag(std^2)) over vectors (D,), float64 on the CPU.

    Attributes:
        mean: (D,).
        log_std: (D,).
    """

    def __init__(self, size: int) -> None:
        self.mean = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.log_std = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def log_density(self, vectors: Tensor) -> Tensor:
        """Return the log-density (...) of vectors (..., D)."""
        z = (vectors - self.mean) / self.log_std.exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def divergence(self) -> Tensor:
        """Return the Kullback-Leibler divergence from the distribution of the start, 0-d."""
        squares = (2 * self.log_std).exp() + self.mean.square()
        return (squares - 1 - 2 * self.log_std).sum() / 2

    @torch.no_grad()
    def draw(self, *shape: int, generator: torch.Generator, mirrored: bool = False) -> Tensor:
        """Draw vectors (*shape, D); `mirrored`, the second half of the first dimension mirrors it.

        Args:
            shape: how many.
            generator: source of randomness, of any device.
            mirrored: whether the second half is 2 mean - the first half.
        """
        first = shape[0] // 2 if mirrored else shape[0]
        whole = (first, *shape[1:], len(self.mean))
        z = torch.randn(whole, generator=generator, device=generator.device).cpu().double()
        if mirrored:
            z = torch.cat([z, -z])
        return self.mean + self.log_std.exp() * z

    def state(self) -> dict[str, Tensor]:
        """Return the mean and the logarithms of the standard deviations."""
        return {"mean": self.mean.detach(), "log_std": self.log_std.detach()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.mean.copy_(state["mean"].cpu())
        self.log_std.copy_(state["log_std"].cpu())


def left_out(rewards: Tensor) -> Tensor:
    """Return the leave-one-out advantages of rewards (k, ...): each less the mean of the others.

    Left out is also the one that mirrors it, k / 2 places away: what a table earns says something
    of its mirror, and a baseline that does would bias the gradient, by k / (k - 1).
    """
    pairs = rewards.unflatten(0, (2, -1)).sum(0)
    others = (pairs.sum(0) - pairs) / (len(rewards) - 2)
    return rewards - torch.cat([others, others])


def limited(advantages: Tensor, limit: float) -> Tensor:
    """Return advantages (...) in units of their mean size, none larger than the limit.

    A table whose samples run away earns so little that all others would look alike beside it.
    """
    size = advantages.abs().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return (advantages / size).clamp(-limit, limit)


class PolicyGradient:
    """PPO on a distribution: the score function with leave-one-out advantages, clipped.

    Args:
        distribution: what is moved.
        settings: how.
    """

    def __init__(self, distribution: TableDistribution, settings: PolicyGradientSettings) -> None:
        self.distribution, self.settings = distribution, settings
        groups = [{"params": [distribution.mean]}, {"params": [distribution.log_std]}]
        self._adam = torch.optim.Adam(groups, betas=settings.betas)

    def loss(self, vectors: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
        """Return the clipped surrogate, and what the divergence from the start adds, 0-d.

        Args:
            vectors: (..., D) that acted.
            advantages: (...).
            old: (...) their log-densities before the round's first step.
        """
        clip = self.settings.clip_range
        ratio = (self.distribution.log_density(vectors) - old).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        surrogate = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        if not self.settings.kl:
            return surrogate
        return surrogate + self.settings.kl * self.distribution.divergence()

    def update(self, vectors: Tensor, rewards: Tensor, done: float) -> dict[str, float]:
        """Follow the rewards of a round; return what to log.

        Args:
            vectors: (k, n, D) that acted, k of them under each noise.
            rewards: (k, n) float64.
            done: share of the training that is done, 0 to 1.
        """
        advantages = limited(left_out(rewards), self.settings.limit)
        with torch.no_grad():
            old = self.distribution.log_density(vectors)
        rates = (self.settings.learning_rate, self.settings.std_rate)
        set_learning_rate(self._adam, *(learning_rate(rate, "cosine", done) for rate in rates))
        for _ in range(self.settings.epochs):
            self._adam.zero_grad()
            loss = self.loss(vectors, advantages, old)
            loss.backward()
            self._adam.step()
        assert self.distribution.mean.grad is not None  # backward saw to it
        with torch.no_grad():
            difference = self.distribution.log_density(vectors) - old
        return {
            "policy_loss": float(loss.detach()),
            "grad_norm": float(self.distribution.mean.grad.norm()),
            # Schulman's k3 estimate.
            "approx_kl": float((difference.exp() - 1 - difference).mean()),
        }

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return {"adam": self._adam.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._adam.load_state_dict(state["adam"])


class CrossEntropy:
    """The cross-entropy method (Rubinstein 1999): the next tables are drawn as the best ones lie.

    Args:
        distribution: what is moved.
        settings: how.
    """

    def __init__(self, distribution: TableDistribution, settings: CrossEntropySettings) -> None:
        self.distribution, self.settings = distribution, settings

    @torch.no_grad()
    def update(self, vectors: Tensor, rewards: Tensor, done: float) -> dict[str, float]:
        """Follow the rewards of a round; return what to log.

        Args:
            vectors: (k, D) of the tables.
            rewards: (k,) float64, the mean of each over its noises.
            done: share of the training that is done; of no use here.
        """
        count = min(max(2, round(self.settings.elite * len(rewards))), len(rewards))
        elite, step = vectors[rewards.topk(count).indices], self.settings.step
        std = self.distribution.log_std.exp()
        self.distribution.mean.lerp_(elite.mean(0), step)
        self.distribution.log_std.copy_(
            torch.lerp(std, elite.std(0), step).clamp_min(_LEAST_STD).log()
        )
        return {"elite_reward": float(rewards.topk(count).values.mean())}

    def state(self) -> dict[str, Any]:
        """Return nothing: all there is is the distribution."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore nothing."""
