"""Which round comes next, and how many network calls the rounds to come make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Position(NamedTuple):
    """Alternations done, and updates of the levels and of the denoiser in the present one."""

    alternation: int
    updates: int
    tuned: int


@dataclass(frozen=True)
class Plan:
    """All rounds, if none is cut short: the levels' updates, then the denoiser's, and again.

    Calls are counted on single samples.

    Attributes:
        alternations: how often the two stages are done.
        level_rounds: updates of the levels a stage.
        tuning_rounds: updates of the denoiser a stage.
        pool_calls: of the teacher, before the first round.
        programme_calls: of the dynamic programme, before the levels' first update.
        programme_again: whether later alternations begin with it too.
        level_calls: of an update of the levels.
        tuning_calls: of an update of the denoiser.
    """

    alternations: int
    level_rounds: int
    tuning_rounds: int
    pool_calls: int
    programme_calls: int
    programme_again: bool
    level_calls: int
    tuning_calls: int

    @property
    def rounds(self) -> int:
        """Rounds of all alternations."""
        return self.alternations * (self.level_rounds + self.tuning_rounds)

    def begins_with_programme(self, alternation: int) -> bool:
        """Whether this alternation does."""
        return alternation == 0 or self.programme_again

    def calls(self, position: Position, count: int, first: bool) -> int:
        """Count the calls of so many rounds.

        Args:
            position: what is done before them.
            count: how many rounds.
            first: whether the first of them is the first of all, which makes the pool.
        """
        total = self.pool_calls if first and count else 0
        alternation, updates, tuned = position
        for _ in range(count):
            if updates < self.level_rounds:
                total += self.level_calls
                if updates == 0 and self.begins_with_programme(alternation):
                    total += self.programme_calls
                updates += 1
            else:
                total += self.tuning_calls
                tuned += 1
            if updates == self.level_rounds and tuned >= self.tuning_rounds:
                alternation, updates, tuned = alternation + 1, 0, 0
        return total
