"""`fewstep benchmark STUDY`: run a declared study; finished cells are kept, so it resumes.

logs/benchmark/STUDY/results.json  table.md  plot.png  denoisers/  cells/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.table import Table

from ...agents import AGENTS, BehaviorCloning
from ...common.checks import at_least
from ...common.files import write_atomically
from ...common.names import unknown_name
from ..measurements import MEASUREMENTS
from ..reports.console import console, print_report
from ..reports.plots import curve_figure, save_figure
from ..returned_study import RETURNED_STUDIES, ReturnedStudy, run_returned_study
from ..run.folder import RunFolder, write_json
from ..run.logs import read_live_metric
from ..run.threads import threads
from ..sampler_studies import SAMPLER_STUDIES, SamplerStudy
from ..sampler_study import run_sampler_study
from ..schedule_studies import SCHEDULE_STUDIES, ScheduleStudy
from ..schedule_study import run_schedule_study
from ..settings.train import Settings, check_seed, defaults
from ..solver_studies import SOLVER_STUDIES, SolverStudy
from ..solver_study import run_solver_study
from ..studies import STUDIES, Contender, Study
from ..tables import spread, table
from .train import Run, build_mdp

BudgetStudy = TypeVar("BudgetStudy", SolverStudy, ScheduleStudy, SamplerStudy, ReturnedStudy)


@dataclass(frozen=True)
class BenchmarkSettings:
    """Run a declared study, or go on with it: finished cells are kept."""

    study: Annotated[str, tyro.conf.Positional]
    """Which study: see `fewstep benchmark list`."""
    log_dir: Path = Path("logs")
    """The study's folder is LOG_DIR/benchmark/STUDY."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    threads: int | None = None
    """CPU threads, at least 1; PyTorch's default if omitted."""
    seeds: tuple[int, ...] | None = None
    """Training seeds, if not the study's."""
    steps: tuple[int, ...] | None = None
    """Sampling steps K (network calls in studies of solvers), if not the study's."""
    data_dir: Path | None = None
    """Folder of the data files of studies on image sets."""
    inception_weights: Path | None = None
    """Weights of torch-fidelity's Inception network, for FID on images of 32 pixels and more."""
    rounds: int | None = None
    """Rounds of every cell, if not the presets' (a quick look)."""
    evaluation_samples: int = 200_000
    """Most samples of each metric, at least 2."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    environment: str
    steps: int
    contender: Contender
    seed: int

    @property
    def key(self) -> str:
        """Name of the cell's folder."""
        label = "".join(c if c.isalnum() else "-" for c in self.contender.label.lower())
        return f"{self.environment}__{self.steps}__{label}__seed{self.seed}"


def main(argv: Sequence[str]) -> None:
    """Run `fewstep benchmark` with these flags."""
    settings = tyro.cli(BenchmarkSettings, args=list(argv), prog="fewstep benchmark")
    titles = {name: study.title for name, study in STUDIES.items()}
    titles |= {name: study.title for name, study in SOLVER_STUDIES.items()}
    titles |= {name: study.title for name, study in SCHEDULE_STUDIES.items()}
    titles |= {name: study.title for name, study in SAMPLER_STUDIES.items()}
    titles |= {name: study.title for name, study in RETURNED_STUDIES.items()}
    titles |= {name: measurement.title for name, measurement in MEASUREMENTS.items()}
    if settings.study == "list":
        listing = Table.grid(padding=(0, 2))
        listing.add_column(no_wrap=True)
        for row in titles.items():
            listing.add_row(*row)
        console.print(listing)
        return
    if settings.study not in titles:
        raise unknown_name("study", settings.study, titles)
    _check_numbers(settings)
    folder = settings.log_dir / "benchmark" / settings.study
    with threads(settings.threads):
        text = _measured(settings, folder)
    write_atomically(folder / "table.md", lambda file: file.write_text(text + "\n"))
    print_report(text)
    console.out(f"Results: {folder}")


def _measured(settings: BenchmarkSettings, folder: Path) -> str:
    """Run a study, or go on with it; return its table."""
    if settings.study in MEASUREMENTS:
        results, text = MEASUREMENTS[settings.study].measure(settings.device)
        write_json(folder / "results.json", results)
    elif settings.study in SOLVER_STUDIES:
        solver_study = _narrowed(SOLVER_STUDIES[settings.study], settings)
        text = run_solver_study(solver_study, folder, settings.device, settings.rounds)
    elif settings.study in SCHEDULE_STUDIES:
        schedule_study = _narrowed(SCHEDULE_STUDIES[settings.study], settings)
        text = run_schedule_study(schedule_study, folder, settings.device, settings.rounds)
    elif settings.study in RETURNED_STUDIES:
        returned_study = _narrowed(RETURNED_STUDIES[settings.study], settings)
        text = run_returned_study(returned_study, folder, settings.device, settings.rounds)
    elif settings.study in SAMPLER_STUDIES:
        sampler_study = _narrowed(SAMPLER_STUDIES[settings.study], settings)
        text = run_sampler_study(
            sampler_study,
            folder,
            settings.device,
            settings.rounds,
            settings.data_dir,
            settings.inception_weights,
        )
    else:
        study = STUDIES[settings.study]
        study = dataclasses.replace(
            study, seeds=settings.seeds or study.seeds, steps=settings.steps or study.steps
        )
        text = run_study(study, settings, folder)
    return text


def _check_numbers(settings: BenchmarkSettings) -> None:
    """Raise ValueError for a number that no cell can do anything with."""
    at_least(1, **{"--threads": settings.threads, "--rounds": settings.rounds})
    at_least(2, **{"--evaluation-samples": settings.evaluation_samples})
    for steps in settings.steps or ():
        at_least(1, **{"--steps": steps})
    for seed in settings.seeds or ():
        check_seed(seed, "--seeds")


def _narrowed(study: BudgetStudy, settings: BenchmarkSettings) -> BudgetStudy:
    """Return a study with the seeds and the network calls that the flags name."""
    return dataclasses.replace(
        study,
        seeds=settings.seeds or study.seeds,
        budgets=settings.steps or study.budgets,
    )


def run_study(study: Study, settings: BenchmarkSettings, folder: Path) -> str:
    """Run every cell that is not finished; write results.json and plot.png; return the table."""
    finished = []
    for cell in cells(study):
        cell_folder = RunFolder(folder / "cells" / cell.key)
        results = cell_folder.results()
        if "metrics" not in results:
            console.rule(cell.key)
            results = run_cell(cell, study, settings, folder)
        finished.append((cell, results))
        write_json(folder / "results.json", [as_record(*pair) for pair in finished])
    plot(study, finished, folder)
    return table_of(study, finished)


def cells(study: Study) -> Iterator[Cell]:
    """Enumerate a study's cells."""
    for environment in study.environments:
        for contender in study.contenders:
            for steps in contender.steps or study.steps:
                for seed in study.seeds:
                    yield Cell(environment, steps, contender, seed)


def run_cell(cell: Cell, study: Study, settings: BenchmarkSettings, folder: Path) -> dict[str, Any]:
    """Run one cell in its folder, from wherever it stands."""
    contender = cell.contender
    base = defaults(cell.environment, contender.agent, contender.preset)
    run = dataclasses.replace(
        base.run,
        steps=cell.steps,
        seed=cell.seed,
        device=settings.device,
        threads=settings.threads,
        evaluation_samples=settings.evaluation_samples,
        evaluations=contender.evaluations,
        data_dir=settings.data_dir,
        inception_weights=settings.inception_weights,
        process=study.process or base.run.process,
        body=study.body,
        body_options=study.body_options,
    )
    rounds = settings.rounds or contender.rounds
    changes = {**contender.settings, **({"rounds": rounds} if rounds else {})}
    resolved = Settings(run, base.agent.replace(**changes), base.cloning)
    if not study.clone_per_seed and AGENTS[contender.agent] is not BehaviorCloning:
        shared = shared_denoiser(resolved, settings, folder)
        resolved = dataclasses.replace(resolved, run=dataclasses.replace(run, denoiser=shared))
    return Run(resolved, RunFolder.at(folder / "cells" / cell.key, resolved)).carry_through()


def shared_denoiser(settings: Settings, flags: BenchmarkSettings, folder: Path) -> Path:
    """Clone the denoiser that a study's contenders share, once for each noise process."""
    mdp = build_mdp(settings)
    base = defaults(settings.run.env, BehaviorCloning.name)
    run = dataclasses.replace(
        settings.run,
        agent=BehaviorCloning.name,
        seed=0,
    )
    path = folder / "denoisers" / f"{run.env}-T{mdp.process.t_max:g}"
    cloning = base.agent.replace(rounds=flags.rounds) if flags.rounds else base.agent
    resolved = Settings(run, cloning, base.cloning)
    shared = RunFolder.at(path, resolved)
    if "metrics" not in shared.results():
        console.rule(f"shared denoiser {path.name}")
        Run(resolved, shared).carry_through()
    return path


def as_record(cell: Cell, results: dict[str, Any]) -> dict[str, Any]:
    """Return a cell's results with the coordinates it has in the study."""
    return {**results, "contender": cell.contender.label, "steps": cell.steps}


def table_of(study: Study, finished: Sequence[tuple[Cell, dict[str, Any]]]) -> str:
    """Return the study as a Markdown table: mean and spread over seeds, floor, NFE, seconds."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell, results in finished:
        key = (cell.environment, cell.contender.label, cell.steps)
        groups.setdefault(key, []).append(results)
    rows = []
    metrics = study.metrics or tuple(finished[0][1]["metrics"])
    for (environment, label, _), runs in groups.items():
        fields = [environment, label, str(runs[0]["nfe"])]
        fields += [score_of([run["metrics"][metric] for run in runs]) for metric in metrics]
        fields += [spread([run["seconds"] for run in runs], "{:.0f}"), str(len(runs))]
        rows.append(fields)
    head = ["environment", "contender", "NFE", *metrics, "seconds", "seeds"]
    note = "Scores: before → after (floor), mean ± standard deviation over seeds."
    return f"**{study.title}**\n\n{table(head, rows)}\n\n{note}"


def score_of(scores: Sequence[dict[str, float | None]]) -> str:
    """Format one metric over seeds: before -> after (floor)."""
    before, after, floor = (
        spread([score[column] for score in scores]) for column in ("before", "after", "floor")
    )
    return f"{after} ({floor})" if before == "-" else f"{before} → {after} ({floor})"


def plot(study: Study, finished: Sequence[tuple[Cell, dict[str, Any]]], folder: Path) -> None:
    """Draw the live metric of every contender over its training (first seed)."""
    curves = {}
    for cell, _ in finished:
        curve = read_live_metric(folder / "cells" / cell.key / "progress.csv")
        name = cell.contender.label
        if len(study.steps) > 1 or cell.contender.steps:
            name = f"{name}, K = {cell.steps}"
        if curve and name not in curves:
            curves[name] = curve
    # The live metric is the first of all.
    floors = {next(iter(results["metrics"].values()))["floor"] for _, results in finished}
    if curves:
        figure = curve_figure(
            curves,
            x="denoiser calls",
            y="sliced 2-Wasserstein",
            floor=min(floors) if len(floors) == 1 else None,
        )
        save_figure(figure, folder / "plot.png")
