"""`fewstep levels`: the noise levels of a table, for the samplers of other programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ...agents import Tableau
from ...agents.pretrained import pipeline_tableau, plain_grid
from ..reports.console import console
from ..run.folder import tableau_file
from ..settings.flags import parse_flags


@dataclasses.dataclass(frozen=True)
class LevelsSettings:
    """Print the noise levels that a table visits, for diffusers, ComfyUI and A1111."""

    table: Annotated[Path, tyro.conf.Positional]
    """The JSON file of a tableau, a run folder that holds one, or the folder of an exported
    pipeline or scheduler."""


def main(argv: Sequence[str]) -> None:
    """Run `fewstep levels` with these flags."""
    path = parse_flags(LevelsSettings, argv, prog="fewstep levels").table
    table = _table_of(path)
    grid = plain_grid(table)
    console.out(f"{table.name}: {table.nfe} network calls, at these noise levels")
    console.out(f"sigmas (ComfyUI, A1111): {_listed(grid.sigmas)}")
    if grid.timesteps is not None:
        console.out(f"diffusers, set_timesteps(timesteps=[{_listed(grid.timesteps)}])")
    if grid.before_shift is None:
        console.out(f"diffusers, set_timesteps(sigmas=[{_listed(grid.sigmas)}])")
    else:
        shift = f"with shift={table.process.to_config()['shift']:g}"
        console.out(f"diffusers {shift}, set_timesteps(sigmas=[{_listed(grid.before_shift)}])")


def _table_of(path: Path) -> Tableau:
    if path.is_dir():
        table = pipeline_tableau(path)
        if table is not None:
            return table
        file = tableau_file(path)
        if file is None:
            raise FileNotFoundError(f"{path} holds no tableau.json, and no exported scheduler.")
        path = file
    return Tableau.load(path)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
