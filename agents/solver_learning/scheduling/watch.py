"""What stage one remembers of the levels' parameters on its way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The samples' variance has collapsed when it stays low for so many updates: a first large step may
# overshoot and come back.
PATIENCE = 5


@dataclass
class Watch:
    """The best parameters of a stage, and the last ones whose samples had not collapsed.

    Attributes:
        before: what there was before the stage.
        origin: where that came from, see `Descent.origin`.
        first: whether that is what the learner was given.
        found: what the stage was to start from.
        best: those of the least error on held-out noise.
        error: that error, the mean.
        sound: the last ones at which the samples' variance had not fallen.
        low: how many updates ago that was.
        first_ratio: the variance ratio that the stage began with.
    """

    before: Tensor
    origin: str
    first: bool
    found: Tensor
    best: Tensor
    error: float
    sound: Tensor
    low: int = 0
    first_ratio: float | None = None

    def compare(self, parameters: Tensor, error: float) -> None:
        """Remember parameters if their error is the least so far."""
        if error < self.error:
            self.best, self.error = parameters, error

    def collapses(self, parameters: Tensor, ratio: float, share: float) -> bool:
        """Note the samples' variance, and say whether it has stayed low.

        Args:
            parameters: of the levels that made the samples.
            ratio: the samples' variance over that of their targets.
            share: of what the ratio was at first, below which it is low.
        """
        if self.first_ratio is None:
            self.first_ratio = ratio
        # Samples that spread wider than their targets may well come together.
        if ratio >= share * min(self.first_ratio, 1.0):
            self.sound, self.low = parameters, 0
        else:
            self.low += 1
        return self.low >= PATIENCE
