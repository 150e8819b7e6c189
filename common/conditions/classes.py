"""Classes: whole numbers from 0; behind the last comes the number for "none"."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_fields
from .base import Conditions, Kind


@dataclass(frozen=True)
class Classes(Conditions):
    """`count` classes, int64 numbers 0 to count - 1; `count` itself is "none".

    Args:
        count: how many, at least 1.

    Raises:
        ValueError: fewer.
    """

    kind: ClassVar[Kind] = "classes"
    dtype: ClassVar[torch.dtype] = torch.int64

    count: int

    def __post_init__(self) -> None:
        check_fields(self, Classes)
        if self.count < 1:
            raise ValueError(f"classes must be at least 1, got {self.count}.")

    def __str__(self) -> str:
        """What it is called in a message."""
        return f"{self.count} classes"

    @property
    def shape(self) -> tuple[int, ...]:
        """A class is a number."""
        return ()

    @property
    def bounds(self) -> tuple[float, float]:
        """The first class and the last."""
        return 0, self.count - 1

    def checked(self, condition: Any) -> int | Tensor:
        """Return a class as a number, or classes as a tensor (N,) int64.

        Args:
            condition: a whole number, or many: a tensor, an array or a list (N,).

        Raises:
            TypeError: a text, or no whole numbers.
            ValueError: a class that does not exist, or more than one dimension.
        """
        wanted = f"A condition is a class 0 to {self.count - 1}, a tensor (N,) of classes, or None"
        if isinstance(condition, Tensor | np.ndarray | list | tuple):
            try:
                values = torch.as_tensor(condition)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{wanted}; got {condition!r}.") from None
            return self._checked_tensor(values)
        try:
            number = None if isinstance(condition, bool) else index(condition)
        except TypeError:
            number = None
        if number is None:
            raise TypeError(f"{wanted}; got {condition!r}.")
        self._check_range(number, number)
        return number

    def _checked_tensor(self, values: Tensor) -> int | Tensor:
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"Classes are whole numbers, got a tensor of {values.dtype}.")
        if values.ndim > 1:
            raise ValueError(
                f"Classes are a tensor (N,), one for each sample; got {tuple(values.shape)}."
            )
        if values.numel():
            self._check_range(int(values.min()), int(values.max()))
        return values.long() if values.ndim else int(values)

    def _check_range(self, low: int, high: int) -> None:
        if low < 0 or high >= self.count:
            raise ValueError(
                f"There are {self.count} classes, 0 to {self.count - 1}; got "
                f"{low if low < 0 else high}."
            )

    def plain(self, condition: Any) -> int:
        """Return the number."""
        return int(condition)

    def parsed(self, text: str) -> int | str:
        """Read a number; what is none is left for `checked` to refuse."""
        try:
            return int(text)
        except ValueError:
            return text

    def none(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the number behind the last class, (n,)."""
        return self.rows(self.count, n, device)

    def some(self) -> int:
        """Return the first class."""
        return 0

    def rows(self, condition: Any, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the classes (n,) of n samples; see `Conditions.rows`."""
        if isinstance(condition, int):  # made on the device, which is not waited for
            return torch.full((1,), condition, device=device).expand(n)
        return super().rows(condition, n, device)

    def points(self, conditions: Tensor) -> Tensor:
        """Return unit vectors (N, count), one for each class."""
        return nn.functional.one_hot(conditions.long(), self.count).float()

    def embedder(self, out: int) -> nn.Module:
        """Return a table of a vector for each class and one for "none"."""
        return nn.Embedding(self.count + 1, out)

    def to_config(self) -> dict[str, Any]:
        """Return how many there are."""
        return {"count": self.count}
