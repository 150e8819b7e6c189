"""HeldOut: noise and data that are not trained on, and how far a policy's samples are from them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...critics.energy import EnergyDistance
from ...critics.metrics.features import FeatureExtractor
from ...critics.metrics.fidelity import extract
from ...envs.mdp import DiffusionMDP, Policy

# Added to the seed of what is held out, which shares no numbers with training or evaluation.
_SEED = 40_001
# Real samples for each one that is played: they cost no network call, and are chance, too.
_REAL = 4


class HeldOut:
    """Noise and real samples that a policy is judged by, always the same for a seed.

    Drawing them changes no training.

    Args:
        mdp: the environment, which has training samples.
        size: N, how many samples a policy plays.
        at_once: most of them at once.
        seed: of noise and real samples.
        features: what samples are compared in; None compares the samples themselves.
    """

    def __init__(
        self,
        mdp: DiffusionMDP,
        size: int,
        at_once: int,
        seed: int,
        features: FeatureExtractor | None = None,
    ) -> None:
        self._mdp, self._size, self._at_once, self._features = mdp, size, at_once, features
        generator = torch.Generator(mdp.device).manual_seed(_SEED + seed)
        real, self._condition = mdp.target.draw(_REAL * size, generator, mdp.kind)
        points = None if mdp.conditions is None else mdp.conditions.points
        self._to_real = EnergyDistance(*self._seen(real, self._condition), points)
        self._noise = generator.get_state()

    @torch.no_grad()
    def shares(self, policy: Policy) -> Tensor:
        """Return the shares of a policy's energy distance to the real samples, (N + M,).

        Under conditions it plays those of the first N real samples.
        """
        generator = torch.Generator(self._mdp.device)
        generator.set_state(self._noise)
        under = None if self._condition is None else self._condition[: self._size]
        played = []
        for rows in torch.arange(self._size, device=self._mdp.device).split(self._at_once):
            condition = None if under is None else under[rows]
            played.append(self._mdp.rollout(policy, len(rows), generator, condition=condition))
        samples = torch.cat(played)
        if not samples.isfinite().all():  # of which an extractor would complain
            return torch.full((self._size,), torch.nan, dtype=torch.float64)
        return self._to_real.shares(*self._seen(samples, under))

    def _seen(self, samples: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what is compared, and the conditions where it is."""
        if self._features is None:
            return samples, condition
        seen = extract("samples", samples, self._features)
        return seen, None if condition is None else condition.to(seen.device)
