"""Embeddings: vectors that a network of one's own made of whatever samples are made under."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_fields
from .base import Conditions, Kind


class EmbeddingLayer(nn.Module):
    """A linear layer; what it makes of zeros, its bias, is "none"."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.out = nn.Linear(size, out)

    def forward(self, condition: Tensor) -> Tensor:
        """Map embeddings (N, size) to (N, out)."""
        return self.out(condition)


@dataclass(frozen=True)
class Embeddings(Conditions):
    """Vectors of `size` float32 numbers, of a text encoder or a face recogniser say; "none" is 0.

    Args:
        size: numbers of a vector, at least 1.

    Raises:
        ValueError: fewer.
    """

    kind: ClassVar[Kind] = "embeddings"
    dtype: ClassVar[torch.dtype] = torch.float32

    size: int

    def __post_init__(self) -> None:
        check_fields(self, Embeddings)
        if self.size < 1:
            raise ValueError(f"The size of embeddings must be at least 1, got {self.size}.")

    def __str__(self) -> str:
        """What it is called in a message."""
        return f"embeddings of {self.size} numbers"

    @property
    def shape(self) -> tuple[int, ...]:
        """A vector."""
        return (self.size,)

    @property
    def bounds(self) -> tuple[float, float]:
        """There are none."""
        return -math.inf, math.inf

    def checked(self, condition: Any) -> Tensor:
        """Return an embedding (size,), or one for each sample (N, size), float32.

        Args:
            condition: numbers of that shape: a tensor, an array or a list.

        Raises:
            TypeError: no numbers.
            ValueError: another shape, NaN or infinity.
        """
        wanted = (
            f"A condition is an embedding ({self.size},), a tensor (N, {self.size}) of them, or "
            "None"
        )
        try:
            values = torch.as_tensor(condition)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{wanted}; got {condition!r}.") from None
        if values.dtype == torch.bool or values.is_complex():
            raise TypeError(f"{wanted}; got {values.dtype}.")
        if values.ndim not in (1, 2) or values.shape[-1] != self.size:
            got = tuple(values.shape) if values.ndim else condition
            raise ValueError(f"{wanted}; got {got}.")
        values = values.detach().to(self.dtype)
        if not values.isfinite().all():
            raise ValueError("An embedding holds NaN or infinity.")
        return values

    def plain(self, condition: Any) -> list[float]:
        """Return the numbers."""
        return condition.tolist()

    def parsed(self, text: str) -> np.ndarray:
        """Read an .npy file.

        Raises:
            ValueError: no such file, or no numbers in it.
        """
        try:
            return np.load(Path(text), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise ValueError(
                f"The condition is an embedding, an .npy file of {self.size} numbers, and "
                f"{text!r} is none."
            ) from None

    def points(self, conditions: Tensor) -> Tensor:
        """Return the embeddings (N, size)."""
        return conditions.float()

    def embedder(self, out: int) -> nn.Module:
        """Return a linear layer."""
        return EmbeddingLayer(self.size, out)

    def to_config(self) -> dict[str, Any]:
        """Return the size."""
        return {"size": self.size}
