"""Contenders on equal terms: a grid of chains of stages, each scored alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...critics.shapes import is_vector
from ..threads import threads
from .engine import Cell, Options, Record
from .stages import Stage, run_chain
from .tables import BEFORE, FLOOR
from .world import Scoring, world_of


@dataclass(frozen=True)
class Contender:
    """One way to a few-step sampler.

    Attributes:
        label: its name in the table and the plot.
        stages: the chain.
        solver: name of the solver that it starts from, where that tells contenders apart.
        envs: environments, if not all of the study's.
        calls: network calls, if not the study's.
    """

    label: str
    stages: tuple[Stage, ...]
    solver: str = ""
    envs: tuple[str, ...] | None = None
    calls: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Grid:
    """The cells of a study: environment x seed x contender x network calls."""

    envs: tuple[str, ...]
    contenders: tuple[Contender, ...]
    calls: tuple[int, ...] = (10,)
    seeds: tuple[int, ...] = (0,)
    scoring: Scoring = Scoring()

    def __call__(self, options: Options, folder: Path) -> list[Cell]:
        """Return the cells; the options' seeds and calls win."""
        return [
            self._cell(env, seed, contender, calls, options, folder)
            for env in self.envs
            for seed in options.seeds or self.seeds
            for contender in self.contenders
            if env in (contender.envs or self.envs)
            for calls in contender.calls or options.steps or self.calls
        ]

    def _cell(
        self,
        env: str,
        seed: int,
        contender: Contender,
        calls: int,
        options: Options,
        folder: Path,
    ) -> Cell:
        parts = [env, contender.solver, contender.label, str(calls), f"seed{seed}"]
        parts += [f"rounds{options.rounds}"] if options.rounds else []
        key = "__".join("-".join(_words(part)) for part in parts if part)
        run = partial(run_contender, contender, env, seed, calls, self.scoring, options, folder)
        return Cell(key, run)


def run_contender(
    contender: Contender,
    env: str,
    seed: int,
    calls: int,
    scoring: Scoring,
    options: Options,
    folder: Path,
) -> Record:
    """Run a contender's chain and score what it ends in; return the record."""
    world = world_of(env, seed, scoring, options)
    world.calls = calls
    with threads(options.threads or (1 if is_vector(world.target.shape) else None)):
        sampler = run_chain(contender.stages, world, folder.parent / "denoisers", folder / "stages")
        assert sampler.tableau is not None, "A chain has a Sample stage."
        origin = sampler.origin, sampler.pretrained
        scores = world.score(*origin, sampler.tableau, sampler.denoiser)
        if sampler.before is not None and scoring.before:
            before = world.score(*origin, *sampler.before)
            scores |= {name + BEFORE: value for name, value in before.items()}
    return {
        "env": env,
        "process": repr(sampler.denoiser.process),
        "solver": contender.solver,
        "contender": contender.label,
        "calls": sampler.tableau.nfe,
        "seed": seed,
        **scores,
        **{name + FLOOR: value for name, value in world.floors.items()},
        "higher_is_better": world.higher_is_better,
        "seconds": 0.0,
        **sampler.facts,
    }


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "+" else " " for c in text).lower().split()
