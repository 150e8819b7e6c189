"""The flags of conditions: which kind an environment has, and how a denoiser is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import tyro

from ...agents import Denoiser
from ...common.conditions import KINDS, Conditional, kind_of


def _conditional(words: Sequence[str]) -> Conditional:
    """Read what stands behind the flag, nothing or a kind."""
    if len(words) > 1:
        raise ValueError(f"--conditional takes one kind of conditions, got {' '.join(words)}.")
    if not words or words[0] == str(True):
        return True
    return False if words[0] == str(False) else kind_of(words[0]) or False  # type: ignore[arg-type]


ConditionalFlag = Annotated[
    Conditional,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{{{','.join(KINDS)}}}]",
        instance_from_str=_conditional,
        is_instance=lambda value: isinstance(value, bool) or value in KINDS,
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A flag that may stand alone, for classes, or before the name of a kind."""


class Terms(Protocol):
    """The flags that say how a conditional denoiser is asked."""

    @property
    def condition(self) -> str | int | None: ...  # noqa: D102
    @property
    def guidance(self) -> float | None: ...  # noqa: D102
    @property
    def guidance_interval(self) -> tuple[float, float] | None: ...  # noqa: D102
    @property
    def guidance_rescale(self) -> float | None: ...  # noqa: D102


def under_terms(denoiser: Denoiser, terms: Terms) -> Denoiser:
    """Return the denoiser asked as the flags say; itself where they say nothing.

    Raises:
        TypeError, ValueError: what `Denoiser.given` refuses.
    """
    under = terms.condition, terms.guidance, terms.guidance_interval, terms.guidance_rescale
    if all(term is None for term in under):
        return denoiser
    condition: Any = terms.condition
    _, guidance, interval, rescale = under
    kept = None if denoiser.conditioning is None else denoiser.conditioning.guidance
    if (kept if guidance is None else guidance) == 1:
        if interval is not None:
            raise ValueError(
                "--guidance-interval says at which noise levels guidance holds: it needs a "
                "--guidance other than 1."
            )
        if rescale:
            raise ValueError(
                "--guidance-rescale is the share of a guided answer that is rescaled: it needs a "
                "--guidance other than 1."
            )
    if condition is None:
        return denoiser.given(guidance=guidance, interval=interval, rescale=rescale)
    if denoiser.conditions is not None:
        condition = denoiser.conditions.parsed(str(condition))
    return denoiser.given(condition, guidance, interval=interval, rescale=rescale)
