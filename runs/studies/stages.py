"""A contender is a chain of stages: clone a denoiser, choose a solver, let agents learn.

Each stage takes a sampler and returns another, so any chain can be ranked against any other. What
a stage trains is kept in a folder that is named after the chain so far: chains that begin alike
share it, and a chain that was stopped goes on from its last checkpoint.

All that studies ask of agents and their settings stands in this file.
"""

from __future__ import annotations

import copy
import shutil
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from stable_baselines3.common.logger import Logger

from ...agents import AGENTS, BehaviorCloning, Denoiser, Tableau
from ...agents.base import Agent
from ...agents.bodies import new_denoiser
from ...agents.exact import mixture
from ...agents.presets import preset
from ...agents.solvers import default_schedule, make_solver, solver_within
from ...envs import DiffusionMDP, Schedule, Target, make_schedule
from ...envs.mdp import no_reward
from ...envs.process import NoiseProcess, make_process
from ...envs.registration import ENVIRONMENTS
from ..folder import read_record, write_json
from ..logs import make_logger, read_live_metric
from ..monitor import Monitor
from .engine import Record, locked
from .world import LONG, MIXTURE, World


@dataclass(frozen=True)
class Sampler:
    """What one stage hands to the next.

    Attributes:
        denoiser: the network.
        pretrained: the cloned network that the chain began with.
        origin: the name of that.
        schedule: the times; None before a solver is chosen.
        tableau: the table; likewise.
        solver: its solver's name and options.
        before: table and network before the first agent learned; None if none did.
        facts: what the record says of the learning.
    """

    denoiser: Denoiser
    pretrained: Denoiser
    origin: str
    schedule: Schedule | None = None
    tableau: Tableau | None = None
    solver: tuple[str, Mapping[str, Any]] = ("ancestral", {})
    before: tuple[Tableau, Denoiser] | None = None
    facts: Record = field(default_factory=dict)


class Stage(Protocol):
    """Something to do with a sampler; the folder is its own."""

    def __call__(self, sampler: Sampler | None, world: World, folder: Path) -> Sampler:
        """Return the sampler after this stage; only a chain's first stage is given none."""


def run_chain(stages: Sequence[Stage], world: World, denoisers: Path, folder: Path) -> Sampler:
    """Run the stages, one on what the other left.

    Args:
        stages: a `Clone` first.
        world: where.
        denoisers: folder of cloned denoisers, which studies share.
        folder: of everything else that is trained.
    """
    sampler = stages[0](None, world, denoisers)
    done: list[object] = [world.env, world.seed, world.rounds, stages[0]]
    for stage in stages[1:]:
        done.append(stage)
        if isinstance(stage, Sample):
            done.append(world.calls)
        name = f"{world.env}__{_label(stage)}__seed{world.seed}__{_digest(*done)}"
        sampler = stage(sampler, world, folder / name)
    return sampler


@dataclass(frozen=True)
class Clone:
    """Clone a denoiser, or find it cloned.

    Attributes:
        process: name for `make_process`; the environment's own if None, see `noisings`.
        noisings: of the environment's own process; as many as network calls if None.
        seed: one that all cells share; each cell's own if None.
        rounds: of cloning, if not the preset's.
        body: the network, if not the environment's; see `fewstep train --help`.
        body_options: of that network.
    """

    process: str | None = None
    noisings: int | None = None
    seed: int | None = None
    rounds: int | None = None
    body: str | None = None
    body_options: Mapping[str, Any] | None = None

    def __call__(self, sampler: Sampler | None, world: World, folder: Path) -> Sampler:
        """Clone; the environment `MIXTURE` has an exact denoiser instead."""
        seed = world.seed if self.seed is None else self.seed
        process = self._process(world)
        if world.env == MIXTURE:
            prediction = "sample" if process.grid == "karras" else "epsilon"
            exact = mixture(process, prediction=prediction, seed=seed)[0].to(world.target.device)
            return Sampler(exact, exact, repr(process))
        budget = preset(world.env, BehaviorCloning.name)
        rounds = world.rounds or self.rounds or budget.rounds
        what = _digest(process.to_config(), self.body, self.body_options, rounds)
        folder = folder / f"{world.env}__{_label(process)}__seed{seed}__{what}"
        mdp = mdp_of(world.target, process)
        body, options = self.body or budget.body, self.body_options
        with locked(folder / "lock"):
            if not (folder / "done.json").is_file():
                new = new_denoiser(mdp, seed, budget.prediction, body, options)
                agent = BehaviorCloning.for_environment(mdp, new, seed=seed)
                _train(agent, folder, rounds)
                agent.sampling_denoiser.save(folder / "denoiser.safetensors")
                _finish(folder, {})
        denoiser = Denoiser.load(folder / "denoiser.safetensors", world.target.device)
        return Sampler(denoiser, denoiser, folder.name)

    def _process(self, world: World) -> NoiseProcess:
        if self.process is not None or world.env == MIXTURE:
            return make_process(self.process or f"linear-{LONG}")
        return ENVIRONMENTS[world.env].process(self.noisings or world.calls)


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
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    schedule_options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, sampler: Sampler | None, world: World, folder: Path) -> Sampler:
        """Build the table."""
        assert sampler is not None
        denoiser, made = sampler.denoiser, sampler.schedule
        if self.schedule is None and made is not None:
            tableau = make_solver(self.solver, made, denoiser, **self.options)
        else:
            tableau, made = self._within(world, denoiser)
        return replace(sampler, schedule=made, tableau=tableau, solver=(self.solver, self.options))

    def _within(self, world: World, denoiser: Denoiser) -> tuple[Tableau, Schedule]:
        """Spend the calls; where the last step to time 0 makes them odd, end before it."""
        made: list[Schedule] = []

        def table(**more: Any) -> Tableau:
            def schedule(steps: int) -> Schedule:
                if self.schedule is None:
                    known = ENVIRONMENTS.get(world.env)
                    grid = known.schedule if known else None
                    one = default_schedule(self.solver, denoiser.process, steps, grid)
                else:
                    options = {**self.schedule_options, **more}
                    one = make_schedule(self.schedule, denoiser.process, steps, **options)
                made.append(one)
                return one

            return solver_within(self.solver, world.calls, schedule, denoiser, **self.options)

        try:
            tableau = table()
        except ValueError:
            if self.schedule != "karras":
                raise
            tableau = table(append_zero=False)
        return tableau, made[-1]


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
    settings: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "default"
    seed_offset: int = 0
    evaluations: int = 0

    def __call__(self, sampler: Sampler | None, world: World, folder: Path) -> Sampler:
        """Train, or find it trained."""
        assert sampler is not None
        with locked(folder / "lock"):
            if not (folder / "done.json").is_file():
                agent = self._build(sampler, world)
                given = agent.starting_tableau(sampler.denoiser)
                began = time.monotonic()
                _train(agent, folder, world.rounds, world, self.evaluations)
                if not _same(agent.sampling_denoiser, sampler.denoiser):
                    agent.sampling_denoiser.save(folder / "denoiser.safetensors")
                given.save(folder / "given.json")
                agent.schedule.save(folder / "schedule.json")
                agent.tableau.save(folder / "tableau.json")
                facts = {"seconds": time.monotonic() - began, "training calls": agent.num_timesteps}
                _finish(folder, facts | _told(agent))
        return self._read(sampler, folder)

    def _build(self, sampler: Sampler, world: World) -> Agent:
        settings = dict(self.settings)
        if sampler.schedule is not None:
            settings["solver"], options = sampler.solver
            settings |= {"solver_options": dict(options)} if options else {}
        # What learns without a solver, such as variances, does so for any times.
        schedule = sampler.schedule or Schedule.uniform(sampler.denoiser.process, 10)
        return AGENTS[self.agent].for_environment(
            mdp_of(world.target, sampler.denoiser.process, schedule),
            copy.deepcopy(sampler.denoiser),
            preset=self.preset,
            seed=world.seed + self.seed_offset,
            **settings,
        )

    def _read(self, sampler: Sampler, folder: Path) -> Sampler:
        """Return the sampler that a finished stage left in its folder."""
        facts, before = dict(sampler.facts), sampler.before
        for name, value in read_record(folder / "done.json").items():
            adds = name in ("seconds", "training calls") and name in facts
            facts[name] = facts[name] + value if adds else value
        if curve := read_live_metric(folder / "progress.csv"):
            facts["curve"] = curve
        denoiser = sampler.denoiser
        if (folder / "denoiser.safetensors").is_file():
            device = next(denoiser.parameters()).device
            denoiser = Denoiser.load(folder / "denoiser.safetensors", device)
        if sampler.schedule is None:
            return replace(sampler, denoiser=denoiser, facts=facts)
        return replace(
            sampler,
            denoiser=denoiser,
            schedule=Schedule.load(folder / "schedule.json"),
            tableau=Tableau.load(folder / "tableau.json"),
            before=before or (Tableau.load(folder / "given.json"), sampler.denoiser),
            facts=facts,
        )


def fine_tune(agent: str, evaluations: int = 20, preset: str = "default", **settings: Any) -> Learn:
    """Return the stage of an agent that trains against a critic, as `fewstep train` seeds it."""
    return Learn(agent, settings, preset, seed_offset=1, evaluations=evaluations)


def mdp_of(target: Target, process: NoiseProcess, schedule: Schedule | None = None) -> DiffusionMDP:
    """Return an environment whose reward costs nothing: agents bring their own."""
    return DiffusionMDP(target, process, schedule or Schedule.uniform(process, 10), no_reward)


def _train(
    agent: Agent, folder: Path, rounds: int | None, world: World | None = None, evaluations: int = 0
) -> None:
    """Train an agent, from its checkpoint if there is one; Ctrl-C leaves one."""
    checkpoint = folder / "training" / agent.checkpoint_name
    if checkpoint.is_file():
        agent.resume(checkpoint)
    rounds = agent.planned_rounds or rounds or agent.preset_rounds or 1
    logger = Logger(None, [])
    if evaluations:
        logger = make_logger(folder, agent.name, "progress.csv", agent.num_timesteps)
    agent.set_logger(logger)
    live = world.evaluation if world is not None and evaluations else None
    with Monitor(checkpoint, 20.0, rounds, live, evaluations) as monitor, warnings.catch_warnings():
        # The record says what a warning would: what was returned, and how good it is.
        warnings.simplefilter("ignore", UserWarning)
        agent.learn(agent.timesteps_until(rounds), callback=monitor, reset_num_timesteps=False)
    logger.close()
    if monitor.interrupted:
        raise KeyboardInterrupt


def _finish(folder: Path, facts: Record) -> None:
    """Mark a stage as finished; its checkpoint is no longer needed."""
    write_json(folder / "done.json", facts)
    shutil.rmtree(folder / "training")


def _told(agent: Agent) -> Record:
    """Return what a solver agent says of its result."""
    names = ("returned", "tuned", "collapsed", "errors")
    return {name: getattr(agent, name) for name in names if hasattr(agent, name)}


def _same(one: Denoiser, other: Denoiser) -> bool:
    """Tell whether two denoisers hold the same weights."""
    mine, theirs = (
        d.state_dict() | ({} if d.gamma is None else {"gamma": d.gamma}) for d in (one, other)
    )
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def _label(thing: Any) -> str:
    return str(getattr(thing, "agent", type(thing).__name__)).lower()


def _digest(*parts: object) -> str:
    return f"{zlib.crc32(repr(parts).encode()):08x}"
