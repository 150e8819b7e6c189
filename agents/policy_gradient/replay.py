"""Replay: the fakes of earlier rounds, for a critic that would forget them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Replay:
    """The last finished samples that a critic has seen, and their conditions.

    A critic that takes many steps on the newest samples alone forgets what was wrong with earlier
    ones, and the sampler and the critic circle each other (Shrivastava et al. 2017). Several
    processes keep samples of their own.

    Args:
        capacity: how many samples are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.samples: Tensor | None = None
        self.conditions: Tensor | None = None

    def add(self, samples: Tensor, conditions: Tensor | None) -> None:
        """Keep samples (n, *shape), and their conditions (n, ...) if there are any."""
        self.samples = self._last(self.samples, samples)
        if conditions is not None:
            self.conditions = self._last(self.conditions, conditions)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw n of the samples, with replacement, and their conditions."""
        assert self.samples is not None, "Nothing was added."
        kept = self.samples
        rows = torch.randint(len(kept), (n,), generator=generator, device=kept.device)
        return kept[rows], None if self.conditions is None else self.conditions[rows]

    def _last(self, before: Tensor | None, new: Tensor) -> Tensor:
        together = new if before is None else torch.cat([before, new])
        return together[-self.capacity :].clone()

    def state(self) -> dict[str, Any]:
        """Return what is kept, by name."""
        kept = {"samples": self.samples, "conditions": self.conditions}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned, on a device."""
        moved = {name: tensor.to(device) for name, tensor in state.items()}
        self.samples, self.conditions = moved.get("samples"), moved.get("conditions")
