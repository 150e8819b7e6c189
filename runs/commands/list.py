"""`fewstep envs` and `fewstep agents`: what there is to choose from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from ...agents import AGENTS
from ...agents.solvers import SOLVERS
from ...envs.registration import ENVIRONMENTS
from ...envs.targets.images import IMAGE_SETS
from ...envs.targets.known import make_target
from ..reports.console import console
from ..settings.flags import parse_flags


def envs(argv: Sequence[str]) -> None:
    """List the environments."""
    parse_flags(_no_flags, argv, prog="fewstep envs", description=envs.__doc__)
    table = Table()
    for column in ("id", "sample", "training set", "noisings", "K"):
        table.add_column(column, no_wrap=True)
    for name, environment in ENVIRONMENTS.items():
        if environment.target in IMAGE_SETS:  # large, if at hand at all: not worth the reading
            shape: Sequence[int] = IMAGE_SETS[environment.target].shape
            count = "data files needed"
        else:
            target = make_target(environment.target)
            shape, count = target.shape, f"{len(target):,}"
        table.add_row(
            f"fewstep/{name}-v0",
            " x ".join(str(side) for side in shape),
            count,
            f"{environment.process(environment.steps).t_max:g}",
            str(environment.steps),
        )
    console.print(table)


def agents(argv: Sequence[str]) -> None:
    """List the agents and the solvers."""
    parse_flags(_no_flags, argv, prog="fewstep agents", description=agents.__doc__)
    console.print(_listed("agent", {name: _summary(agent) for name, agent in AGENTS.items()}))
    console.print(_listed("solver", {name: solver.summary for name, solver in SOLVERS.items()}))


def _no_flags() -> None:
    """Take no flags."""


def _summary(thing: Callable[..., Any]) -> str:
    return (inspect.getdoc(thing) or "").splitlines()[0]


def _listed(kind: str, summaries: Mapping[str, str]) -> Table:
    listing = Table(kind, "what it does")
    for row in summaries.items():
        listing.add_row(*row)
    return listing
