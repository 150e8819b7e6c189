"""SolverAgent: what the agents share whose teacher is a fine solver of the same network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ...common.arguments import checked
from ...envs import DiffusionMDP, Schedule, Target
from ...envs.mdp import no_reward
from ..base import Agent
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau

AnySolverAgent = TypeVar("AnySolverAgent", bound="SolverAgent")


# A teacher whose own error is more than this share of what is left of the student's misleads it.
_MISLEADS = 0.25


class SolverAgent(Agent):
    """Base of the agents that learn from a fine solver: a solver of few steps, or the network.

    Attributes:
        returned: what is returned: what was "given", or a name for what was learned.
        errors: mean squared errors per coordinate of finished samples, on noise that was neither
            learned on nor chosen by, by what they are of.
    """

    errors: dict[str, float]

    @classmethod
    @checked
    def without_data(
        cls: type[AnySolverAgent],
        denoiser: Denoiser,
        schedule: Schedule,
        shape: tuple[int, ...],
        **settings: Any,
    ) -> AnySolverAgent:
        """Learn for a pretrained network alone: what has a teacher needs noise, but no data.

        Args:
            denoiser: the network; its device is where everything is done.
            schedule: gives the number of steps and the ends, on the denoiser's process.
            shape: of one sample.
            settings: the constructor's keyword arguments.

        Raises:
            TypeError: an argument of another type.
            ValueError: a shape with a number below 1, or what the constructor raises.
        """
        if not all(size >= 1 for size in shape):
            raise ValueError(f"shape must have numbers of at least 1, got {shape}.")
        target = Target.without_samples(shape, next(denoiser.parameters()).device)
        mdp = DiffusionMDP(target, denoiser.process, schedule, no_reward)
        return cls(mdp, denoiser, **settings)


class TableAgent(SolverAgent):
    """Base of the agents that learn a table with times of its own.

    Attributes:
        base: the solver on the environment's schedule.
    """

    base: Tableau
    _table: Tableau

    @property
    def tableau(self) -> Tableau:
        """The sampler: the best table so far, or the one that was chosen in the end."""
        return self._table

    @property
    def learns_tableau(self) -> bool:
        """Training changes the table."""
        return True

    def tableau_on(self, schedule: Schedule) -> Tableau:
        """Return the base solver on another schedule, where it is what is returned.

        Raises:
            ValueError: a learned table belongs to its own times.
        """
        if self._table is self.base:
            return super().tableau_on(schedule)
        raise ValueError(
            f"This table was learned for {self._table.nfe} network calls at its own times; it "
            "carries over to no others."
        )


def comparison(errors: Mapping[str, float]) -> str:
    """Say how the error of what is returned compares with what was given, and the teacher's own."""
    found = (
        f"Mean squared error per coordinate: {errors['returned']:.2e}, of what was given "
        f"{errors['given']:.2e}."
    )
    teacher = errors.get("teacher", 0.0)
    if teacher <= _MISLEADS * errors["returned"]:
        return found
    return (
        f"{found} The teacher itself errs by {teacher:.2e}, so much of this is its error: take a "
        "larger scale."
    )
