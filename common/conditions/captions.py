"""Captions: texts as the bytes of their UTF-8, which need no vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_fields
from .base import Conditions, Kind
from .text import TextEncoder

_BYTES = 255


@dataclass(frozen=True)
class Captions(Conditions):
    """Texts of up to `length` bytes of UTF-8: int64 numbers 1 to 255, and 0 behind the last.

    "None" is the empty caption. A longer text is cut at the border of a character, with a warning.

    Args:
        length: most bytes of a text, at least 1.

    Raises:
        ValueError: fewer.
    """

    kind: ClassVar[Kind] = "captions"
    dtype: ClassVar[torch.dtype] = torch.int64

    length: int

    def __post_init__(self) -> None:
        check_fields(self, Captions)
        if self.length < 1:
            raise ValueError(f"The length of captions must be at least 1, got {self.length}.")

    def __str__(self) -> str:
        """What it is called in a message."""
        return f"captions of {self.length} bytes"

    @property
    def shape(self) -> tuple[int, ...]:
        """The bytes of a text, and zeros behind them."""
        return (self.length,)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least byte and the largest."""
        return 0, _BYTES

    def checked(self, condition: Any) -> Tensor:
        """Return the bytes of a text (length,), or of a text for each sample (N, length), int64.

        Args:
            condition: a text; a list or array of texts; or their bytes, as this returns them.

        Raises:
            TypeError: neither texts nor whole numbers.
            ValueError: bytes of another shape or out of range, or a text with a zero byte.
        """
        if isinstance(condition, str):
            return self.encoded([condition])[0]
        if isinstance(condition, np.ndarray) and condition.dtype.kind in "UO":
            condition = condition.tolist()
            if isinstance(condition, str):
                return self.encoded([condition])[0]
        wanted = (
            f"A condition is a text, a list of texts, their bytes as a tensor (N, {self.length}), "
            "or None"
        )
        if isinstance(condition, list | tuple) and any(isinstance(one, str) for one in condition):
            if not all(isinstance(one, str) for one in condition):
                raise TypeError(f"{wanted}; got {condition!r}.")
            return self.encoded(condition)
        try:
            values = torch.as_tensor(condition)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{wanted}; got {condition!r}.") from None
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{wanted}; got a tensor of {values.dtype}.")
        if values.ndim == 0:
            raise TypeError(f"{wanted}; got {condition!r}.")
        if values.ndim > 2 or values.shape[-1] != self.length:
            raise ValueError(f"{wanted}; got a tensor {tuple(values.shape)}.")
        low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
        if low < 0 or high > _BYTES:
            raise ValueError(f"The bytes of captions are 0 to {_BYTES}, got {low} to {high}.")
        return values.long()

    def encoded(self, texts: Sequence[str]) -> Tensor:
        """Return the bytes (N, length) int64 of texts, and zeros behind them.

        Raises:
            ValueError: a text with a zero byte, or one that is not Unicode.
        """
        rows, cut = np.zeros((len(texts), self.length), np.uint8), 0
        for row, text in zip(rows, texts, strict=True):
            data = encode(text)
            if len(data) > self.length:
                cut += 1
                data = data[: self.length].decode("utf-8", "ignore").encode()
            row[: len(data)] = np.frombuffer(data, np.uint8)
        if cut:
            warnings.warn(
                f"Of {len(texts)} captions {cut} {'is' if cut == 1 else 'are'} longer than "
                f"{self.length} bytes, and cut.",
                stacklevel=2,
            )
        return torch.from_numpy(rows).long()

    def decoded(self, condition: Tensor) -> list[str]:
        """Return the texts of bytes (N, length)."""
        rows = condition.to("cpu", torch.uint8).numpy()
        return [row[row > 0].tobytes().decode("utf-8", "replace") for row in rows]

    def plain(self, condition: Any) -> dict[str, str]:
        """Return the text, in braces: it may be any text."""
        return {"text": self.decoded(condition[None])[0]}

    def from_plain(self, value: Any) -> Tensor:
        """Return the bytes of the text."""
        return self.checked(value["text"])

    def parsed(self, text: str) -> str:
        """Return the text itself."""
        return text

    def points(self, conditions: Tensor) -> Tensor:
        """Return how often each byte occurs in a text, (N, 255)."""
        counts = torch.zeros(len(conditions), _BYTES + 1, device=conditions.device)
        return counts.scatter_add_(1, conditions, torch.ones_like(conditions).float())[:, 1:]

    def embedder(self, out: int) -> nn.Module:
        """Return a new `TextEncoder`."""
        return TextEncoder(self.length, out)

    def to_config(self) -> dict[str, Any]:
        """Return the length."""
        return {"length": self.length}


def encode(text: str) -> bytes:
    """Return the UTF-8 of a text.

    Raises:
        ValueError: it holds a zero byte, or half of a surrogate pair.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The caption {text!r} is not Unicode.") from None
    if b"\0" in data:
        raise ValueError(f"The caption {text!r} holds a zero byte, which stands for no text.")
    return data
