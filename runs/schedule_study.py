"""The runner of the studies of schedule learning (`fewstep benchmark schedule`, ...).

logs/benchmark/STUDY/results.json  table.md  plot.png  cells/          logs/benchmark/denoisers/
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..agents import DODE, ScheduleLearning
from ..agents.solver_learning.scheduling.levels import schedule_at
from ..agents.solvers import default_schedule, make_solver
from ..envs import DiffusionMDP, Schedule
from ..envs.mdp import no_reward
from .reports.console import console
from .reports.plots import factors_figure, save_figure
from .run.folder import read_record, write_json
from .schedule_studies import Learner, ScheduleStudy
from .solver_study import HELD_OUT, REFERENCE_STEPS, UNIT, World
from .tables import spread, table

BASE = "Karras"
METRICS = {"error": "error", "sliced_wasserstein_fresh": "sliced W2, fresh", "mmd": "MMD"}


def run_schedule_study(study: ScheduleStudy, folder: Path, device: str, rounds: int | None) -> str:
    """Run every cell that is not finished; write results.json and plot.png; return the table.

    Args:
        study: what to run.
        folder: where; trained denoisers are shared in the folder beside it.
        device: cpu, cuda, ...
        rounds: rounds of cloning, if not the presets'.
    """
    records = []
    for environment in study.environments:
        for seed in study.seeds:
            world = World(environment, True, seed, folder.parent / "denoisers", device, rounds)
            for solver in study.solvers:
                for steps in study.budgets:
                    records.append(_cell(study, world, solver, steps, folder / "cells"))
                    write_json(folder / "results.json", records)
    figure = factors_figure(
        factors_of(study, records), "error on Karras's schedule / error on the learned one"
    )
    save_figure(figure, folder / "plot.png")
    return table_of(study, records)


def _cell(
    study: ScheduleStudy, world: World, solver: str, steps: int, folder: Path
) -> dict[str, Any]:
    """Measure a solver on Karras's schedule and on the learned ones, or find it measured."""
    file = folder / f"{world.key}__{solver}__{steps}.json"
    record: dict[str, Any] = (
        read_record(file, "env", "solver", "steps", "scores", "floors") if file.is_file() else {}
    )
    record = record if record.get("unit") == UNIT else {}
    scores = record.get("scores", {})
    schedule = default_schedule(solver, world.process, steps, "karras")
    if BASE not in scores:
        scores[BASE] = world.score(make_solver(solver, schedule))
    for label, learner in study.learners.items():
        if label in scores or (learner.tunes and not world.has_network):
            continue
        start = schedule
        if learner.after is not None:
            levels = torch.tensor(scores[learner.after]["levels"], dtype=torch.float64)
            start = schedule_at(levels, schedule)
        scores[label] = _learn(world, solver, start, learner)
        console.print(
            f"{world.key} {solver} {steps} {label}: error {scores[BASE]['error']:.2e} -> "
            f"{scores[label]['error']:.2e}"
        )
        record = {
            "env": world.environment,
            "solver": solver,
            "steps": steps,
            "seed": world.seed,
            "scores": scores,
            "floors": world.evaluation.floors,
            "unit": UNIT,
        }
        write_json(file, record)
    return record


def _learn(world: World, solver: str, schedule: Schedule, learner: Learner) -> dict[str, Any]:
    """Learn a schedule; return its scores with what was learned."""
    mdp = DiffusionMDP(world.target, world.process, schedule, no_reward)
    agent = ScheduleLearning(
        mdp, copy.deepcopy(world.denoiser), solver=solver, seed=world.seed, **learner.settings
    )
    began = time.monotonic()
    with warnings.catch_warnings():
        # The table says which schedules collapsed.
        warnings.simplefilter("ignore", UserWarning)
        agent.learn()
        tableau = agent.tableau
        if learner.dode is not None:
            distiller = DODE(
                mdp.with_schedule(agent.schedule),
                agent.sampling_denoiser,
                solver=solver,
                seed=world.seed,
                **learner.dode,
            )
            distiller.learn()
            tableau = distiller.tableau
    return {
        **world.score(tableau, agent.sampling_denoiser),
        "seconds": time.monotonic() - began,
        "levels": agent.levels.tolist(),
        "collapsed": agent.collapsed,
        "returned": agent.returned,
        "tuned": agent.tuned,
    }


def table_of(study: ScheduleStudy, records: Sequence[dict[str, Any]]) -> str:
    """Return the study as a Markdown table: mean and spread over seeds, and the factors."""
    rows, worse, collapsed = [], [], []
    for (environment, solver, steps), runs in _grouped(records).items():
        where = f"{environment}, {solver}, K = {steps}"
        for label in runs[0]["scores"]:
            scores = [run["scores"][label] for run in runs]
            fields = [environment, solver, str(steps), label]
            for metric in METRICS:
                values = [score.get(metric) for score in scores]
                floor = spread([run["floors"].get(metric) for run in runs])
                cell = spread(values, "{:.2e}")
                fields.append(cell if metric == "error" else f"{cell} ({floor})")
            for metric in list(METRICS)[:2]:
                fields.append(
                    "" if label == BASE else spread(_factors(runs, label, metric), "{:.2f}")
                )
            fields.append("" if label == BASE else spread([s["seconds"] for s in scores], "{:.0f}"))
            rows.append(fields)
            if label != BASE and min(_factors(runs, label, "sliced_wasserstein_fresh")) <= 1:
                worse.append(f"{where}: {label}")
            stopped = sum(bool(score.get("collapsed")) for score in scores)
            if stopped:
                collapsed.append(f"{where}: {label} ({stopped} of {len(runs)} seeds)")
    names = list(METRICS.values())
    head = ["environment", "solver", "K", "schedule", names[0]]
    head += [f"{name} (floor)" for name in names[1:]]
    head += ["factor, error", "factor, W2", "seconds"]
    notes = [
        f"Error: mean squared error per coordinate, from {REFERENCE_STEPS} steps of "
        f"Heun's method with the pretrained network on {HELD_OUT} held-out noises; factors: "
        f"Karras / learned, above 1 is better. Mean ± standard deviation over {len(study.seeds)} "
        "seeds.",
        "Sliced W2 not better than on Karras's schedule for every seed: "
        + ("; ".join(worse) or "none")
        + ".",
        "Stopped because the samples' variance fell: " + ("; ".join(collapsed) or "none") + ".",
    ]
    return "\n\n".join([f"**{study.title}**", table(head, rows), *notes])


def _grouped(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["env"], record["solver"], record["steps"])
        groups.setdefault(key, []).append(record)
    return groups


def _factors(runs: Sequence[dict[str, Any]], label: str, metric: str) -> list[float]:
    return [run["scores"][BASE][metric] / run["scores"][label][metric] for run in runs]


def factors_of(
    study: ScheduleStudy, records: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean factors of the error for the plot: environment -> series -> row."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for (environment, solver, steps), runs in _grouped(records).items():
        series = f"K = {steps}" if len(study.solvers) == 1 else f"{solver}, K = {steps}"
        for label in runs[0]["scores"]:
            if label != BASE:
                factors = _factors(runs, label, "error")
                panel = panels.setdefault(environment, {}).setdefault(series, {})
                panel[label] = sum(factors) / len(factors)
    return panels
