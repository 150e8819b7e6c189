"""Inpainting: an environment whose transition is not the identity.

A part of every picture is known. After each step it is put back, noised as far as the state is,

    x_s = m (alpha_s x_known + sigma_s eps) + (1 - m) action                  (Lugmayr et al. 2022)

without that paper's resampling, so that the policy fills in the rest alone; the reward sees the
whole picture. `make_mdp("Digits", inpaint="half")` makes one, and so does `gym.make_vec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.names import unknown_name
from .mdp import DiffusionMDP, Draw, check_batch

# Of "random": the same pixels in every environment of one shape.
RANDOM_MASK_SEED = 0


def _first(share: float) -> Callable[[Sequence[int]], Tensor]:
    """Know the first rows of an image, or the first coordinates of a vector."""

    def mask(shape: Sequence[int]) -> Tensor:
        rows = shape[-2] if len(shape) > 1 else shape[0]
        known = torch.zeros(tuple(shape), dtype=torch.bool)
        known.narrow(max(len(shape) - 2, 0), 0, max(round(share * rows), 1)).fill_(True)
        return known

    return mask


def _random(shape: Sequence[int]) -> Tensor:
    """Know half of the pixels of an image, in all channels, or half of a vector's coordinates."""
    places = tuple(shape[-2:])
    order = torch.randperm(
        math.prod(places), generator=torch.Generator().manual_seed(RANDOM_MASK_SEED)
    )
    return (order < len(order) // 2).view(places).expand(tuple(shape)).clone()


# What is known: shape of a sample -> mask of that shape, True where it is known.
MASKS: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "half": _first(0.5),
    "quarter": _first(0.25),
    "random": _random,
}


@dataclass(frozen=True, eq=False)
class Inpainting(DiffusionMDP):
    """A decision process in which a part of each sample is known and put back after every step.

    Args:
        mask: Which numbers of a sample are known, bool of its shape, or a key of `MASKS`: "half"
            and "quarter" are the upper rows of an image or the first coordinates of a vector,
            "random" is half of the pixels, always the same.
        known: The known samples `(n, *shape)` of the episodes that have begun; None before.

    The known samples of an episode are training samples of the target, unless `reset` is given
    others: `env.reset(options={"known": pictures})`.

    Raises:
        ValueError: A mask of an unknown name or another shape, or one that knows all or nothing.
        TypeError: A mask that is neither a name nor a tensor of bool.
    """

    mask: Tensor | str = "half"
    known: Tensor | None = None

    own_options: ClassVar[tuple[str, ...]] = ("known",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mask", _resolved(self.mask, self.shape).to(self.device))

    def episodes(
        self,
        n: int,
        generator: torch.Generator | None = None,
        condition: Any = None,
        known: Tensor | None = None,
    ) -> Inpainting:
        """The decision process of `n` episodes, with their known samples.

        Args:
            n: How many.
            generator: Source of randomness; the global one if None.
            known: The known samples `(n, *shape)`, of which the rest is never shown; drawn from the
                target if None, of the condition where there is one.
            condition: See `DiffusionMDP.episodes`.
        """
        if known is None and condition is None and self.conditional:
            known, drawn = self.target.draw(n, generator, self.kind)
            return replace(self, known=known, condition=drawn)
        if known is not None and condition is None and self.conditional:
            raise ValueError("give the condition of the known samples, too")
        begun = super().episodes(n, generator, condition)
        if known is None and begun.condition is not None and self.kind is not None:
            of_condition = self.target.sample_of(begun.condition, generator, self.kind)
            return replace(begun, known=of_condition)
        if known is None:
            return replace(begun, known=self.target.sample(n, generator))
        check_batch(known, "known", torch.Size((n, *self.shape)), self.device)
        return replace(begun, known=known.detach().to(torch.float32, copy=True))

    def at(self, rows: Tensor | slice) -> Inpainting:
        """The decision process of some of the episodes, with their known samples."""
        some = super().at(rows)
        return some if self.known is None else replace(some, known=self.known[rows])

    def transition(
        self, sample: Tensor, action: Tensor, step: int, draw: Draw = torch.randn_like
    ) -> Tensor:
        """Take the action where nothing is known, the known sample, noised, elsewhere.

        Raises:
            ValueError: No episodes have begun, or not as many as there are samples.
        """
        if self.known is None or len(self.known) != len(sample):
            begun = 0 if self.known is None else len(self.known)
            raise ValueError(
                f"{len(sample)} samples move, {begun} episodes have begun: get the decision "
                "process of these from episodes(n, generator)"
            )
        alpha, sigma = self._levels[step + 1]
        noised = alpha * self.known
        if sigma > 0:
            noised = torch.add(noised, draw(noised), alpha=sigma)
        return torch.where(self.mask, noised, action.to(torch.float32))  # type: ignore[arg-type]

    @cached_property
    def _levels(self) -> list[tuple[float, float]]:
        """`alpha` and `sigma` at each time of the schedule."""
        alphas, sigmas = self.schedule.levels()
        return list(zip(alphas.tolist(), sigmas.tolist(), strict=True))


def _resolved(mask: Tensor | str, shape: torch.Size) -> Tensor:
    if isinstance(mask, str):
        if mask not in MASKS:
            raise unknown_name("mask", mask, MASKS)
        mask = MASKS[mask](shape)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be the name of one or a tensor of bool; got {kind}")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}; got {tuple(mask.shape)}")
    if mask.all() or not mask.any():
        raise ValueError("mask must leave something to fill in, and know something")
    return mask
