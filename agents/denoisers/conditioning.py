"""What a conditional denoiser is asked under: a condition, and how strongly it is guided to it.

Classifier-free guidance (Ho & Salimans 2022) asks the network twice, with the condition and without

    answer = without + w (with - without)

both in one batch of twice the size. Whatever the network predicts, its answer is affine in the
predicted noise, so that it is all the same which of the two is guided. The guidance may be limited
to an interval of noise levels (Kynkaanniemi et al. 2024), and rescaled to the standard deviation of
the answer with the condition (Lin et al. 2024, Eq. 15 and 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ...common.conditions import Conditions, as_conditions, condition_config

Ask = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Open(Enum):
    """The condition of a view that waits for one: it comes with each observation."""

    OPEN = "open"


OPEN = _Open.OPEN
# A level at an end of the interval is meant to be there, whatever its last digits.
_ROUNDING = 1e-6
Condition = Any  # what `Conditions.checked` returns, None for no condition, or `OPEN`


@dataclass(frozen=True)
class Conditioning:
    """The terms of `Denoiser.given`.

    Attributes:
        conditions: those that there are, and "none".
        drops: whether it was trained with dropped labels, and so can do without a condition.
        condition: one for all samples, one each (N, ...), None without any, or `OPEN`.
        guidance: w; 1 asks with the condition alone.
        interval: noise levels sigma / alpha at which w holds, the first excluded; 1 elsewhere.
        rescale: share of the guided answer that is rescaled, 0 to 1.
    """

    conditions: Conditions
    drops: bool = False
    condition: Condition = OPEN
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("guidance", "rescale"):
            if isinstance(getattr(self, name), bool) or not isinstance(
                getattr(self, name), int | float
            ):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}.")
        if not isinstance(self.interval, Sequence) or isinstance(self.interval, str):
            raise TypeError(f"interval must be two noise levels, got {self.interval!r}.")
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise ValueError(f"guidance must be a finite number >= 0, got {self.guidance}.")
        if not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise ValueError(
                "interval must be two noise levels sigma / alpha, 0 <= low < high, got "
                f"{tuple(self.interval)}."
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1], got {self.rescale}.")
        if not self.drops and (self.guidance != 1 or self.condition is None):
            raise ValueError(
                "This network was trained without dropped labels: it cannot do without a "
                "condition, which guidance and sampling without one need. Clone it with "
                "label_dropout=0.1."
            )

    def under(self, condition: Condition) -> Conditioning:
        """Return the same terms with a condition that is known to be right."""
        return replace(self, condition=condition)

    def on(self, device: torch.device) -> Conditioning:
        """Return the terms with their condition on a device."""
        condition = self.condition
        return self.under(condition.to(device)) if isinstance(condition, Tensor) else self

    def checked(self, condition: Any) -> Condition:
        """Return a condition as it is kept, after a look at it; see `Conditions.checked`."""
        if condition is None or condition is OPEN:
            return condition
        return self.conditions.checked(condition)

    def at(self, rows: slice | Tensor) -> Conditioning:
        """Return the terms for some of the samples."""
        return self.under(self.condition[rows]) if self._is_each else self

    def rows(self, n: int, device: torch.device) -> Tensor:
        """Return the conditions (n, ...) of n samples.

        Raises:
            ValueError: no condition is known, or those of another number of samples.
        """
        if self.condition is OPEN:
            raise ValueError(
                "This denoiser is conditional: say under which condition it is asked, "
                "denoiser.given(condition), or act in a conditional environment."
            )
        if self.condition is None:
            return self.conditions.none(n, device)
        return self.conditions.rows(self.condition, n, device)

    def evaluations(self, level: float) -> int:
        """Return how many network evaluations an answer costs at a noise level sigma / alpha."""
        return 1 if self._weight(level) == 1 else 2

    def _weight(self, level: float) -> float:
        low, high = (end * (1 + _ROUNDING) for end in self.interval)
        return self.guidance if self.condition is not None and low < level <= high else 1.0

    def answer(
        self, ask: Ask, sample: Tensor, time: Tensor, level: Callable[[], float | Tensor]
    ) -> Tensor:
        """Return the network's answer (N, *shape), guided.

        Args:
            ask: (samples, network times, conditions) -> raw answers.
            sample: what the network reads (N, *shape).
            time: its own times (N,).
            level: returns sigma / alpha, a number or (N,).
        """
        given = self.rows(len(sample), sample.device)
        if self.guidance == 1 or self.condition is None:
            return ask(sample, time, given)
        at = level() if self.interval != (0.0, math.inf) else 1.0
        if not isinstance(at, Tensor):
            weight: float | Tensor = self._weight(at)
            if weight == 1:
                return ask(sample, time, given)
        else:
            low, high = (end * (1 + _ROUNDING) for end in self.interval)
            inside = (at > low) & (at <= high)
            weight = torch.where(inside, self.guidance, 1.0).to(sample)
            weight = weight.view(-1, *[1] * (sample.ndim - 1))
        none = self.conditions.none(len(sample), sample.device)
        # One time for all stays one of stride 0, which the network embeds once.
        shared = time.ndim == 1 and time.stride(0) == 0 and len(time) > 0
        times = time[:1].expand(2 * len(time)) if shared else torch.cat([time, time])
        both = ask(torch.cat([sample, sample]), times, torch.cat([given, none]))
        with_it, without = both.chunk(2)
        guided = torch.lerp(without, with_it, weight)
        if self.rescale:
            axes = tuple(range(1, guided.ndim))
            kept, now = (one.std(axes, correction=0, keepdim=True) for one in (with_it, guided))
            factor = torch.where(now > 0, kept / now, 1.0)
            guided = guided * (self.rescale * factor + 1 - self.rescale)
        return guided

    @property
    def _is_each(self) -> bool:
        """Whether each sample has a condition of its own."""
        condition = self.condition
        return isinstance(condition, Tensor) and condition.ndim > len(self.conditions.shape)

    def to_config(self) -> dict[str, Any]:
        """Return the terms as a file keeps them; conditions of single samples are not kept."""
        condition = self.condition
        if condition is OPEN or self._is_each:
            condition = OPEN.value
        elif condition is not None:
            condition = self.conditions.plain(condition)
        return {
            **condition_config(self.conditions),
            "drops": self.drops,
            "condition": condition,
            "guidance": self.guidance,
            "interval": [end if math.isfinite(end) else None for end in self.interval],
            "rescale": self.rescale,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Conditioning:
        """Rebuild the terms of `to_config`."""
        low, high = config["interval"]
        condition = config["condition"]
        conditions = as_conditions(config.get("conditions"), config.get("classes"))
        if conditions is None:
            raise ValueError("its terms name no conditions")
        if condition == OPEN.value:
            condition = OPEN
        elif condition is not None:
            condition = conditions.from_plain(condition)
        return cls(
            conditions,
            bool(config["drops"]),
            condition,
            config["guidance"],
            (low, math.inf if high is None else high),
            config["rescale"],
        )
