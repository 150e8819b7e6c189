"""Conditions: which conditions there are, and how one is written as numbers.

A condition is an array of one shape and type: whoever loops, stores or shares out conditions
handles arrays `(N, *shape)` and never asks which kind they are. A new kind is one file here and its
line in `kinds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Kind = Literal["classes", "captions", "embeddings"]


class Conditions(ABC):
    """A kind of condition. A value: frozen, comparable, and kept in files by its config.

    Attributes:
        kind: its name, also what several of them are called in a message.
        dtype: of the array.
    """

    kind: ClassVar[Kind]
    dtype: ClassVar[torch.dtype]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one condition."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the largest number in a condition."""

    @abstractmethod
    def checked(self, condition: Any) -> Any:
        """Return a condition, or many, as they are kept, after a look at them.

        Returns:
            A tensor: `shape`, one for all samples, or `(N, *shape)`, one each. (A single class is a
            number.)

        Raises:
            TypeError: another kind of thing.
            ValueError: another shape, or a condition that does not exist.
        """

    @abstractmethod
    def plain(self, condition: Any) -> Any:
        """Return a single condition of `checked` as JSON holds it."""

    def from_plain(self, value: Any) -> Any:
        """Return the condition of which `plain` is the value."""
        return self.checked(value)

    @abstractmethod
    def parsed(self, text: str) -> Any:
        """Read a condition from what a user typed, for `checked`."""

    @abstractmethod
    def points(self, conditions: Tensor) -> Tensor:
        """Return conditions (N, *shape) as points (N, D): what compares them needs distances."""

    @abstractmethod
    def embedder(self, out: int) -> nn.Module:
        """Return a new network of conditions (N, *shape), with "none" among them, to (N, out)."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Return the numbers that it is made of, by the names of its constructor."""

    def none(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the condition "none", `(n, *shape)`: all zeros, unless the kind says otherwise."""
        return torch.zeros((1, *self.shape), dtype=self.dtype, device=device).expand(n, *self.shape)

    def some(self) -> Any:
        """Return a condition, as `checked` does: whichever it is."""
        return torch.zeros(self.shape, dtype=self.dtype)

    def rows(self, condition: Any, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the conditions `(n, *shape)` of n samples, from what `checked` returned.

        One for all is repeated without a copy, with stride 0.

        Raises:
            ValueError: conditions of another number of samples.
        """
        if condition.ndim == len(self.shape):
            return condition.to(device).expand(n, *self.shape)
        if len(condition) != n:
            raise ValueError(f"{len(condition)} {self.kind} were given for {n} samples.")
        return condition.to(device)

    def shown(self, values: Any, device: torch.device | str = "cpu") -> Tensor:
        """Return the conditions `(N, *shape)` of an observation, single or batched."""
        return torch.as_tensor(values, device=device).reshape(-1, *self.shape).to(self.dtype)
