"""The runner of the studies of solvers and of their distillation (`fewstep benchmark dode`, ...).

Every cell runs one base solver and its distilled versions from the same held-out noise, against a
fine reference from that noise (squared error) and against real data (with floors).

logs/benchmark/STUDY/results.json  table.md  plot.png  cells/          logs/benchmark/denoisers/
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..agents import DODE, BehaviorCloning, Denoiser
from ..agents.denoisers.exact import mixture
from ..agents.samplers.sampling import sampler_of
from ..agents.samplers.tableau import Tableau
from ..agents.solver_learning.selection import coordinate_errors
from ..agents.solvers import make_solver, solver_within
from ..critics.metrics.evaluation import Evaluation
from ..envs import VE, DiffusionMDP, Schedule
from ..envs.mdp import no_reward
from ..envs.processes.process import NoiseProcess, make_process
from ..envs.registration import make_mdp
from .commands.train import Run
from .reports.console import console
from .reports.plots import factors_figure, save_figure
from .run.folder import RunFolder, read_record, write_json
from .settings.train import Settings, defaults, resolve_device
from .solver_studies import MIXTURE, SolverStudy, Variant
from .tables import spread, table

# What a cell's errors are; cells of an older version, which summed over coordinates, are run anew.
UNIT = "mean square of a coordinate"

# Seeds of the noise that no fit has seen, and how many samples the error is measured on.
HELD_OUT_SEED, HELD_OUT = 20_001, 2000
REFERENCE_STEPS = 1000
FRESH_SAMPLES = 20_000


def run_solver_study(study: SolverStudy, folder: Path, device: str, rounds: int | None) -> str:
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
            for edm in (False, True):
                variants = [variant for variant in study.variants if variant.edm == edm]
                if variants:
                    world = World(
                        environment, edm, seed, folder.parent / "denoisers", device, rounds
                    )
                    records += list(_cells(study, variants, world, folder / "cells"))
                    write_json(folder / "results.json", records)
    figure = factors_figure(factors_of(study, records), "base error / distilled error")
    save_figure(figure, folder / "plot.png")
    return table_of(study, records)


def _cells(
    study: SolverStudy, variants: Sequence[Variant], world: World, folder: Path
) -> Iterator[dict[str, Any]]:
    for variant in variants:
        for budget in study.budgets:
            file = folder / f"{world.key}__{_slug(variant.label)}__{budget}.json"
            done = (
                read_record(file, "env", "variant", "nfe", "scores", "floors")
                if file.is_file()
                else {}
            )
            if done.get("unit") == UNIT:
                yield done
                continue
            record = world.measure(variant, budget, study.treatments)
            errors = ", ".join(
                f"{key} {value['error']:.2e}" for key, value in record["scores"].items()
            )
            console.print(f"{world.key} {variant.label} {budget}: {errors}")
            write_json(file, record)
            yield record


class World:
    """A denoiser with its data, and what its samples should be.

    Args:
        environment: name of an environment, or "Mixture".
        edm: a VE process with an EDM denoiser instead of a VP one.
        seed: of everything.
        denoisers: folder of trained denoisers.
        device: cpu, cuda, ...
        rounds: rounds of cloning, if not the presets'.
        held_out: how many noises errors are measured on.
        reference_steps: of Heun's method, whose samples are the reference.
    """

    def __init__(
        self,
        environment: str,
        edm: bool,
        seed: int,
        denoisers: Path,
        device: str,
        rounds: int | None,
        held_out: int = HELD_OUT,
        reference_steps: int = REFERENCE_STEPS,
    ) -> None:
        self._count, self._reference_steps = held_out, reference_steps
        self.environment, self.seed = environment, seed
        self.has_network = environment != MIXTURE
        self.key = f"{environment}__{'edm' if edm else 'vp'}__seed{seed}"
        self._trained = lambda name: trained_denoiser(
            environment, name, seed, denoisers, device, rounds
        )
        if environment == MIXTURE:
            process: NoiseProcess = VE() if edm else make_process("linear-1000")
            self.denoiser, target = mixture(
                process, prediction="sample" if edm else "epsilon", seed=seed
            )
            self.denoiser.to(resolve_device(device))
        else:
            target = make_mdp(environment, device=resolve_device(device)).target
            name = "ve" if edm else {"Digits": "linear-1000"}.get(environment, "sigmoid-1000")
            self.denoiser = self._trained(name)
            process = self.denoiser.process
        self.process, self.target = process, target
        self._evaluation: Evaluation | None = None
        self._references: dict[tuple[float, float], Tensor] = {}

    @property
    def evaluation(self) -> Evaluation:
        """The metrics of the data, prepared when first asked for."""
        if self._evaluation is None:
            self._evaluation = Evaluation(self.target, FRESH_SAMPLES)
        return self._evaluation

    def measure(
        self, variant: Variant, budget: int, treatments: Mapping[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Score a base solver and its treatments with a budget of network calls."""
        schedule, base = self.base(variant, budget)
        mdp = DiffusionMDP(self.target, self.process, schedule, no_reward)
        scores = {"base": self.score(base)}
        fits = {}
        for label, settings in treatments.items():
            if settings.get("form") == "lookahead" and base.output != "sample":
                continue
            agent = DODE(
                mdp,
                self.denoiser,
                solver=variant.solver,
                solver_options=variant.options,
                seed=self.seed,
                **settings,
            )
            with warnings.catch_warnings():
                # The table says which distilled solvers are worse, and why is in the records.
                warnings.simplefilter("ignore", UserWarning)
                agent.learn(agent.total_timesteps)
            scores[label] = self.score(agent.tableau)
            fits[label] = agent.state()["fits"]
        return {
            "env": self.environment,
            "variant": variant.label,
            "solver": variant.solver,
            "schedule": schedule.recipe,
            "nfe": base.nfe,
            "seed": self.seed,
            "scores": scores,
            "floors": self.evaluation.floors,
            "unit": UNIT,
            "fits": fits,
        }

    def base(self, variant: Variant, budget: int) -> tuple[Schedule, Tableau]:
        """Return the schedule that costs the budget, and the solver on it."""
        process = self.process
        made: list[Schedule] = []

        def schedule_of(steps: int, append_zero: bool = True) -> Schedule:
            if variant.edm:
                made.append(Schedule.karras(process, steps, append_zero=append_zero))
            elif variant.schedule == "uniform_torch":
                made.append(Schedule.uniform_torch(process, steps))
            else:
                made.append(Schedule.uniform(process, steps, end=process.t_min))
            return made[-1]

        try:
            tableau = solver_within(variant.solver, budget, schedule_of, **variant.options)
        except ValueError:
            # Heun's calls to time 0 are odd; an even budget ends at the smallest noise level.
            tableau = solver_within(
                variant.solver,
                budget,
                lambda steps: schedule_of(steps, append_zero=False),
                **variant.options,
            )
        return made[-1], tableau

    @torch.no_grad()
    def score(self, tableau: Tableau, denoiser: Denoiser | None = None) -> dict[str, float]:
        """Return the error to the reference (see `UNIT`) and the distances to real data.

        Args:
            tableau: the sampler.
            denoiser: what it asks, if not this world's denoiser; the reference stays its.
        """
        denoiser = denoiser or self.denoiser
        start, end = float(tableau.times[0]), float(tableau.times[-1])
        states = tableau.sample(denoiser, self.held_out(start))
        error = float(coordinate_errors(states, self.reference(start, end)).mean())
        sampler = sampler_of(tableau, denoiser, tuple(self.target.shape))
        return {"error": error, **self.evaluation(sampler, self.seed)}

    def held_out(self, start: float) -> Tensor:
        """Return the noise at time `start` that no fit has seen, (N, *shape)."""
        generator = torch.Generator(self.target.device).manual_seed(HELD_OUT_SEED + self.seed)
        shape = (self._count, *self.target.shape)
        return self.process.prior_sample(shape, generator, t=start, device=self.target.device)

    @torch.no_grad()
    def reference(self, start: float, end: float) -> Tensor:
        """Return the held-out samples of Heun's method in many steps between two times."""
        key = (start, end)
        if key not in self._references:
            if isinstance(self.process, VE):
                schedule = Schedule.karras(
                    self.process, self._reference_steps, append_zero=end == 0, start=start
                )
            else:
                ramp = torch.linspace(start, end, self._reference_steps + 1, dtype=torch.float64)
                schedule = Schedule(self.process, ramp)
            self._references[key] = make_solver("heun", schedule).sample(
                self.denoiser, self.held_out(start)
            )
        return self._references[key]


def denoiser_name(environment: str, process: str, seed: int) -> str:
    """Return the name of a trained denoiser's run folder in a study's folder of denoisers."""
    return f"{environment}__{process}__seed{seed}"


def trained_denoiser(
    environment: str,
    process: str,
    seed: int,
    folder: Path,
    device: str,
    rounds: int | None,
    data_dir: Path | None = None,
) -> Denoiser:
    """Clone a denoiser, or find it cloned."""
    base = defaults(environment, BehaviorCloning.name)
    run = dataclasses.replace(
        base.run,
        process=process,
        seed=seed,
        device=device,
        data_dir=data_dir,
        evaluations=2,
        evaluation_samples=FRESH_SAMPLES,
    )
    its = base.agent.replace(rounds=rounds or base.agent.rounds)
    resolved = Settings(run, its, base.cloning)
    shared = RunFolder.at(folder / denoiser_name(environment, process, seed), resolved)
    if "metrics" not in shared.results():
        console.rule(f"denoiser {shared.path.name}")
        Run(resolved, shared).carry_through()
    return Denoiser.load(shared.cloning, resolve_device(device))


def table_of(study: SolverStudy, records: Sequence[dict[str, Any]]) -> str:
    """Return the study as a Markdown table: mean and spread over seeds."""
    rows = []
    for (environment, label, nfe), runs in _grouped(records).items():
        fields = [environment, label, str(nfe), _over_seeds(runs, "base", "error")]
        for treatment in study.treatments:
            if treatment not in runs[0]["scores"]:
                fields += ["-", "-"]
                continue
            factors = [_factor(run, treatment) for run in runs]
            fields += [_over_seeds(runs, treatment, "error"), spread(factors, "{:.1f}")]
        for metric in ("sliced_wasserstein_fresh", "mmd"):
            floor = spread([run["floors"].get(metric) for run in runs])
            # The distances of more contenders would make the table too wide; results.json has them.
            steps = ["base", *study.treatments] if len(study.treatments) <= 2 else ["base"]
            scores = [_over_seeds(runs, name, metric) for name in steps]
            fields.append(f"{' → '.join(scores)} ({floor})")
        rows.append(fields)
    head = ["environment", "solver", "NFE", "base error"]
    for treatment in study.treatments:
        head += [f"{treatment} error", "factor"]
    head += ["sliced W2, fresh (floor)", "MMD (floor)"]
    worse = [
        f"{environment}, {label}, {nfe} calls, {treatment}"
        for (environment, label, nfe), runs in _grouped(records).items()
        for treatment in study.treatments
        if treatment in runs[0]["scores"] and min(_factor(run, treatment) for run in runs) <= 1
    ]
    note = (
        f"Error: mean squared error per coordinate, from {REFERENCE_STEPS} steps of Heun's method "
        f"on {HELD_OUT} held-out noises; factor: base error / distilled error. Mean "
        f"± standard deviation over {len(study.seeds)} seeds."
    )
    verdict = (
        "Not better than the base solver for every seed: " + "; ".join(worse) + "."
        if worse
        else "Every distilled solver is better than its base solver, for every seed."
    )
    return f"**{study.title}**\n\n{table(head, rows)}\n\n{note}\n\n{verdict}"


def _grouped(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["env"], record["variant"], record["nfe"]), []).append(record)
    return groups


def _factor(record: dict[str, Any], treatment: str) -> float:
    return record["scores"]["base"]["error"] / record["scores"][treatment]["error"]


def _over_seeds(runs: Sequence[dict[str, Any]], name: str, metric: str) -> str:
    return spread([run["scores"][name].get(metric) for run in runs], "{:.2e}")


def factors_of(
    study: SolverStudy, records: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean factors for the plot: environment -> series -> row.

    The series are the treatments, or the numbers of calls where there is only one treatment.
    """
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for (environment, label, nfe), runs in _grouped(records).items():
        for treatment in study.treatments:
            if treatment not in runs[0]["scores"]:
                continue
            factor = sum(_factor(run, treatment) for run in runs) / len(runs)
            single = len(study.treatments) == 1
            series, row = (f"{nfe} calls", label) if single else (treatment, f"{label}, {nfe}")
            panels.setdefault(environment, {}).setdefault(series, {})[row] = factor
    return panels


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower())
