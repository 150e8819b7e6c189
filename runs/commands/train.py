"""`fewstep train` and `fewstep pretrain`: clone a denoiser, train an agent, show what it gained.

The stages of a run each leave a file, so a killed run goes on where it was:
behaviour cloning -> the agent's training -> scores before and after, results.json, pictures.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3.common.logger import Logger

from ...agents import AGENTS, Denoiser
from ...agents.base import Agent
from ...agents.denoisers.bodies import new_denoiser
from ...agents.samplers.sampling import sample, sampler_of
from ...agents.samplers.tableau import Tableau
from ...common.distributed import Processes
from ...common.files import remove_leftovers
from ...common.optimisation import TrainingDivergedError, seeded
from ...common.shapes import is_vector
from ...critics.metrics.evaluation import NOISE_SEED, Evaluation
from ...envs import DiffusionMDP
from ...envs.processes import NoiseProcess, make_process
from ..reports.console import console, print_results
from ..reports.features import features_for, real_distances
from ..reports.plots import curve_figure, pictured, samples_figure, save_figure, trajectories_figure
from ..reports.results import combine, save_files, show_report
from ..run.folder import RunFolder, flat
from ..run.interrupts import Interrupts
from ..run.joining import agreed_path, is_lost_peer, joined_processes
from ..run.logs import make_logger, read_live_metric
from ..run.monitor import Monitor, finite
from ..run.threads import threads
from ..settings.environment import build_environment, check_fits
from ..settings.foreign import check_body, foreign_body, is_foreign
from ..settings.sources import starting_denoiser
from ..settings.train import (
    CLONER,
    Settings,
    TrainSettings,
    defaults,
    parse,
    resumed_folder,
    resumed_settings,
)

# Settings of a denoiser that the run clones itself.
CLONED = ("body", "body_options", "prediction")


class InterruptedRun(Exception):  # noqa: N818 - not an error: the user asked for it
    """Ctrl-C: everything is saved."""


def main(argv: Sequence[str], agent: str | None = None) -> None:
    """Run `fewstep train` (or `fewstep pretrain`, which fixes the agent) with these flags."""
    with joined_processes() as processes:
        mdp, resume = None, resumed_folder(argv)
        if resume is not None:
            folder = RunFolder.reopen(resume[0])
            settings = resumed_settings(*resume)
            if processes.first:
                remove_leftovers(folder.path)
        else:
            settings = parse(argv, agent)
            mdp = check(settings)
            made = RunFolder.create(settings).path if processes.first else None
            folder = RunFolder(agreed_path(made, processes))
        try:
            Run(settings, folder, mdp).carry_through()
        except InterruptedRun:
            path = shlex.quote(str(folder.path))
            console.out(f"\nSaved. Go on with:  fewstep train --resume {path}")
            raise SystemExit(130) from None
        except KeyboardInterrupt:
            if folder.can_resume and processes.first:
                path = shlex.quote(str(folder.path))
                console.out(f"\nGo on from the last checkpoint:  fewstep train --resume {path}")
            raise
        except Exception as error:
            # Bad settings all processes refuse alike; what happens now may be this one's alone.
            if not processes.first and not (
                isinstance(error, RuntimeError) and is_lost_peer(error)
            ):
                print(f"fewstep: process {processes.rank}: {error}", file=sys.stderr)
            raise


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
            own = self._cloned("cpu") if self._adopts and folder.cloning.is_file() else None
            mdp = build_mdp(settings, own)
        self.mdp = mdp
        self._began = time.monotonic()
        self._seconds_before = float(folder.results().get("seconds", 0.0))

    @property
    def _adopts(self) -> bool:
        """Whether the run starts from a denoiser that the user names."""
        return self.settings.run.denoiser is not None or self.settings.run.pretrained is not None

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
        console.out(f"Curves: tensorboard --logdir {shlex.quote(str(run.log_dir))}")
        self.evaluation = None
        if self.processes.first:
            features = features_for(
                self.mdp.target, inception_weights=run.inception_weights, data_dir=run.data_dir
            )
            self.evaluation = Evaluation(
                self.mdp.target, run.evaluation_samples, features, real_distances
            )
        if not AGENTS[run.agent].needs_denoiser:
            agent, before = self.clone(), None
        else:
            if self._adopts:
                self.adopt_denoiser()
            else:
                self.clone()
            agent = self.finetune()
            before = self._cloned(self.mdp.device)
        return self.report(before, agent) if self.processes.first else {}

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
        return Denoiser.load(self.folder.cloning, device, foreign_body(run.body, run.body_options))

    def adopt_denoiser(self) -> None:
        """Copy the denoiser that the user names into the folder, once."""
        if self.processes.first and not self.folder.cloning.is_file():
            self._copy_denoiser()
        self.processes.wait()

    def _copy_denoiser(self) -> None:
        run = self.settings.run
        denoiser = starting_denoiser(run)
        assert denoiser is not None
        check_fits(denoiser, self.mdp, run.denoiser or run.pretrained)
        denoiser.save(self.folder.cloning)

    def finetune(self) -> Agent:
        """Train the agent from the cloned denoiser, or go on with it."""
        run = self.settings.run
        denoiser = self._cloned(self.mdp.device)
        check_body(denoiser, self.mdp.shape, run.body)
        agent = AGENTS[run.agent](self.mdp, denoiser, self.settings.agent, seed=run.seed + 1)
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
        rates = sorted(
            (n for n in flat(agent.settings.to_tree()) if n.endswith("learning_rate")), key=len
        )
        flags = " or ".join(prefix + name.replace("_", "-") for name in rates)
        config = shlex.quote(str(self.folder.path / "config.json"))
        start = f"fewstep train --config {config}"
        run = self.settings.run
        preset = defaults(run.env, run.agent, run.preset).run
        # A body of one's own would be cloned, which does not go with a denoiser that is given.
        plain = all(getattr(run, name) == getattr(preset, name) for name in CLONED)
        if agent.needs_denoiser and plain and not self._adopts:
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
        draw["after"] = finite(draw["after"], agent.num_timesteps)
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


def check(settings: Settings) -> DiffusionMDP:
    """Build all that the settings name, to refuse bad ones before a folder is made.

    Returns:
        The environment.

    Raises:
        ValueError: settings that do not go together, or are not possible.
    """
    run = settings.run
    denoiser = starting_denoiser(run)
    mdp = build_mdp(settings, denoiser)
    if denoiser is None:
        denoiser = denoiser_of(mdp, run)
    elif not AGENTS[run.agent].needs_denoiser:
        raise ValueError(
            "Behaviour cloning starts from nothing: --denoiser and --pretrained are for the other "
            "agents."
        )
    else:
        check_fits(denoiser, mdp, run.denoiser or run.pretrained)
        of_preset = defaults(run.env, run.agent, run.preset).run
        check_body(denoiser, mdp.shape, run.body)
        cloned = ("prediction",) if is_foreign(run.body) else CLONED
        for flag in cloned:
            if getattr(run, flag) != getattr(of_preset, flag):
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} is for a denoiser that is cloned; here one is given.")
        asked = run.process if run.process != of_preset.process else None
        if asked is not None and make_process(asked) != denoiser.process:
            raise ValueError(
                f"--process {asked} is not that of the given denoiser, {denoiser.process!r}; leave "
                "it out."
            )
    if run.inception_weights is not None and not run.inception_weights.is_file():
        raise FileNotFoundError(f"No Inception weights at {run.inception_weights}.")
    AGENTS[CLONER](mdp, denoiser, settings.cloning)
    AGENTS[run.agent](mdp, denoiser, settings.agent)
    return mdp


def build_mdp(settings: Settings, denoiser: Denoiser | None = None) -> DiffusionMDP:
    """Build the environment that the settings name.

    Args:
        settings: of the run.
        denoiser: the one that the run starts from, if it is loaded already.
    """
    run, processes = settings.run, Processes.current()
    denoiser = denoiser or starting_denoiser(run)
    if denoiser is not None:
        process: NoiseProcess | None = denoiser.process
    elif run.process is None or (run.schedule or "").endswith(".json"):
        process = None
    else:
        process = make_process(run.process)
    if run.download and not processes.first:
        processes.wait()  # for the files that the first is fetching
    mdp = build_environment(
        run.env,
        steps=run.steps,
        schedule=run.schedule,
        schedule_options=run.schedule_options,
        process=process,
        solver=settings.agent.solver or "",
        device=run.device,
        data_dir=run.data_dir,
        download=run.download,
        image_size=run.image_size,
        inpaint=run.inpaint,
        default_schedule=AGENTS[run.agent].grid,
    )
    if run.download and processes.first:
        processes.wait()
    return mdp


def denoiser_of(mdp: DiffusionMDP, run: TrainSettings) -> Denoiser:
    """Build the untrained denoiser that a run's settings name."""
    with seeded(run.seed):
        body = foreign_body(run.body, run.body_options)
    if body is None:
        return new_denoiser(mdp, run.seed, run.prediction, run.body, run.body_options)
    denoiser = new_denoiser(mdp, run.seed, run.prediction, body)
    check_body(denoiser, mdp.shape, run.body)
    return denoiser
