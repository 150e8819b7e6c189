"""Noised real samples that no training saw: to choose by, and others to report on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.conditions import Kind
from ...envs import DiffusionMDP, Target

# A target's fresh samples have fewer seeds than a training: 0 to this less one.
_FRESH_SEEDS = 2**32 - 1

# Added to a training's seed: the noise is other noise.
_SEED_OFFSET = 1_000_003


class Noised(NamedTuple):
    """Samples at times of their own.

    Attributes:
        noisy: (N, *shape) noised samples.
        t: (N,) their times.
        noise: (N, *shape) the noise in them.
        condition: (N, ...) theirs, in a conditional environment.
    """

    noisy: Tensor
    t: Tensor
    noise: Tensor
    condition: Tensor | None = None


def held_out_samples(
    mdp: DiffusionMDP, n: int, draw_times: Callable[[int, torch.Generator], Tensor], seed: int
) -> tuple[Noised, Noised]:
    """Return n noised samples to choose by, and n others to report on.

    The clean ones are fresh samples, not among those trained on, where the target has 2 n of them,
    and in a conditional environment their conditions; else training samples with noise of their
    own.

    Args:
        mdp: gives target and process.
        n: how many.
        draw_times: draws times (n,).
        seed: of the training, >= 0.
    """
    generator = torch.Generator(mdp.device).manual_seed(_SEED_OFFSET + seed)
    limit = mdp.target.fresh_limit
    enough = limit is None or limit >= 2 * n
    if enough and (mdp.kind is None or _fresh_have(mdp.kind, mdp.target)):
        fresh_seed = seed % _FRESH_SEEDS
        clean = mdp.target.sample_fresh(2 * n, fresh_seed)
        given = mdp.target.fresh_conditions(2 * n, fresh_seed, mdp.kind) if mdp.kind else None
    else:
        clean, given = mdp.target.draw(2 * n, generator, mdp.kind)
    noise = torch.empty_like(clean).normal_(generator=generator)
    parts = []
    for part in (slice(0, n), slice(n, 2 * n)):
        t = draw_times(n, generator)
        noisy = mdp.process.add_noise(clean[part], t, noise[part])
        condition = None if given is None else given[part]
        parts.append(Noised(noisy, t, noise[part], condition))
    return parts[0], parts[1]


def _fresh_have(kind: Kind, target: Target) -> bool:
    """Whether the fresh samples have conditions of a kind; a generator's never have."""
    if target.fresh_limit is None:
        return False
    held_out = target.held_out_labels if kind == "classes" else target.known(kind).held_out
    return held_out is not None
