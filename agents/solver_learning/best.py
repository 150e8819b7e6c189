"""The best network of a training that is judged on held-out noise, beside the one in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.optimisation import Averaged, Snapshot
from ..denoisers.denoiser import Denoiser
from ..selection import is_better


class BestNetwork:
    """The network that there was before, or an average on the way that errs less, not by chance.

    Args:
        averaged: the network in training, and the average of its weights, which is judged.
        by_lead: see `is_better`.

    Attributes:
        improved: whether the best one is not the one that there was before.
    """

    def __init__(self, averaged: Averaged[Denoiser], by_lead: bool = True) -> None:
        self._best, self._by_lead = Snapshot(averaged.module.body, averaged.live.body), by_lead
        self._errors: Tensor | None = None
        self.improved = False

    @property
    def begun(self) -> bool:
        """Whether there is a network to compare with."""
        return self._best.weights is not None

    def begin(self, errors: Tensor) -> None:
        """Begin with the network as it is, and its errors (N,) on held-out noise."""
        self._keep(errors)
        self.improved = False

    def judge(self, errors: Tensor) -> None:
        """Compare the averaged network, which has these errors (N,), with the best one."""
        assert self._errors is not None
        if is_better(errors, self._errors, self._by_lead):
            self._keep(errors)
            self.improved = True

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the best network; the optimizer forgets what belongs to another one."""
        self._best.give_back(optimizer)
        self._best.weights = self._errors = None

    def state(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {
            "best": self._best.weights,
            "best_errors": self._errors,
            "improved": self.improved,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._best.load(state["best"])
        self._errors, self.improved = state["best_errors"], state["improved"]

    def _keep(self, errors: Tensor) -> None:
        self._best.take()
        self._errors = errors
