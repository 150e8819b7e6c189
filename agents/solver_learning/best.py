"""The best network of a training that is judged on held-out noise, beside the one in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.optimisation import Averaged
from ..denoisers.denoiser import Denoiser
from .selection import is_better


class BestNetwork:
    """The network that there was before, or an average on the way that errs less, not by chance.

    Args:
        averaged: the network in training, and the average of its weights, which is judged.
        by_lead: see `is_better`.

    Attributes:
        improved: whether the best one is not the one that there was before.
    """

    def __init__(self, averaged: Averaged[Denoiser], by_lead: bool = True) -> None:
        self._averaged, self._by_lead = averaged, by_lead
        self._weights: dict[str, Tensor] | None = None
        self._errors: Tensor | None = None
        self.improved = False

    @property
    def begun(self) -> bool:
        """Whether there is a network to compare with."""
        return self._weights is not None

    def begin(self, errors: Tensor) -> None:
        """Begin with the network as it is, and its errors (N,) on held-out noise."""
        self._weights, self._errors, self.improved = self._copy(), errors, False

    def judge(self, errors: Tensor) -> None:
        """Compare the averaged network, which has these errors (N,), with the best one."""
        assert self._errors is not None
        if is_better(errors, self._errors, self._by_lead):
            self._weights, self._errors, self.improved = self._copy(), errors, True

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the best network; the optimizer forgets what belongs to another one."""
        assert self._weights is not None
        if any(not torch.equal(w, self._weights[name]) for name, w in self._copy().items()):
            self._averaged.module.body.load_state_dict(self._weights)
            self._averaged.live.body.load_state_dict(self._weights)
            # What it remembers belongs to other weights, and may not be finite.
            optimizer.state.clear()
        self._weights = self._errors = None

    def state(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {"best": self._weights, "best_errors": self._errors, "improved": self.improved}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        best = state["best"]
        if best is not None:  # a file's tensors are on the CPU
            best = {name: best[name].to(mine.device) for name, mine in self._copy().items()}
        self._weights, self._errors = best, state["best_errors"]
        self.improved = state["improved"]

    def _copy(self) -> dict[str, Tensor]:
        """Return a copy of the averaged network's weights."""
        return {name: w.clone() for name, w in self._averaged.module.body.state_dict().items()}
