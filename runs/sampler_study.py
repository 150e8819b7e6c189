"""The runner of the studies of few-step DDPM samplers (`fewstep benchmark samplers`).

logs/benchmark/STUDY/results.json  table.md  plot.png  cells/  runs/       logs/benchmark/denoisers/
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..agents import DODE, SFTPG, Denoiser, VarianceLearning
from ..agents.samplers.sampling import sampler_of
from ..agents.samplers.tableau import Tableau
from ..agents.solvers import make_solver, solver_within
from ..critics.metrics.evaluation import Evaluation
from ..envs import DiffusionMDP, Schedule, Target, make_schedule, make_target
from ..envs.mdp import no_reward
from .commands.train import Run
from .reports.console import console
from .reports.features import features_for, real_distances
from .reports.plots import dots_figure, save_figure
from .run.folder import RunFolder, read_record, write_json
from .sampler_studies import FastSampler, SamplerStudy
from .settings.train import Settings, defaults, resolve_device
from .solver_study import denoiser_name, trained_denoiser
from .tables import spread, table


def run_sampler_study(
    study: SamplerStudy,
    folder: Path,
    device: str,
    rounds: int | None,
    data_dir: Path | None = None,
    inception_weights: Path | None = None,
) -> str:
    """Run every cell that is not finished; write results.json and plot.png; return the table.

    Args:
        study: what to run.
        folder: where; trained denoisers are shared in the folder beside it.
        device: cpu, cuda, ...
        rounds: rounds of every training, if not the presets'.
        data_dir: folder of data files.
        inception_weights: of the Inception network, if its distances are wanted.
    """
    records = []
    for seed in study.seeds:
        world = SamplerWorld(study, seed, folder, device, rounds, data_dir, inception_weights)
        for sampler in study.samplers:
            for steps in sampler.steps or study.budgets:
                records.append(world.cell(sampler, steps))
                write_json(folder / "results.json", records)
    metric = headline(records)
    scores: dict[str, dict[str, float]] = {}
    for (label, nfe), runs in _grouped(records).items():
        mean = sum(run["scores"][metric] for run in runs) / len(runs)
        scores.setdefault(f"{nfe} calls", {})[label] = mean
    figure = dots_figure(
        {study.environment: scores},
        f"{metric}\n(lower is better; dashed: real samples)",
        line=records[0]["floors"][metric],
    )
    save_figure(figure, folder / "plot.png")
    return table_of(study, records)


class SamplerWorld:
    """One seed's denoiser with what its samplers need, and the metrics."""

    def __init__(
        self,
        study: SamplerStudy,
        seed: int,
        folder: Path,
        device: str,
        rounds: int | None,
        data_dir: Path | None,
        inception_weights: Path | None,
    ) -> None:
        self.study, self.seed, self.folder = study, seed, folder
        self.device, self.rounds, self.data_dir = device, rounds, data_dir
        self._inception_weights = inception_weights

    def cell(self, sampler: FastSampler, steps: int) -> dict[str, Any]:
        """Score a sampler with this many network calls, or find it scored."""
        key = f"{_slug(sampler.label)}__{steps}__seed{self.seed}"
        file = self.folder / "cells" / f"{key}.json"
        if file.is_file():
            return read_record(
                file, "sampler", "nfe", "seed", "scores", "floors", "higher_is_better", "seconds"
            )
        console.rule(key)
        began = time.monotonic()
        tableau, denoiser = self._sampler(sampler, steps)
        learned = time.monotonic() - began
        shape = tuple(self.target.shape)
        record = {
            "env": self.study.environment,
            "sampler": sampler.label,
            "nfe": tableau.nfe,
            "seed": self.seed,
            "scores": self.evaluation(sampler_of(tableau, denoiser, shape), self.seed),
            "floors": self.evaluation.floors,
            "higher_is_better": self.evaluation.higher_is_better,
            "seconds": learned,
        }
        write_json(file, record)
        return record

    @cached_property
    def target(self) -> Target:
        """The data."""
        return make_target(
            self.study.environment, device=resolve_device(self.device), data_dir=self.data_dir
        )

    @cached_property
    def evaluation(self) -> Evaluation:
        """The metrics of the data."""
        features = features_for(
            self.target,
            inception_weights=self._inception_weights,
            data_dir=self.data_dir,
            device=self.target.device,
        )
        return Evaluation(self.target, features=features, distances=real_distances)

    @cached_property
    def denoiser(self) -> Denoiser:
        """This seed's pretrained denoiser."""
        return trained_denoiser(
            self.study.environment,
            self.study.process,
            self.seed,
            self._denoisers,
            self.device,
            self.rounds,
            self.data_dir,
        )

    @property
    def _denoisers(self) -> Path:
        return self.folder.parent / "denoisers"

    def _sampler(self, sampler: FastSampler, steps: int) -> tuple[Tableau, Denoiser]:
        """Learn what a sampler needs learned; return its table and its denoiser."""
        if sampler.agent == SFTPG.name:
            return self._fine_tuned(sampler, steps)
        denoiser = self.denoiser
        if sampler.variance is not None:
            denoiser = self._with_variance(sampler.variance)
        if sampler.agent == DODE.name:
            agent = DODE(
                self._mdp(self._schedule(steps, sampler)),
                denoiser,
                solver=sampler.solver,
                solver_options=sampler.options,
                seed=self.seed,
                **sampler.settings,
            )
            agent.learn(agent.total_timesteps)
            return agent.tableau, denoiser
        tableau = solver_within(
            sampler.solver,
            steps,
            lambda count: self._schedule(count, sampler),
            denoiser=denoiser,
            **sampler.options,
        )
        return tableau, denoiser

    def _fine_tuned(self, sampler: FastSampler, steps: int) -> tuple[Tableau, Denoiser]:
        """Fine-tune the denoiser with SFT-PG in a run folder of its own."""
        environment = self.study.environment
        base = defaults(environment, SFTPG.name)
        name = denoiser_name(environment, self.study.process, self.seed)
        process = self.denoiser.process  # trained now, if it was not
        run = dataclasses.replace(
            base.run,
            steps=steps,
            schedule=sampler.schedule,
            schedule_options=sampler.schedule_options,
            denoiser=self._denoisers / name,
            seed=self.seed,
            device=self.device,
            data_dir=self.data_dir,
        )
        changes = {"solver": sampler.solver, "solver_options": sampler.options, **sampler.settings}
        if self.rounds:
            changes["rounds"] = self.rounds
        resolved = Settings(run, base.agent.replace(**changes), base.cloning)
        folder = RunFolder.at(
            self.folder / "runs" / f"{_slug(sampler.label)}__{steps}__seed{self.seed}", resolved
        )
        Run(resolved, folder).carry_through()
        denoiser = Denoiser.load(folder.path / SFTPG.checkpoint_name, self.target.device)
        schedule = self._schedule(steps, sampler)
        assert denoiser.process == process
        return make_solver(sampler.solver, schedule, **sampler.options), denoiser

    def _with_variance(self, kind: str) -> Denoiser:
        """Return the denoiser with its Gamma or its second head, learned once a seed."""
        base = defaults(self.study.environment, VarianceLearning.name)
        uniform = Schedule.uniform(self.denoiser.process, 10)
        agent = VarianceLearning(
            self._mdp(uniform),
            copy.deepcopy(self.denoiser),
            seed=self.seed,
            settings=base.agent.replace(kind=kind, rounds=self.rounds or base.agent.rounds),
        )
        file = self.folder / "runs" / f"variance-{kind}__seed{self.seed}.safetensors"
        if file.is_file():
            agent.resume(file)
        rounds = agent.planned_rounds or 0
        agent.learn(agent.timesteps_until(rounds), reset_num_timesteps=False)
        agent.save(file)
        return agent.sampling_denoiser

    def _mdp(self, schedule: Schedule) -> DiffusionMDP:
        return DiffusionMDP(self.target, schedule.process, schedule, no_reward)

    def _schedule(self, steps: int, sampler: FastSampler) -> Schedule:
        return make_schedule(
            sampler.schedule, self.denoiser.process, steps, **sampler.schedule_options
        )


def headline(records: Sequence[dict[str, Any]]) -> str:
    """Return the metric that the plot shows: the Frechet distance, if there is one."""
    names = list(records[0]["floors"])
    frechet = [name for name in names if name.startswith(("fid", "frechet"))]
    return (frechet or names)[0]


def table_of(study: SamplerStudy, records: Sequence[dict[str, Any]]) -> str:
    """Return the study as a Markdown table: mean and spread over seeds, and who beats whom."""
    groups = _grouped(records)
    metrics = list(records[0]["floors"])
    rows = []
    for (sampler, nfe), runs in groups.items():
        scores = [spread([run["scores"][metric] for run in runs], "{:.3g}") for metric in metrics]
        rows.append(
            [sampler, str(nfe), *scores, spread([run["seconds"] for run in runs], "{:.0f}")]
        )
    floors = [
        spread([run["floors"][metric] for run in records if run["sampler"] == study.yardstick])
        for metric in metrics
    ]
    rows.append(["real samples (floor)", "", *floors, ""])
    higher = [name for name, up in records[0]["higher_is_better"].items() if up]
    head = ["sampler", "NFE", *(f"{m} {'↑' if m in higher else '↓'}" for m in metrics), "seconds"]
    metric = headline(records)
    yard = {
        run["seed"]: run["scores"][metric] for run in records if run["sampler"] == study.yardstick
    }
    better = [
        f"{sampler}, {nfe} calls"
        for (sampler, nfe), runs in groups.items()
        if all(run["scores"][metric] < yard.get(run["seed"], 0.0) for run in runs)
    ]
    notes = [
        f"Mean ± standard deviation over {len(study.seeds)} seeds; ↓ lower is better. Seconds: of "
        "what was learned on top of the shared denoiser.",
        f"Better than '{study.yardstick}' in {metric} for every seed: "
        + ("; ".join(better) or "none")
        + ".",
    ]
    return "\n\n".join([f"**{study.title}**", table(head, rows), *notes])


def _grouped(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["sampler"], record["nfe"]), []).append(record)
    return groups


def _slug(label: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())
