"""A contender is a chain of stages: clone a denoiser, choose a solver, let agents learn.

Each stage takes a sampler and returns another, so any chain can be ranked against any other. What
a stage trains is kept in a folder that is named after the chain so far: chains that begin alike
share it, and a chain that was stopped goes on from its last checkpoint.

All that studies ask of agents stands in this file.
"""

from __future__ import annotations

import copy
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from ...agents import AGENTS, Denoiser, Tableau
from ...agents.base import Agent
from ...agents.denoisers.bodies import new_denoiser
from ...agents.denoisers.exact import mixture
from ...agents.presets import preset
from ...agents.solvers import SOLVERS, default_schedule, make_solver, solver_within
from ...common.conditions import Conditional, kind_of
from ...envs import Schedule, make_schedule
from ...envs.processes import NoiseProcess, make_process
from ...envs.registration import ENVIRONMENTS
from ..run.folder import read_record, write_json
from ..run.logs import make_logger, read_live_metric
from ..run.monitor import Monitor
from ..settings.train import CLONER
from .engine import Record, locked
from .timeline import Timeline, joined
from .world import LONG, MIXTURE, World

# Written when a stage is finished: what the record says of it.
DONE = "done.json"
Options = dict[str, Any]


@dataclass(frozen=True)
class Sampler:
    """What one stage hands to the next.

    Attributes:
        denoiser: the network.
        pretrained: the cloned network that the chain began with.
        origin: name of that network.
        schedule: the times; None before a solver is chosen.
        tableau: the table; likewise.
        solver: the solver's name and options.
        before: table and network before the first agent learned; None if none did.
        facts: what the record says of the learning.
    """

    denoiser: Denoiser
    pretrained: Denoiser
    origin: str
    schedule: Schedule | None = None
    tableau: Tableau | None = None
    solver: tuple[str, Options] = ("ancestral", {})
    before: tuple[Tableau, Denoiser] | None = None
    facts: Record = field(default_factory=dict)


@dataclass(frozen=True)
class Clone:
    """Clone a denoiser, or find it cloned; studies share them.

    Attributes:
        process: name for `make_process`; the environment's own if None.
        noisings: of the environment's own process; as many as network calls if None.
        seed: one that all cells share; each cell's own if None.
        rounds: of cloning, if not the preset's.
        body: the network, if not the environment's; see `fewstep train --help`.
        body_options: of that network.
        settings: of the cloning agent that differ from the preset's.
        conditional: whether it learns the classes of the data, or which conditions, see `Guide`.
    """

    process: str | None = None
    noisings: int | None = None
    seed: int | None = None
    rounds: int | None = None
    body: str | None = None
    body_options: Options | None = None
    settings: Options = field(default_factory=dict)
    conditional: Conditional = False

    def __call__(self, world: World, calls: int) -> Sampler:
        """Clone; `MIXTURE` has an exact denoiser instead."""
        seed = world.seed if self.seed is None else self.seed
        process = self.process_of(world.env, calls)
        if world.env == MIXTURE:
            predicts = "sample" if process.grid == "karras" else "epsilon"
            exact = mixture(process, prediction=predicts, seed=seed)[0].to(world.target.device)
            return Sampler(exact, exact, repr(process))
        budget = preset(world.env, CLONER)
        rounds = world.settings.rounds or self.rounds or budget.agent["rounds"]
        body = self.body or budget.body
        what: tuple[object, ...] = (process.to_config(), body, self.body_options, rounds)
        if kind := kind_of(self.conditional):
            # As folders were named before there were other conditions than classes.
            what += ("conditional" if kind == "classes" else kind,)
        what += (self.settings,) if self.settings else ()
        name = _name(world.settings.data_of(world.env), "clone", seed, what)
        folder = world.settings.folder.parent / "denoisers" / name
        mdp = world.mdp(process, conditional=self.conditional)
        new = new_denoiser(mdp, seed, budget.prediction, body, self.body_options)
        agent = AGENTS[CLONER].for_environment(mdp, new, seed=seed, rounds=rounds, **self.settings)
        _train(agent, folder)
        denoiser = Denoiser.load(folder / agent.checkpoint_name, world.target.device)
        return Sampler(denoiser, denoiser, folder.name)

    def process_of(self, env: str, calls: int) -> NoiseProcess:
        """Return the process of what is cloned."""
        if self.process is not None:
            return make_process(self.process)
        if env == MIXTURE:
            return make_process(f"linear-{LONG}")
        return ENVIRONMENTS[env].process(self.noisings or calls)


# The network of images of 28 x 28, 277,000 weights: minutes of a CPU where others take hours.
SMALL_UNET: Options = {"body": "small-unet", "body_options": {"width": 16, "levels": 3}}
# Of a few thousand small pictures in colour: half an hour of a CPU.
COLOUR_UNET: Options = {
    "body": "small-unet",
    "body_options": {"width": 24, "levels": 3},
    "rounds": 3000,
    "settings": {"learning_rate": 1e-3, "lr_schedule": "cosine", "ema": 0.999},
}


@dataclass(frozen=True)
class Guide:
    """Ask a conditional denoiser with guidance from here on; the ODE of reference is guided, too.

    Attributes:
        guidance: see `Denoiser.given`.
        interval: likewise; None is all noise levels.
    """

    guidance: float
    interval: tuple[float, float] | None = None

    def __call__(self, sampler: Sampler) -> Sampler:
        """Take the view."""
        view = sampler.denoiser.given(guidance=self.guidance, interval=self.interval)
        return replace(sampler, denoiser=view, pretrained=view, origin=f"{sampler.origin} {self}")


@dataclass(frozen=True)
class Sample:
    """Choose a solver and its times, for the cell's network calls.

    Attributes:
        solver: key of `SOLVERS`.
        options: of the solver.
        schedule: name of the schedule; if None the times that were learned before, or else the
            solver's default ones.
        schedule_options: of the schedule.
    """

    solver: str
    options: Options = field(default_factory=dict)
    schedule: str | None = None
    schedule_options: Options = field(default_factory=dict)

    def __call__(self, sampler: Sampler, calls: int) -> Sampler:
        """Build the table."""
        times, solver = sampler.schedule, (self.solver, self.options)
        if self.schedule is None and times is not None:
            tableau = make_solver(self.solver, times, sampler.denoiser, **self.options)
            return replace(sampler, tableau=tableau, solver=solver)
        process = sampler.denoiser.process
        times, tableau = self.spend(process, calls, sampler.denoiser)
        return replace(sampler, schedule=times, tableau=tableau, solver=solver)

    def spend(
        self, process: NoiseProcess, calls: int, denoiser: Denoiser | None = None
    ) -> tuple[Schedule, Tableau]:
        """Return the times and the table that cost the calls.

        Raises:
            ValueError: no number of steps does.
        """
        try:
            return self._spend(process, calls, denoiser)
        except ValueError:
            if self.schedule != "karras":
                raise
            # Heun's calls to time 0 are odd; an even budget ends at the smallest noise level.
            return self._spend(process, calls, denoiser, append_zero=False)

    def _spend(
        self, process: NoiseProcess, calls: int, denoiser: Denoiser | None, **more: Any
    ) -> tuple[Schedule, Tableau]:
        """Find the number of steps that costs the calls."""
        made: list[Schedule] = []

        def times(steps: int) -> Schedule:
            options = {**self.schedule_options, **more}
            if self.schedule is None:
                made.append(default_schedule(self.solver, process, steps))
            else:
                made.append(make_schedule(self.schedule, process, steps, **options))
            return made[-1]

        tableau = solver_within(self.solver, calls, times, denoiser, **self.options)
        return made[-1], tableau


@dataclass(frozen=True)
class Learn:
    """Let an agent learn on top of what there is.

    Attributes:
        agent: key of `AGENTS`.
        settings: that differ from the preset's.
        preset: where the budget and the other settings come from.
        seed_offset: added to the cell's seed.
        evaluations: of the live metric, for a learning curve; each costs samples.
    """

    agent: str
    settings: Options = field(default_factory=dict)
    preset: str = "default"
    seed_offset: int = 0
    evaluations: int = 0

    def __call__(self, sampler: Sampler, world: World, folder: Path) -> Sampler:
        """Train in a folder, or find it trained there."""
        agent = self._build(sampler, world)
        before = sampler.before or (agent.starting_tableau(sampler.denoiser), sampler.denoiser)
        timeline = None
        if world.scoring.timeline:
            timeline = Timeline(folder / "timeline.json", partial(_score, sampler, world))
        facts = _train(agent, folder, world, self.evaluations, timeline)
        if timeline is not None:
            facts["timeline"] = joined(sampler.facts.get("timeline", []), timeline.points)
        for name in ("seconds", "training calls"):
            facts[name] += sampler.facts.get(name, 0)
        # An averaged network records no gradient, which the next agent's may need.
        network = copy.deepcopy(agent.sampling_denoiser).requires_grad_(True)
        learned = replace(sampler, denoiser=network, facts=sampler.facts | facts)
        if sampler.schedule is None:  # of variances, say: a solver that needs them comes next
            return learned
        return replace(learned, schedule=agent.schedule, tableau=agent.tableau, before=before)

    def _build(self, sampler: Sampler, world: World) -> Agent:
        settings: dict[str, Any] = dict(self.settings)
        kind = AGENTS[self.agent]
        if quick := world.settings.rounds:
            # A stage that the study leaves out, with 0 rounds, stays out.
            settings |= {name: quick for name in kind.budgets if settings.get(name) != 0}
        if sampler.schedule is not None:
            settings["solver"], options = sampler.solver
            settings |= {"solver_options": dict(options)} if options else {}
        if kind.takes_tableau and sampler.tableau is not None:
            settings["tableau"] = sampler.tableau  # a learned one, perhaps
        if kind.takes_features:
            settings["features"] = world.features
        return kind.for_environment(
            world.mdp(
                sampler.denoiser.process, sampler.schedule, conditional=sampler.denoiser.waits_for
            ),
            copy.deepcopy(sampler.denoiser),
            preset=self.preset,
            seed=world.seed + self.seed_offset,
            **settings,
        )


Stage = Clone | Guide | Sample | Learn


def fine_tune(agent: str, evaluations: int = 20, preset: str = "default", **settings: Any) -> Learn:
    """Return the stage of an agent that trains against a critic, as `fewstep train` seeds it."""
    return Learn(agent, settings, preset, seed_offset=1, evaluations=evaluations)


def run_chain(stages: Sequence[Stage], world: World, calls: int) -> Sampler:
    """Run the stages, a `Clone` first, each on what the one before left."""
    first, *others = stages
    assert isinstance(first, Clone), "A chain begins with a denoiser."
    sampler = first(world, calls)
    done: list[object] = [sampler.origin, world.settings.rounds]
    for stage in others:
        done.append(stage)
        if isinstance(stage, Learn):
            name = _name(world.env, stage.agent, world.seed, *done)
            sampler = stage(sampler, world, world.settings.folder / "stages" / name)
        elif isinstance(stage, Guide):
            sampler = stage(sampler)
        elif isinstance(stage, Sample):
            done.append(calls)
            sampler = stage(sampler, calls)
    return sampler


def check_calls(stages: Sequence[Stage], env: str, calls: int) -> None:
    """Raise ValueError if the solver that a chain begins with cannot be asked so often."""
    first, *others = stages
    for stage in others:
        if isinstance(stage, Learn):
            return
        if isinstance(first, Clone) and isinstance(stage, Sample):
            # What reads a second head of the network can be built with the network alone.
            if SOLVERS[stage.solver].needs is None:
                stage.spend(first.process_of(env, calls), calls)
            return


def _score(sampler: Sampler, world: World, agent: Agent) -> dict[str, float]:
    """Score an agent that learns on top of a sampler."""
    return world.score(sampler.origin, sampler.pretrained, *agent.sampler)


def _train(
    agent: Agent,
    folder: Path,
    world: World | None = None,
    evaluations: int = 0,
    timeline: Timeline | None = None,
) -> Record:
    """Train an agent, from its checkpoint if there is one; Ctrl-C leaves one.

    Returns:
        What the record says of it.
    """
    checkpoint, began = folder / agent.checkpoint_name, time.monotonic()
    with locked(folder / "lock"):
        if checkpoint.is_file():
            agent.resume(checkpoint)
        if (folder / DONE).is_file():
            return read_record(folder / DONE)
        live = world.evaluation if world is not None and evaluations else None
        progress = ("progress.csv", agent.num_timesteps)
        logger = Logger(None, []) if live is None else make_logger(folder, agent.name, *progress)
        agent.set_logger(logger)
        with (
            warnings.catch_warnings(),
            Monitor(
                checkpoint,
                20,
                agent.budget,
                live,
                evaluations,
                on_save=(lambda: None) if timeline is None else timeline.save,
            ) as watch,
        ):
            # The record says what a warning would: what was returned, and how good it is.
            warnings.simplefilter("ignore", UserWarning)
            # The timeline's clock stops before the monitor's begins.
            callbacks: list[BaseCallback] = [watch] if timeline is None else [timeline, watch]
            agent.learn(callback=callbacks, reset_num_timesteps=False)
        logger.close()
        if watch.interrupted:
            raise KeyboardInterrupt
        seconds = time.monotonic() - began if timeline is None else timeline.seconds
        facts: Record = {"seconds": seconds, "training calls": agent.num_timesteps}
        told = agent.report().results.items()
        facts |= {name: value for name, value in told if isinstance(value, str | int | float)}
        if curve := read_live_metric(folder / "progress.csv"):
            facts["curve"] = curve
        write_json(folder / DONE, facts)
        return facts


def _name(env: str, what: str, seed: int, *parts: object) -> str:
    """Name a folder after all that decides what is in it."""
    return f"{env}__{what}__seed{seed}__{zlib.crc32(repr(parts).encode()):08x}"
