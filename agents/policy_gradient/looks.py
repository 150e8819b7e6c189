"""Looks: which average of a training is returned, the last or one that was nearer to the data.

What a critic teaches may undo itself: the shares of the data's modes drift while single samples get
better, and a training that goes on can end farther from the data than it was on its way. Or it goes
too far: between the weights that were given and those that were learned lie samplers, too, and some
are nearer to the data than either (Wortsman et al. 2022, WiSE-FT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...common.optimisation import Averaged, Snapshot
from ..selection import is_better

GIVEN, EARLIER, LAST = "given", "earlier", "last"
# Two sets of noise and real samples: one is compared with on the way, the other in the end alone.
CHOOSING, CONFIRMING = 0, 1
# Parts of the way from the weights that were given that are tried in the end.
WAYS = (0.25, 0.5, 0.75)
# What `Looks.state` holds of what was found by comparing.
FOUND = ("given", "nearest", "least")
_RETURNED = {
    LAST: "the last average",
    EARLIER: "the average after round {}, from where on samples went away from the data",
    GIVEN: "the sampler as it was given, from where samples only went away from the data",
}


class Looks:
    """The nearest sampler so far, which replaces the last one only where that is farther for sure.

    The last average is returned unless the nearest one on the way was nearer by more than a
    standard error, and is so on noise and data that nothing was chosen by, too: the least of
    several measured distances is too small, and what this distance does not see gets better with
    time. In the end a part of the way from the weights that were given to those takes their place,
    by the same rule.

    Args:
        averaged: the sampler in training, and the average of its weights, which is looked at.
        distances: returns the shares of the averaged sampler's distance to data on one of the two
            sets, numbers whose mean it is, see `EnergyDistance.shares`.
        agree: returns the same answer on all processes that train together.

    Attributes:
        returned: "last", or "earlier", or "given", the sampler that there was before.
        errors: mean distances on the second set: of the sampler as it was "given", of the "last"
            one and of what is "returned"; the latter two when training is over.
        way: how far the returned weights are on the way from the given ones to those, 0 to 1.
        round: after how many rounds the nearest so far was looked at; None: it is the given one.
    """

    def __init__(
        self,
        averaged: Averaged[Any],
        distances: Callable[[int], Tensor],
        agree: Callable[[bool], bool],
    ) -> None:
        self._averaged, self._distances, self._agree = averaged, distances, agree
        self._given, self._nearest = self._snapshot(), self._snapshot()
        self._least: Tensor | None = None
        self.returned, self.way, self.errors = LAST, 1.0, dict[str, float]()
        self.round: int | None = None

    @property
    def begun(self) -> bool:
        """Whether there is a sampler to compare with."""
        return self._nearest.weights is not None

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why; empty where nothing was compared."""
        if not self.errors:
            return ""
        if "returned" not in self.errors:
            return "Training is not over; nothing was chosen yet."
        what = _RETURNED[self.returned].format(self.round)
        if self.way < 1:
            what = f"{100 * self.way:g} % of the way from the given weights to {what}"
        returned, given, last = (f"{self.errors[name]:.2e}" for name in ("returned", GIVEN, LAST))
        of_last = "" if self.returned == LAST and self.way == 1 else f", of the last average {last}"
        return f"Returned: {what}. Energy distance: {returned}, of what was given {given}{of_last}."

    def begin(self) -> None:
        """Remember the sampler as it was given, before it moves."""
        self.returned, self.way, self.errors, self.round = LAST, 1.0, {}, None
        self._given.take()
        self._nearest.take()

    def look(self, rounds: int) -> Tensor:
        """Look at the averaged sampler after so many rounds; return its shares."""
        if self._least is None:  # the first time at the given one, too
            self._least = self._of_nearest(CHOOSING)
            self.errors[GIVEN] = float(self._of_nearest(CONFIRMING).mean())
        now = self._distances(CHOOSING)
        if self._agree(float(now.mean()) < float(self._least.mean())):
            self._nearest.take()
            self._least, self.round = now, rounds
        return now

    def finish(self, now: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Take the nearest sampler in the place of the last one, where it is nearer for sure.

        Args:
            now: what the last `look` returned.
            optimizer: it forgets what belongs to weights that are replaced.
        """
        last = self._distances(CONFIRMING)
        self.errors |= {LAST: float(last.mean()), "returned": float(last.mean())}
        assert self._least is not None
        kept = now, last
        if self._agree(is_better(self._least, now, by_lead=False)):
            nearest = self._of_nearest(CONFIRMING)
            if self._agree(is_better(nearest, last, by_lead=False)):
                self._nearest.give_back(optimizer)
                self.returned = GIVEN if self.round is None else EARLIER
                kept = self._least, nearest
        if self.returned != GIVEN and self._given.weights is not None:
            kept = self._go_a_part(*kept, optimizer)
        self.errors["returned"] = float(kept[CONFIRMING].mean())
        self._given.weights = self._nearest.weights = self._least = None

    def _go_a_part(
        self, chosen: Tensor, confirmed: Tensor, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor]:
        """Take a part of the way from the given weights, where that is nearer for sure.

        Args:
            chosen: shares of the end of the way, on the first set.
            confirmed: on the second.
            optimizer: see `finish`.

        Returns:
            Those of what is returned.
        """
        end = self._snapshot()
        end.take()
        part, way, least = end, 1.0, chosen
        try:
            for each in WAYS:
                tried = self._given.between(end, each)
                tried.show()
                shares = self._distances(CHOOSING)
                if self._agree(float(shares.mean()) < float(least.mean())):
                    part, way, least = tried, each, shares
            if way == 1 or not self._agree(is_better(least, chosen, by_lead=False)):
                return chosen, confirmed
            part.show()
            shares = self._distances(CONFIRMING)
            if not self._agree(is_better(shares, confirmed, by_lead=False)):
                return chosen, confirmed
        finally:
            end.show()
        part.give_back(optimizer)
        self.way = way
        return least, shares

    def state(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {
            "given": self._given.weights,
            "nearest": self._nearest.weights,
            "least": self._least,
            "round": self.round,
            "returned": self.returned,
            "way": self.way,
            "errors": self.errors,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        # Older files have all of the way only.
        self._given.load(state.get("given"))
        self._nearest.load(state["nearest"])
        self._least, self.round = state["least"], state["round"]
        self.returned, self.way = state["returned"], state.get("way", 1.0)
        self.errors = dict(state["errors"])

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._averaged.module, self._averaged.live)

    def _of_nearest(self, part: int) -> Tensor:
        """Return the shares of the nearest sampler; the averaged one is as it was again."""
        now = self._snapshot()
        now.take()
        try:
            self._nearest.show()
            return self._distances(part)
        finally:
            now.show()
