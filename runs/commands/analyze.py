"""`fewstep analyze`: why few-step solvers work, and what distillation changes.

Writes correlation.png (how alike the network's outputs are at different times; Kim, Tang & Yu
2024, Fig. 2), trajectory.png (the states' norm and two coordinates of one sample against a fine
reference; Fig. 5), lambdas.png and analysis.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...agents import AGENTS, Denoiser
from ...agents.samplers.tableau import Tableau
from ...agents.solvers import ddim
from ...envs import DiffusionMDP
from ..reports.console import console
from ..reports.plots import correlation_figure, panels_figure, paths_figure, save_figure
from ..reports.results import print_report_tables
from ..run.building import build_mdp
from ..run.folder import check_output_folder, tableau_file, write_json
from ..settings.conditions import under_terms
from ..settings.flags import parse_flags
from ..settings.foreign import check_body, foreign_body
from ..settings.pretrained import PretrainedSettings, check_samples, load, run_of
from ..settings.train import resumed_settings

# Times at which outputs are compared and reference states are drawn.
SHOWN_TIMES = 100


@dataclasses.dataclass(frozen=True)
class AnalyzeSettings(PretrainedSettings):
    """Show what a solver and its distilled version do, against a fine reference.

    A run folder of `--agent dode` is analysed with its own solver and tableau; otherwise the named
    solver (ddim if omitted) is distilled on the spot.
    """

    solver: str | None = None
    """Base solver to distil, deterministic; `fewstep agents` lists the solvers. If omitted, that of
    a dode run with its tableau, else ddim."""
    samples: int = 256
    """Samples that are followed."""
    reference_steps: int = 1000
    """About how many DDIM steps the reference takes; it refines the solver's own times."""
    output: Path = Path("analysis")
    """Folder for the pictures and analysis.json."""


def main(argv: Sequence[str]) -> None:
    """Run `fewstep analyze` with these flags."""
    settings = parse_flags(AnalyzeSettings, argv, prog="fewstep analyze")
    if settings.samples < 2 or settings.reference_steps < 2:
        raise ValueError("--samples and --reference-steps must be at least 2.")
    check_output_folder(settings.output)
    mdp, denoiser, agent = distilled_agent(settings)
    generator = torch.Generator(mdp.device).manual_seed(settings.seed)
    episodes = mdp.episodes(settings.samples, generator)
    denoiser = denoiser.under(episodes.condition)
    noise = episodes.initial(settings.samples, generator)
    factor = -(-settings.reference_steps // mdp.steps)
    reference = Reference(ddim(mdp.schedule.refined(factor)), denoiser, noise)
    solvers = {"base": agent.base, "distilled": agent.tableau}
    with torch.no_grad():
        states = {
            name: torch.stack(list(tableau.states(denoiser, noise)))
            for name, tableau in solvers.items()
        }
    for name, tableau in solvers.items():
        check_samples(states[name], settings, tableau)
    report = agent.report()
    figures: dict[str, Any] = {
        "correlation": correlation_figure(reference.times, reference.similarity),
        "trajectory": paths_figure(
            {
                "reference": (reference.times, reference.states),
                **{name: (agent.base.times, path) for name, path in states.items()},
            },
            coordinates_of(noise, settings.seed),
        ),
        **{
            name.removesuffix(".png"): panels_figure([(panel, panel.curves) for panel in panels])
            for name, panels in report.figures.items()
        },
    }
    for name, figure in figures.items():
        save_figure(figure, settings.output / f"{name}.png")
    errors = {
        name: float((path[-1] - reference.states[-1]).square().mean())
        for name, path in states.items()
    }
    neighbours = {
        output: float(np.diagonal(matrix, offset=1).mean())
        for output, matrix in reference.similarity.items()
    }
    write_json(
        settings.output / "analysis.json",
        {
            "env": mdp.target.name,
            "solver": agent.base.name,
            "nfe": agent.nfe,
            "seed": settings.seed,
            "reference_steps": reference.steps,
            "squared_error_to_reference": errors,
            "cosine_similarity_of_neighbours": neighbours,
            **agent.state(),
        },
    )
    print_report_tables(report)
    console.print(
        f"Squared error to {reference.steps} steps of DDIM from the same noise: "
        f"{agent.base.name} {errors['base']:.2e}, distilled {errors['distilled']:.2e}"
    )
    console.out(f"Pictures and analysis.json: {settings.output}")


def distilled_agent(settings: AnalyzeSettings) -> tuple[DiffusionMDP, Denoiser, Any]:
    """Return the environment, the denoiser and a distilled solver: the run's own, or a new one."""
    table = tableau_file(settings.denoiser)
    chosen = (settings.solver, settings.steps, settings.schedule, settings.schedule_options)
    made = run_of(settings.denoiser)
    distilled = made is not None and made.agent == "dode"
    if table is not None and distilled and all(choice is None for choice in chosen):
        run = resumed_settings(table.parent, settings.body)
        mdp = build_mdp(run)
        body = foreign_body(run.run.body, run.run.body_options)
        denoiser = Denoiser.load(table.parent / "denoiser.safetensors", mdp.device, body)
        check_body(denoiser, mdp.shape, settings.body)
        denoiser = under_terms(under_terms(denoiser, run.run), settings)
        return mdp, denoiser, AGENTS["dode"].load(table, mdp, denoiser=denoiser)
    solver = settings.solver or "ddim"
    mdp, denoiser, _ = load(dataclasses.replace(settings, solver=solver))
    agent = AGENTS["dode"](
        mdp, denoiser, solver=solver, solver_options=settings.solver_options, seed=settings.seed
    )
    agent.learn()
    return mdp, denoiser, agent


class Reference:
    """A fine DDIM run from the same noise.

    Attributes:
        steps: how many.
        times: (M,) the times of the states that are kept, and the last one.
        states: (M, N, *shape).
        similarity: for both outputs, mean cosine similarity between all kept times but the last,
            (M - 1, M - 1).
    """

    def __init__(self, tableau: Tableau, denoiser: Denoiser, noise: Tensor) -> None:
        self.steps = tableau.steps
        kept = np.unique(np.linspace(0, tableau.steps, SHOWN_TIMES + 1).round().astype(int))
        self.times = tableau.times[kept]
        with torch.no_grad():
            wanted = set(kept.tolist())
            states = [
                state
                for index, state in enumerate(tableau.states(denoiser, noise))
                if index in wanted
            ]
            self.states = torch.stack(states)
            self.similarity = {
                "epsilon": self._similarity(denoiser.epsilon),
                "sample": self._similarity(denoiser.denoised),
            }

    def _similarity(self, output: Any) -> np.ndarray:
        outputs = torch.stack(
            [
                output(state, float(time)).flatten(1)
                for state, time in zip(self.states[:-1], self.times[:-1], strict=True)
            ]
        )
        unit = torch.nn.functional.normalize(outputs, dim=2)
        return torch.einsum("and,bnd->ab", unit, unit).div(unit.shape[1]).cpu().numpy()


def coordinates_of(noise: Tensor, seed: int) -> list[int]:
    """Choose two coordinates of a flattened sample to follow."""
    size = noise[0].numel()
    return sorted(np.random.default_rng(seed).choice(size, min(2, size), replace=False).tolist())
