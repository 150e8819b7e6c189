"""What the samples of a target were made under: their classes, captions or embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.conditions import Captions, Classes, Conditions, Embeddings
from ...common.conditions.captions import encode

# Captions of different sets are of one length if their longest ones are nearly so long.
_STEP, _LONGEST = 32, 256


class Known(NamedTuple):
    """The conditions of a target's samples.

    Attributes:
        conditions: Which there are.
        training: Those of the training samples, `(N, *conditions.shape)`.
        held_out: Those of the held-out samples, or None.
    """

    conditions: Conditions
    training: Tensor
    held_out: Tensor | None

    def to(self, device: torch.device | str) -> Known:
        """The same on another device."""
        held_out = None if self.held_out is None else self.held_out.to(device)
        return Known(self.conditions, self.training.to(device), held_out)


def known_classes(labels: Tensor, held_out: Tensor | None, name: str) -> Known:
    """Return labels as conditions.

    Raises:
        ValueError: A label is negative.
    """
    if int(labels.min()) < 0:
        raise ValueError(
            f"classes are 0 and above; the labels of {name} begin with {int(labels.min())}"
        )
    most = max(int(part.max()) for part in (labels, held_out) if part is not None)
    return Known(Classes(1 + most), labels, held_out)


def known_captions(texts: Any, held_out: Any, counts: tuple[int, int], name: str) -> Known:
    """Return texts as conditions; one of more than 256 bytes is cut, with a warning.

    Raises:
        TypeError: They are no texts.
        ValueError: Not as many as there are samples.
    """
    parts = [texts, [] if held_out is None else held_out]
    for part, count in zip(parts, counts, strict=True):
        if isinstance(part, str) or not isinstance(part, Sequence):
            raise TypeError(f"captions of {name} must be a list of texts; got {part!r}")
        if bad := [text for text in part if not isinstance(text, str)]:
            raise TypeError(f"captions of {name} must be texts; got {bad[0]!r}")
        if len(part) != count and (held_out is not None or part is texts):
            raise ValueError(f"{name} has {len(part)} captions for {count} samples")
    longest = max((len(encode(text)) for part in parts for text in part), default=1)
    kind = Captions(min(-(-max(longest, 1) // _STEP) * _STEP, _LONGEST))
    training, rest = kind.encoded([*parts[0], *parts[1]]).split([len(part) for part in parts])
    return Known(kind, training.clone(), None if held_out is None else rest.clone())


def known_embeddings(values: Any, held_out: Any, counts: tuple[int, int], name: str) -> Known:
    """Return vectors as conditions.

    Raises:
        TypeError: They are no numbers.
        ValueError: Not as many as there are samples, or not all of one length.
    """
    shape = tuple(torch.as_tensor(values).shape)
    if len(shape) != 2:
        raise ValueError(f"embeddings of {name} must be (N, size); got {shape}")
    kind = Embeddings(shape[1])
    parts = [None if part is None else kind.checked(part).clone() for part in (values, held_out)]
    for part, count in zip(parts, counts, strict=True):
        if part is not None and (part.ndim != 2 or len(part) != count):
            raise ValueError(f"{name} has embeddings {tuple(part.shape)} for {count} samples")
    training = parts[0]
    assert training is not None
    return Known(kind, training, parts[1])


def rows_of(asked: Tensor, known: Tensor, chance: Tensor) -> Tensor | None:
    """Choose a row of known conditions for each that is asked for, among those that are the same.

    Args:
        asked: `(n, ...)`.
        known: `(N, ...)`.
        chance: `(n,)`, in [0, 1), which of them.

    Returns:
        Rows `(n,)`; None if there is none for one of them.
    """
    # Each condition that there is gets a number.
    numbers = torch.cat([known, asked]).unique(dim=0, return_inverse=True)[1]
    own, wanted = numbers.split([len(known), len(asked)])
    order = own.argsort(stable=True)
    count = torch.bincount(own, minlength=int(numbers.max()) + 1)
    if len(asked) and bool((count[wanted] == 0).any()):
        return None
    first = count.cumsum(0) - count
    return order[first[wanted] + (chance * count[wanted]).long().clamp(max=count[wanted] - 1)]
