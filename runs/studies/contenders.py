"""Contenders on equal terms: a grid of chains of stages, each scored alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

from ...agents.samplers.sampling import evaluations_of
from ...common.shapes import is_vector
from ..reports.console import console
from ..run.threads import threads
from ..settings.benchmark import BenchmarkSettings
from .engine import Cell, Record
from .stages import Stage, check_calls, run_chain
from .tables import BEFORE, FLOOR
from .world import Scoring, World

# The same world while cells ask for the same.
_world = lru_cache(maxsize=1)(World)
PLAIN = Scoring()


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

    def run(
        self, env: str, seed: int, calls: int, scoring: Scoring, settings: BenchmarkSettings
    ) -> Record:
        """Run the chain and score what it ends in."""
        world = _world(env, seed, scoring, settings)
        with threads(settings.threads or (1 if is_vector(world.target.shape) else None)):
            sampler = run_chain(self.stages, world, calls)
            assert sampler.tableau is not None, "A chain chooses a solver."
            origin = sampler.origin, sampler.pretrained
            scores: Record = world.score(*origin, sampler.tableau, sampler.denoiser)
            if sampler.before is not None and scoring.before:
                before = world.score(*origin, *sampler.before)
                scores |= {name + BEFORE: value for name, value in before.items()}
        if scoring.samples:
            metrics = world.evaluation.metrics
            scores |= {metric.name + FLOOR: metric.floor for metric in metrics}
            scores["higher_is_better"] = [m.name for m in metrics if m.higher_is_better]
        where = {"env": env, "process": repr(sampler.denoiser.process), "solver": self.solver}
        who = {"contender": self.label, "calls": sampler.tableau.nfe, "seed": seed}
        if sampler.denoiser.conditions is not None:
            who["evaluations"] = evaluations_of(sampler.tableau, sampler.denoiser)
        return {**where, **who, **scores, "seconds": 0.0, **sampler.facts}


@dataclass(frozen=True)
class Grid:
    """The cells of a study: environment x seed x contender x network calls; flags win."""

    envs: tuple[str, ...]
    contenders: tuple[Contender, ...]
    calls: tuple[int, ...] = (10,)
    seeds: tuple[int, ...] = (0,)
    scoring: Scoring = PLAIN

    def __call__(self, settings: BenchmarkSettings) -> list[Cell]:
        """Return the cells, without contenders that cannot spend the calls of the command's flags.

        Raises:
            ValueError: no contender can, or a size of images that are not resized.
        """
        if settings.image_size and "ImageFolder" not in self.envs:
            raise ValueError(
                f"--image-size is for studies on ImageFolder; the size of {self.envs[0]} is fixed."
            )
        cells, left_out = [], dict[str, str]()
        for env in self.envs:
            for seed in settings.seeds or self.seeds:
                for each in self.contenders:
                    for calls in each.calls or settings.steps or self.calls:
                        if env in (each.envs or self.envs):
                            if settings.steps and (why := _refusal(each, env, calls)):
                                left_out[f"{each.label} with {calls}"] = why
                                continue
                            data = settings.data_of(env)
                            parts = [data, each.solver, each.label, f"{calls}", f"seed{seed}"]
                            parts += [f"rounds{settings.rounds}"] if settings.rounds else []
                            run = partial(each.run, env, seed, calls, self.scoring, settings)
                            cells.append(Cell("__".join(_slug(p) for p in parts if p), run))
        if left_out and not cells:
            raise ValueError(next(iter(left_out.values())))
        for who, why in left_out.items():
            console.print(f"Left out: {who} calls. {why}")
        return cells


def _refusal(contender: Contender, env: str, calls: int) -> str | None:
    """Return why a contender cannot spend the calls; None if it can, or has calls of its own."""
    if contender.calls:
        return None
    try:
        check_calls(contender.stages, env, calls)
    except ValueError as error:
        return str(error)
    return None


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "+" else " " for c in text).lower().split())
