"""What the samples of a target were made under: their classes, captions or embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.arguments import as_tensor
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


def to_labels(values: Any, samples: Tensor | None, what: str) -> Tensor | None:
    """Check labels of samples (N, ...) and bring them to what is kept, (N,) int64 beside them.

    Raises:
        TypeError: They are no integers.
        ValueError: Not as many as there are samples.
    """
    if values is None:
        return None
    labels = as_tensor(what, values)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{what} must be integers; got {labels.dtype}")
    count = 0 if samples is None else len(samples)
    if samples is None or labels.shape != (count,):
        raise ValueError(f"{what} must have shape ({count},); got {tuple(labels.shape)}")
    return labels.to(samples.device, torch.int64, copy=True)


def known_classes(labels: Tensor, held_out: Tensor | None, count: int, name: str) -> Known:
    """Return labels as conditions, of which there are `count`.

    Raises:
        ValueError: A label is negative.
    """
    if int(labels.min()) < 0:
        raise ValueError(
            f"classes are 0 and above; the labels of {name} begin with {int(labels.min())}"
        )
    return Known(Classes(count), labels, held_out)


def known_captions(texts: Any, held_out: Any, counts: tuple[int, int], name: str) -> Known:
    """Return texts as conditions; one of more than 256 bytes is cut, with a warning.

    Raises:
        TypeError: They are no texts.
        ValueError: Not as many as there are samples.
    """
    parts = [texts] if held_out is None else [texts, held_out]
    for what, part, count in zip(("captions", "held-out captions"), parts, counts, strict=False):
        if isinstance(part, str) or not isinstance(part, Sequence):
            raise TypeError(f"{what} of {name} must be a list of texts; got {part!r}")
        if bad := [text for text in part if not isinstance(text, str)]:
            raise TypeError(f"{what} of {name} must be texts; got {bad[0]!r}")
        if len(part) != count:
            raise ValueError(f"{name} has {len(part)} captions for {count} samples")
    everyone = [text for part in parts for text in part]
    longest = max(len(encode(text)) for text in everyone)
    kind = Captions(min(-(-max(longest, 1) // _STEP) * _STEP, _LONGEST))
    training, rest = kind.encoded(everyone).tensor_split([counts[0]])
    return Known(kind, training.clone(), None if held_out is None else rest.clone())


def known_embeddings(values: Any, held_out: Any, counts: tuple[int, int], name: str) -> Known:
    """Return vectors as conditions.

    Raises:
        TypeError: They are no numbers.
        ValueError: Not as many as there are samples, or not all of one length.
    """
    shape = tuple(as_tensor(f"embeddings of {name}", values).shape)
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
