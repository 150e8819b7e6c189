"""A finished table that an agent is given, and the environment at its times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..common.arguments import check_value
from ..common.checkpoint import CheckpointError, load_checkpoint
from ..common.reading import damage_named
from ..envs import DiffusionMDP, Schedule
from .base import Agent
from .denoisers.denoiser import Denoiser
from .environments import Environment
from .samplers.tableau import Tableau


class TakesTable(Agent):
    """Base of the agents that may be given a finished table, to sample with or to start from.

    A subclass puts `table_state()` in its `state` under "tableau". Its files then hold the table,
    and `load` needs no other.

    Args:
        env: the environment.
        denoiser: the network.
        settings: see the agent's `Settings`; `table`, if it has that, names the file of a table.
        tableau: a finished table, such as one that a solver agent learned; it wins over
            `settings.solver`.
        arguments: `Agent`'s remaining arguments.

    Raises:
        ValueError: a tableau for an agent that has its own, or two different ones.
        FileNotFoundError: the file of the table is missing.
    """

    takes_tableau: ClassVar[bool] = True

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: Any = None,
        *,
        tableau: Tableau | None = None,
        **arguments: Any,
    ) -> None:
        if tableau is not None and not self.takes_tableau:
            raise ValueError(
                f"{type(self).__name__} chooses its sampler by solver=...: give no tableau."
            )
        check_value("tableau", tableau, Tableau | None)
        self._given_table = tableau
        super().__init__(env, denoiser, settings, **arguments)

    def starting_tableau(self, denoiser: Denoiser) -> Tableau:
        """Return the sampler before any training: the given table, or the solver's."""
        given, file = self._given_table, getattr(self.settings, "table", None)
        # A training that goes on brings its table; the file that it came from may be gone.
        if file is not None and (given is None or Path(file).is_file()):
            named = Tableau.load(file)
            if given is not None and named.to_json() != given.to_json():
                raise ValueError(
                    f"tableau='{given.name}' and table={file!r} are two different tables: give one "
                    "of them."
                )
            self._given_table = given = given or named
        return given or super().starting_tableau(denoiser)

    def tableau_on(self, schedule: Schedule) -> Tableau:
        """Return the solver on another schedule.

        Raises:
            ValueError: the sampler is a finished table, which belongs to its own times.
        """
        if self._given_table is None:
            return super().tableau_on(schedule)
        raise ValueError(
            f"'{self._given_table.name}' is a finished table, which carries over to no other times."
        )

    def table_state(self) -> str | None:
        """Return the given table as JSON; None if there is none."""
        return None if self._given_table is None else self._given_table.to_json()

    def _restore(self, tree: dict[str, Any], origin: str) -> None:
        """Refuse training with another table, which has other times, too; then take it over."""
        # Files of agents that took no table yet have none.
        if tree["state"].get("tableau", self.table_state()) != self.table_state():
            raise CheckpointError(
                f"{origin} was trained with another table than the agent has here: give the one "
                "that it was trained with."
            )
        super()._restore(tree, origin)

    @classmethod
    def given_tableau(cls, path: str | Path) -> Tableau | None:
        """See `Agent.given_tableau`.

        Raises:
            CheckpointError: a damaged file.
        """
        with damage_named(path, CheckpointError):
            table = load_checkpoint(path)["state"].get("tableau")
            return None if table is None else Tableau.from_json(table)

    @classmethod
    def _remembered(cls, state: Mapping[str, Any], denoiser: Denoiser) -> dict[str, Any]:
        """Return the table that a file's training had."""
        known, table = super()._remembered(state, denoiser), state.get("tableau")
        if table is None:
            return known
        # Where it came from may be gone, or another by now.
        named = {"table": None} if hasattr(cls.Settings, "table") else {}
        return {**known, **named, "tableau": Tableau.from_json(table)}


def on_times_of(mdp: DiffusionMDP, tableau: Tableau) -> DiffusionMDP:
    """Return the decision process on a table's times, of which some may repeat or rise (Heun's)."""
    times = sorted(set(tableau.times.tolist()), reverse=True)
    if times == mdp.schedule.times.tolist():
        return mdp
    return mdp.with_schedule(Schedule(mdp.process, times))


def on_clock_of(mdp: DiffusionMDP, tableau: Tableau) -> DiffusionMDP:
    """Return the decision process whose every step is a row of a table.

    Raises:
        ValueError: the table asks twice at one time.
    """
    if (tableau.times[1:] >= tableau.times[:-1]).any():
        raise ValueError(
            f"'{tableau.name}' asks the network twice at one time, and episodes go on in time: take"
            " a multistep solver such as dpm-solver++-3m, unipc-2 or ipndm."
        )
    return on_times_of(mdp, tableau)
