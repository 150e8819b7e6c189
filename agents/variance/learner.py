"""VarianceLearner: what the two ways to learn a variance have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...envs import DiffusionMDP
from ..denoisers.denoiser import Denoiser
from .held_out import Noised
from .settings import VarianceSettings

GIVEN, LEARNED = "given", "learned"


class VarianceLearner(ABC):
    """Learn what a denoiser leaves open of the variance, and keep what is better.

    Args:
        mdp: gives the process.
        denoiser: gets what is learned; its body stays as it is.
        settings: of the agent.

    Attributes:
        learned: what it is called.
        returned: whether the denoiser has what was "given" or what is "learned".
    """

    learned: ClassVar[str]

    def __init__(self, mdp: DiffusionMDP, denoiser: Denoiser, settings: VarianceSettings) -> None:
        self.mdp, self.denoiser, self.settings = mdp, denoiser, settings
        self.returned = GIVEN

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Rounds that the settings call for."""

    @property
    def complete(self) -> bool:
        """Whether there is nothing more to learn."""
        return False

    def judges_after(self, rounds: int) -> bool:
        """Whether to compare after so many rounds, besides at the end."""
        return False

    @abstractmethod
    def learn(
        self,
        clean: Tensor,
        noise: Tensor,
        generator: torch.Generator,
        progress: float,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Learn from a batch.

        Args:
            clean: (N, *shape) real samples.
            noise: (N, *shape) standard normal.
            generator: source of times.
            progress: fraction of the training done, 0 to 1.
            condition: the conditions (N, ...) of the samples, in a conditional environment.

        Returns:
            What to log.
        """

    @property
    @abstractmethod
    def held_out(self) -> int:
        """How many samples to choose by, and as many to report on."""

    @abstractmethod
    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw times (n,) for them."""

    @abstractmethod
    def losses(self, samples: Noised) -> dict[str, Tensor]:
        """Return the losses (N,) of what is "given", "learned" and "returned"."""

    @abstractmethod
    def choose(self, losses: dict[str, Tensor]) -> None:
        """Keep what was learned, if it is better than what is kept."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what training changed, but for `returned`."""

    @abstractmethod
    def load_state(self, state: dict[str, Any], returned: str) -> None:
        """Restore what `state` returned."""
