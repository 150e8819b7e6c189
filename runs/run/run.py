"""A run: its stages, each of which leaves a file, so that a killed run goes on where it was.

behaviour cloning -> the agent's training -> scores before and after, results.json, pictures.
"""

from __future__ import annotations

import shlex
import time
from typing import Any

import torch
from stable_baselines3.common.logger import Logger

from ...agents import AGENTS, Denoiser
from ...agents.base import Agent
from ...agents.samplers.sampling import sample, sampler_of
from ...agents.samplers.tableau import Tableau
from ...common.distributed import Processes
from ...common.optimisation import TrainingDivergedError
from ...common.shapes import is_vector
from ...critics.metrics.evaluation import NOISE_SEED, Evaluation
from ...critics.metrics.features import FeatureExtractor
from ...envs import DiffusionMDP
from ..reports.console import console, print_results
from ..reports.features import features_for, real_distances
from ..reports.plots import (
    conditions_shown,
    curve_figure,
    pictured,
    samples_figure,
    save_figure,
    trajectories_figure,
)
from ..reports.results import combine, save_files, show_report
from ..settings.conditions import under_terms
from ..settings.environment import check_fits
from ..settings.foreign import check_body, foreign_body
from ..settings.sources import starting_denoiser
from ..settings.train import (
    CLONER,
    Settings,
    defaults,
)
from .building import CLONED, build_mdp, denoiser_of, taken_up
from .folder import RunFolder, flat
from .interrupts import Interrupts
from .logs import make_logger, read_live_metric
from .monitor import Monitor, finite
from .starting import starting_table
from .threads import threads


class InterruptedRun(Exception):  # noqa: N818 - not an error: the user asked for it
    """Ctrl-C: everything is saved."""


class Run:
    """One run: its settings, its folder, and the stages between them.

    Args:
        settings: resolved settings.
        folder: a new folder, or one to resume.
        mdp: the environment that the settings name, if it is built already.
    """

    def __init__(
        self, settings: Settings, folder: RunFolder, mdp: DiffusionMDP | None = None
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.processes = Processes.current()
        if mdp is None:
            # What the run started from may be gone by now.
            given = settings.run.adopts and folder.cloning.is_file()
            own = self._cloned("cpu") if given else None
            mdp = build_mdp(settings, own, folder.start)
        self.mdp = mdp
        self._began = time.monotonic()
        self._seconds_before = float(folder.results().get("seconds", 0.0))

    @property
    def seconds(self) -> float:
        """Wall time of the run, over all its processes."""
        return self._seconds_before + time.monotonic() - self._began

    def carry_through(self) -> dict[str, Any]:
        """Do whatever is not done yet; return the results.

        Of several processes only the first writes, evaluates, and has results to return.
        """
        few = 1 if is_vector(self.mdp.shape) else None
        with threads(self.settings.run.threads or few):
            return self._carry_through()

    def _carry_through(self) -> dict[str, Any]:
        run = self.settings.run
        console.print(f"{run.agent} on {self.mdp.target.name}, {self.mdp.steps} steps")
        console.out(f"Logs: {self.folder.path}")
        console.out(f"Curves: tensorboard --logdir {shlex.quote(str(self.folder.path.parent))}")
        self.evaluation = self.features = None
        if self.processes.first:
            self.features = self._new_features()
            self.evaluation = Evaluation(
                self.mdp.target,
                run.evaluation_samples,
                self.features,
                real_distances,
                self.mdp.conditional,
            )
        self.processes.wait()  # for features that the first may have trained
        if AGENTS[run.agent].takes_features and not self.processes.first:
            self.features = self._new_features()
        if not AGENTS[run.agent].needs_denoiser:
            agent, before = self.clone(), None
        else:
            if run.adopts:
                self.adopt_denoiser()
            else:
                self.clone()
            agent = self.finetune()
            before = self._cloned(self.mdp.device)
        return self.report(before, agent) if self.processes.first else {}

    def _new_features(self) -> FeatureExtractor | None:
        run = self.settings.run
        return features_for(
            self.mdp.target, inception_weights=run.inception_weights, data_dir=run.data_dir
        )

    # -- stages --------------------------------------------------------------------------------

    def clone(self) -> Agent:
        """Train a denoiser by behaviour cloning, or find it trained."""
        run = self.settings.run
        its = self.settings.cloning if AGENTS[run.agent].needs_denoiser else self.settings.agent
        denoiser = denoiser_of(self.mdp, run)
        agent = AGENTS[CLONER](self.mdp, denoiser, its, seed=run.seed)
        return self._learn(agent, self.folder.cloning)

    def _cloned(self, device: torch.device | str) -> Denoiser:
        """Load the denoiser that the agent starts from."""
        run = self.settings.run
        body = foreign_body(run.body, run.body_options)
        return under_terms(Denoiser.load(self.folder.cloning, device, body), run)

    def adopt_denoiser(self) -> None:
        """Copy the denoiser that the user names into the folder, once."""
        if self.processes.first and not self.folder.cloning.is_file():
            self._copy_denoiser()
        self.processes.wait()

    def _copy_denoiser(self) -> None:
        run = self.settings.run
        denoiser = starting_denoiser(run)
        assert denoiser is not None
        check_fits(denoiser, self.mdp, run.denoiser or run.pretrained or run.start_from)
        table = starting_table(run)
        if table is not None:
            table.save(self.folder.start)
        denoiser.save(self.folder.cloning)

    def finetune(self) -> Agent:
        """Train the agent from the cloned denoiser, or go on with it."""
        run = self.settings.run
        denoiser = self._cloned(self.mdp.device)
        check_body(denoiser, self.mdp.shape, run.body)
        kind = AGENTS[run.agent]
        seen = taken_up(run, self.folder.start)
        checkpoint = self.folder.path / kind.checkpoint_name
        if kind.takes_tableau and "tableau" not in seen and checkpoint.is_file():
            # The file that it came from may be gone.
            seen["tableau"] = kind.given_tableau(checkpoint)
        if kind.takes_features:
            seen["features"] = self.features
        agent = kind(self.mdp, denoiser, self.settings.agent, seed=run.seed + 1, **seen)
        return self._learn(agent, self.folder.checkpoint(agent))

    def _learn(self, agent: Agent, checkpoint: Any) -> Agent:
        """Train an agent for its own budget, from its checkpoint if there is one."""
        run, first = self.settings.run, self.processes.first
        self.processes.wait()
        if checkpoint.is_file():
            agent.resume(checkpoint)
        if agent.done:
            return agent
        progress = "progress.csv" if agent.name == run.agent else "cloning.csv"
        agent.set_logger(
            make_logger(self.folder.path, agent.name, progress, agent.num_timesteps)
            if first
            else Logger(None, [])
        )
        monitor = Monitor(
            checkpoint,
            run.checkpoint_seconds,
            agent.budget,
            self.evaluation,
            run.evaluations,
            {"env": run.env, "agent": agent.name, "steps": self.mdp.steps}
            | flat(agent.settings.to_tree()),
            on_save=lambda: self._saved(agent),
        )
        try:
            # The other processes leave Ctrl-C to the first, which tells them to stop.
            with monitor if first else Interrupts(ignore=True):
                agent.learn(
                    callback=monitor if first else None,
                    log_interval=run.log_interval,
                    reset_num_timesteps=False,
                )
        except TrainingDivergedError as error:
            error.args = (f"{error} {self._way_out(agent)}",)
            raise
        finally:
            agent.logger.close()
        # Also: the others wait here until the first has written what they read next.
        if self.processes.any(monitor.interrupted, self.mdp.device):
            raise InterruptedRun
        return agent

    def _way_out(self, agent: Agent) -> str:
        """Say how to go on after divergence: a resumed run would repeat it, step by step."""
        first_stage = agent.name != self.settings.run.agent
        prefix = "--pretrain." if first_stage else "--"
        flags = " or ".join(prefix + name.replace("_", "-") for name in agent.step_sizes())
        config = shlex.quote(str(self.folder.path / "config.json"))
        start = f"fewstep train --config {config}"
        run = self.settings.run
        preset = defaults(run.env, run.agent, run.preset).run
        # A body of one's own would be cloned, which does not go with a denoiser that is given.
        plain = all(getattr(run, name) == getattr(preset, name) for name in CLONED)
        if agent.needs_denoiser and plain and not run.adopts:
            start += f" --denoiser {shlex.quote(str(self.folder.cloning))}"
        smaller = f"and a smaller {flags}" if flags else "and other settings"
        return f"--resume would come to the same end; start anew with:  {start}  {smaller}."

    def _saved(self, agent: Agent) -> None:
        """Write what goes with a checkpoint."""
        save_files(agent, self.folder)
        self.folder.update_results(seconds=self.seconds)

    # -- what a person sees --------------------------------------------------------------------

    def report(self, before: Denoiser | None, agent: Agent) -> dict[str, Any]:
        """Score before and after; write results.json and the pictures; print the table."""
        console.print("Evaluating ...")
        assert self.evaluation is not None  # only the first process reports
        samplers = {"after": agent.sampler}
        if before is not None:
            samplers = {"before": (agent.starting_tableau(before), before), **samplers}
        draw = {
            name: sampler_of(*each, tuple(self.mdp.shape), self.mdp)
            for name, each in samplers.items()
        }
        draw["after"] = finite(draw["after"], agent)
        scores = {name: self.evaluation(draw[name]) for name in draw}
        self._pictures(samplers)
        show_report(agent.report(), self.folder)
        results = self.folder.update_results(
            env=self.settings.run.env,
            agent=agent.name,
            nfe=agent.nfe,
            seed=self.settings.run.seed,
            seconds=self.seconds,
            metrics=combine(self.evaluation.floors, scores.get("before"), scores["after"]),
        )
        print_results(results)
        console.out(f"Results, pictures and checkpoint: {self.folder.path}")
        return results

    def _pictures(self, samplers: dict[str, tuple[Tableau, Denoiser]]) -> None:
        count = pictured(self.mdp.shape)
        real = self.mdp.target.take(count)
        trajectories = {}
        for name, (tableau, denoiser) in samplers.items():
            generator = torch.Generator(self.mdp.device).manual_seed(NOISE_SEED)
            with torch.no_grad():
                states = sample(
                    tableau,
                    denoiser,
                    count,
                    shape=self.mdp.shape,
                    generator=generator,
                    return_trajectory=True,
                    mdp=self.mdp,
                    **conditions_shown(self.mdp, count),
                )
            trajectories[name] = states, tableau.times.tolist()
        panels = {name: states[-1] for name, (states, _) in trajectories.items()} | {"data": real}
        folder = self.folder.path
        save_figure(samples_figure(panels, real), folder / "samples.png")
        save_figure(trajectories_figure(trajectories, real), folder / "trajectories.png")
        curve = read_live_metric(folder / "progress.csv")
        if curve and self.evaluation is not None:
            figure = curve_figure(
                {self.settings.run.agent: curve},
                x="denoiser calls",
                y="sliced 2-Wasserstein",
                floor=self.evaluation.floors["sliced_wasserstein"],
            )
            save_figure(figure, folder / "curve.png")
