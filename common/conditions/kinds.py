"""The table of kinds, and the ways in which one is named: a new kind is one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arguments import check_value, checked
from ..names import unknown_name
from .base import Conditions, Kind
from .captions import Captions
from .classes import Classes
from .embeddings import Embeddings

KINDS: dict[str, type[Conditions]] = {kind.kind: kind for kind in (Classes, Captions, Embeddings)}

Conditional = bool | Kind
"""Whether an environment has conditions, and of which kind: True is those of classes."""


def kind_of(conditional: Conditional) -> Kind | None:
    """Return the name of a kind, None of no conditions.

    Raises:
        ValueError: an unknown one.
        TypeError: no name.
    """
    if isinstance(conditional, bool):
        return "classes" if conditional else None
    if not isinstance(conditional, str):
        raise TypeError(f"conditional must be a flag or a kind of conditions, got {conditional!r}.")
    if conditional not in KINDS:
        raise unknown_name("kind of conditions", conditional, KINDS)
    return conditional


def as_conditions(
    conditions: Conditions | Mapping[str, Any] | None = None, classes: int | None = None
) -> Conditions | None:
    """Return conditions that are given as such, as their config, or as a number of classes.

    Raises:
        ValueError: both are given, or numbers that make no sense.
        TypeError: no conditions.
    """
    if classes is not None:
        if conditions is not None:
            raise ValueError("Give either classes or conditions, not both.")
        return Classes(check_value("classes", classes, int))
    if isinstance(conditions, Mapping):
        parts = dict(conditions)
        name = parts.pop("kind", None)
        if name not in KINDS:
            raise unknown_name("kind of conditions", name, KINDS)
        return KINDS[name](**parts)
    if conditions is not None and not isinstance(conditions, Conditions):
        raise TypeError(f"conditions must be Classes, Captions or Embeddings, got {conditions!r}.")
    return conditions


@checked
def condition_config(conditions: Conditions | None) -> dict[str, Any]:
    """Return the entry of a config that says which conditions there are: none without any.

    It is an argument of `as_conditions`, by its name: a number of classes is `classes`.
    """
    if conditions is None:
        return {}
    if isinstance(conditions, Classes):
        return {"classes": conditions.count}
    return {"conditions": {"kind": conditions.kind, **conditions.to_config()}}
