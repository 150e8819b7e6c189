"""What a run shows of a solver agent: the numbers it learned, beside what there was before."""

from __future__ import annotations

from collections.abc import Mapping

from ...agents import DODE, BehaviorCloning, ScheduleLearning
from ...agents.base import Agent
from ...agents.policy_gradient.shortcut import ShortcutAgent
from ...agents.solver_learning.scheduling.levels import noise_levels
from ...agents.solver_learning.scheduling.weights import step_weights
from ...envs import Schedule
from ..run.folder import SCHEDULE, TABLEAU, RunFolder
from ..run.logs import read_metric
from .console import console, print_fit, print_levels
from .plots import lambdas_figure, save_figure, schedule_figure


def report_agent(agent: Agent, folder: RunFolder) -> None:
    """Show what a solver agent learned; of other agents there is nothing to show but samples."""
    if isinstance(agent, DODE):
        _report_fit(agent, folder)
    elif isinstance(agent, ScheduleLearning):
        _report_levels(agent, folder)


def save_sampler(agent: Agent, folder: RunFolder) -> None:
    """Write the table that an agent samples by so far, so that every command finds it.

    Cloning trains for any sampler, and D-ODE's table is its checkpoint.
    """
    if isinstance(agent, ScheduleLearning):
        agent.schedule.save(folder.path / SCHEDULE)
    if isinstance(agent, BehaviorCloning | DODE):
        return
    # One of a thousand steps takes 5 MB: written at every checkpoint only if it is learned.
    fixed = isinstance(agent, ShortcutAgent) and not agent.settings.policy.learn_std
    if not (fixed and (folder.path / TABLEAU).is_file()):
        agent.tableau.save(folder.path / TABLEAU)


def _report_fit(agent: DODE, folder: RunFolder) -> None:
    """Show what each step's parameters did, and what all of them did together."""
    times = agent.base.times.tolist()
    print_fit(agent.base.name, times, agent.fits, agent.errors)
    console.print(agent.verdict)
    save_figure(lambdas_figure(times, agent.lambdas), folder.path / "lambdas.png")
    state = agent.state()
    folder.update_results(errors=state["errors"], fits=state["fits"], returned=agent.returned)


def _report_levels(agent: ScheduleLearning, folder: RunFolder) -> None:
    """Show the levels beside those before, their weights, and how they were learned."""
    before = noise_levels(agent.mdp.schedule)
    print_levels(before.tolist(), agent.levels.tolist(), agent.weights.tolist(), agent.errors)
    console.print(agent.verdict)
    process, steps = agent.mdp.process, len(before) - 1
    named = {
        "learned": agent.levels,
        "Karras": noise_levels(Schedule.karras(process, steps, append_zero=False)),
        "uniform": noise_levels(Schedule.uniform(process, steps, end=process.t_min)),
    }
    progress = folder.path / "progress.csv"
    columns = {
        "error": "train/disc_loss",
        "error on held-out noise": "train/held_out_error",
        "L_diff": "train/diff_loss",
        "variance ratio": "train/variance_ratio",
    }
    history = {
        label: curve
        for label, column in columns.items()
        if (curve := read_metric(progress, column, "time/iterations")) is not None
    }
    levels = {name: value.numpy() for name, value in named.items()}
    weights = {name: step_weights(named[name]).numpy() for name in ("learned", "Karras")}
    save_figure(schedule_figure(levels, weights, history), folder.path / "schedule.png")
    folder.update_results(
        levels=agent.levels.tolist(),
        weights=agent.weights.tolist(),
        errors=agent.errors,
        returned=agent.returned,
        tuned=agent.tuned,
        converged=agent.converged,
        collapsed=agent.collapsed,
    )


def combine(
    floors: Mapping[str, float],
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
) -> dict[str, dict[str, float | None]]:
    """Arrange scores as results.json holds them: metric -> before, after, floor."""
    return {
        name: {
            "before": before[name] if before else None,
            "after": after[name] if after else None,
            "floor": floor,
        }
        for name, floor in floors.items()
    }
