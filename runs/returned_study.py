"""What the solver agents return, on networks good and bad (`fewstep benchmark returned`).

A learner should never return something worse than what it was given. Each cell gives one a solver
on its usual schedule and compares what it returns with that, on noise that the learner never saw
and against a finer reference than its teacher. The networks are exact denoisers of mixtures, and
networks of the digits that were trained for a moment only: those are rough, as third parties'
networks may be, and a solver's errors on them are not those of theory.

logs/benchmark/returned/results.json  table.md  cells/  denoisers/
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..agents import DODE, ScheduleLearning
from ..agents.samplers.tableau import Tableau
from ..agents.solver_learning.selection import coordinate_errors
from ..envs import DiffusionMDP
from ..envs.mdp import no_reward
from .reports.console import console
from .run.folder import read_record, write_json
from .solver_studies import MIXTURE, Variant
from .solver_study import World
from .tables import table

# Rounds of cloning of a weak network; a good one takes ten times as many or more.
WEAK_ROUNDS = 100

# Noises that no learner has seen, and the steps of Heun's method that say where they should end.
HELD_OUT, REFERENCE_STEPS = 1000, 400


@dataclass(frozen=True)
class Subject:
    """A network.

    Attributes:
        environment: whose data it denoises; "Mixture" has an exact denoiser.
        edm: EDM's, of noise levels up to 80, instead of a noise predictor of a thousand noisings.
    """

    environment: str
    edm: bool

    @property
    def label(self) -> str:
        """What the table calls it."""
        kind = "EDM, to level 80" if self.edm else "noise predictor, linear-1000"
        name = "Mixture, exact" if self.environment == MIXTURE else f"{self.environment}, weak"
        return f"{name} ({kind})"


@dataclass(frozen=True)
class ReturnedStudy:
    """Learners on good and bad networks.

    Attributes:
        title: what it asks.
        subjects: the networks.
        variants: the solvers, as they are given.
        budgets: network calls.
        seeds: of the networks and the learning.
    """

    title: str
    subjects: tuple[Subject, ...]
    variants: tuple[Variant, ...]
    budgets: tuple[int, ...] = (6, 10)
    seeds: tuple[int, ...] = (0, 1, 2)


RETURNED_STUDIES = {
    "returned": ReturnedStudy(
        "What learners return, and what they were given",
        (
            Subject(MIXTURE, False),
            Subject(MIXTURE, True),
            Subject("Digits", False),
            Subject("Digits", True),
        ),
        (Variant("DDIM", "ddim"), Variant("DPM-Solver++ 2M", "dpm-solver++-2m")),
    )
}

# Of the learners; without stage two the network is the given one, so that errors say all.
SCHEDULE: dict[str, Any] = {"tuning_rounds": 0, "batch_size": 200, "schedule_rounds": 60}
TUNING: dict[str, Any] = {
    "schedule_rounds": 0,
    "start": "environment",
    "tuning_rounds": 100,
    "tuning_batch_size": 100,
    "batch_size": 200,
}
LEARNERS = ("schedule learning", "D-ODE", "D-ODE, refined", "stage two alone")


def run_returned_study(study: ReturnedStudy, folder: Path, device: str, rounds: int | None) -> str:
    """Run every cell that is not finished; write results.json; return the table.

    Args:
        study: what to run.
        folder: where; the weak networks are kept there, too.
        device: cpu, cuda, ...
        rounds: rounds of cloning of the weak networks, if not `WEAK_ROUNDS`.
    """
    records = []
    for subject in study.subjects:
        for seed in study.seeds:
            world = World(
                subject.environment,
                subject.edm,
                seed,
                folder / "denoisers",
                device,
                rounds or WEAK_ROUNDS,
                HELD_OUT,
                REFERENCE_STEPS,
            )
            for variant in study.variants:
                variant = Variant(variant.label, variant.solver, variant.options, subject.edm)
                for budget in study.budgets:
                    for learner in LEARNERS:
                        if not _belongs(learner, world, budget, study):
                            continue
                        name = f"{world.key}__{variant.solver}__{budget}__{learner}.json"
                        file = folder / "cells" / name.replace(" ", "-")
                        if file.is_file():
                            records.append(read_record(file, *RECORD))
                            continue
                        record = _cell(world, variant, budget, learner)
                        record["network"] = subject.label
                        write_json(file, record)
                        records.append(record)
                        console.print(
                            f"{world.key} {variant.solver} {budget} {learner}: "
                            f"{record['given']:.3e} -> {record['error']:.3e} "
                            f"({record['returned']}), {record['seconds']:.0f} s"
                        )
                    write_json(folder / "results.json", records)
    return table_of(study, records)


# What the table is made of.
RECORD = ("network", "solver", "nfe", "seed", "learner", "given", "error", "returned")


def _belongs(learner: str, world: World, budget: int, study: ReturnedStudy) -> bool:
    """Return whether a learner is tried: what takes minutes is, on a network, at few budgets."""
    if learner == LEARNERS[-1]:
        return world.has_network and budget == min(study.budgets)
    return not (world.has_network and "refined" in learner)


def _cell(world: World, variant: Variant, budget: int, learner: str) -> dict[str, Any]:
    """Let a learner learn; measure what it was given and what it returns."""
    schedule, base = world.base(variant, budget)
    mdp = DiffusionMDP(world.target, world.process, schedule, no_reward)
    settings: dict[str, Any] = {
        "solver": variant.solver,
        "solver_options": variant.options,
        "seed": world.seed,
    }
    agent: ScheduleLearning | DODE
    if learner.startswith("D-ODE"):
        refine = "end-to-end" if "refined" in learner else "none"
        agent = DODE(mdp, world.denoiser, refine=refine, refine_steps=5, **settings)
    else:
        own = TUNING if learner == LEARNERS[-1] else SCHEDULE
        agent = ScheduleLearning(mdp, copy.deepcopy(world.denoiser), **settings, **own)
    began = time.monotonic()
    with warnings.catch_warnings():
        # A teacher of a weak network may be weak, too; the table shows what follows.
        warnings.simplefilter("ignore", UserWarning)
        agent.learn()
    returned = agent.returned
    if isinstance(agent, ScheduleLearning) and agent.tuned:
        returned = "tuned"

    def error(tableau: Tableau, tuned: bool = False) -> float:
        denoiser = agent.sampling_denoiser if tuned else world.denoiser
        noise = world.held_out(float(tableau.times[0]))
        goal = world.reference(float(tableau.times[0]), float(tableau.times[-1]))
        with torch.no_grad():
            return float(coordinate_errors(tableau.sample(denoiser, noise), goal).mean())

    return {
        "solver": variant.label,
        "nfe": base.nfe,
        "seed": world.seed,
        "learner": learner,
        "given": error(base),
        "error": error(agent.tableau, tuned=True),
        "returned": returned,
        "errors": agent.errors,
        "seconds": time.monotonic() - began,
    }


def table_of(study: ReturnedStudy, records: Sequence[dict[str, Any]]) -> str:
    """Return the study as a Markdown table: a row for each network, solver, budget and learner."""
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["network"], record["solver"], record["nfe"], record["learner"])
        groups.setdefault(key, []).append(record)
    rows = []
    for (network, solver, nfe, learner), runs in groups.items():
        fields = [
            f"{run['given']:.2e} → {run['error']:.2e} ({run['error'] / run['given']:.2f}, "
            f"{run['returned']})"
            for run in runs
        ]
        rows.append([network, solver, str(nfe), learner, *fields])
    head = ["network", "solver", "NFE", "learner", *(f"seed {seed}" for seed in study.seeds)]
    worse = [run for run in records if run["error"] > run["given"]]
    note = (
        "Given → returned (ratio, which it is): mean squared error per coordinate of the finished "
        f"samples on {HELD_OUT} held-out noises, to {REFERENCE_STEPS} steps of Heun's method with "
        f"the given network. Worse than given: {len(worse)} of {len(records)}"
    )
    if worse:
        note += (
            ", by at most a factor of " + f"{max(run['error'] / run['given'] for run in worse):.2f}"
        )
    return f"**{study.title}**\n\n{table(head, rows)}\n\n{note}."
