"""DistilRun: the stages of `fewstep distil`, each of which leaves a file in the output folder.

distilled/
    config.json          what was asked for; another run there has to ask for the same
    times.safetensors    the training of schedule learning
    weights.json         D-ODE's, a table
    scheduler/           what the pipeline loads
    pictures.png errors.png results.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from typing import Any

from stable_baselines3.common.logger import Logger
from tqdm import tqdm

from ...agents.denoisers.denoiser import Denoiser
from ...agents.pipelines.judging import AFTER, BEFORE, OWN, TEACHER, Judgement, judge
from ...agents.pipelines.learning import Distillation
from ...agents.pipelines.open import OpenedPipeline
from ...agents.pipelines.plan import Plan, counted
from ...agents.pipelines.prompts import Prompts
from ...agents.pipelines.write import save_scheduler
from ...agents.samplers.tableau import Tableau
from ...agents.solver_learning.agent import SolverAgent
from ...common.files import remove_leftovers
from ...envs import Schedule
from ..reports.distilled import errors_by_step, print_summary, side_by_side
from ..reports.plots import save_figure
from ..settings.distil import DistilFlags
from .folder import read_record, write_json
from .interrupts import Interrupts
from .run import InterruptedRun

FILES = {"schedule": "times.safetensors", "dode": "weights.json"}
# Pictures shown side by side.
PICTURES = 6
# What a run that goes on may ask for differently.
_UNTOLD = ("output", "dry_run", "download", "checkpoint_seconds", "device")


class DistilRun:
    """What learns, and where it writes.

    Args:
        opened: the pipeline.
        denoiser: of it, under the prompts and the guidance.
        given: the times to start from.
        prompts: to learn from, and held-out ones.
        flags: of the command.
    """

    def __init__(
        self,
        opened: OpenedPipeline,
        denoiser: Denoiser,
        given: Schedule,
        prompts: Prompts | None,
        flags: DistilFlags,
    ) -> None:
        self.opened, self.denoiser, self.given = opened, denoiser, given
        self.prompts, self.flags = prompts, flags
        self.distillation = self._distillation(denoiser)
        self.folder = flags.output
        self._began = time.monotonic()

    def _distillation(self, denoiser: Denoiser) -> Distillation:
        return Distillation(denoiser, self.given, self.prompts, self.flags.learning)

    def plan(self) -> Plan:
        """Count the evaluations of the network that all stages and the results take."""

        def work(stand_in: Denoiser) -> None:
            distillation = self._distillation(stand_in)
            tables = {BEFORE: distillation.base}
            for agent in distillation.agents():
                agent.set_logger(Logger(None, []))
                agent.learn()
                tables[AFTER] = agent.tableau
            self._judge(stand_in, tables)

        return counted(self.denoiser, work)

    def carry_through(self, plan: Plan) -> dict[str, Any]:
        """Do whatever is not done yet; return the results."""
        self._take_folder()
        body: Any = self.denoiser.body
        bar = tqdm(
            total=plan.total, desc="distil", unit="call", unit_scale=True, dynamic_ncols=True
        )
        body.on_call = lambda samples, _: bar.update(samples)
        tables = {BEFORE: self.distillation.base}
        try:
            for agent in self.distillation.agents():
                self._learn(agent)
                tables[AFTER] = agent.tableau
            judgement = self._judge(self.denoiser, tables)
        finally:
            body.on_call = None
            bar.close()
        return self._report(agent, tables[AFTER], judgement)

    def _take_folder(self) -> None:
        """Make the folder, or see that what is there is of the same run.

        Raises:
            ValueError: it holds another run's files.
        """
        config, file = self.config(), self.folder / "config.json"
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder} is not empty, and no run of distil: choose another folder."
                )
            write_json(file, config)
            return
        there = read_record(file)
        for key in config:
            if there.get(key) != config[key]:
                raise ValueError(
                    f"{self.folder} holds a run with {key} {there.get(key)!r}, here it is "
                    f"{config[key]!r}: choose another folder for this one."
                )
        remove_leftovers(self.folder)

    def config(self) -> dict[str, Any]:
        """Return what is learned, for what, as JSON values."""
        tree = dataclasses.asdict(self.flags)
        learning = tree.pop("learning")
        for name in (*_UNTOLD, "prompts", "held_out"):
            tree.pop(name)
        text = json.dumps(None if self.prompts is None else list(self.prompts))
        values = {
            **tree,
            **learning,
            "guidance": _guidance(self.opened, self.denoiser),
            "prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
        }
        return json.loads(json.dumps(values, default=str))

    def _learn(self, agent: SolverAgent) -> None:
        """Train an agent for its own budget, from its checkpoint if there is one."""
        checkpoint = self.folder / FILES[agent.name]
        if checkpoint.is_file():
            agent.resume(checkpoint)
        if agent.done:
            return
        agent.set_logger(Logger(None, []))
        saved = time.monotonic()
        with Interrupts() as interrupts:

            def after_round(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
                nonlocal saved
                due = time.monotonic() - saved >= self.flags.checkpoint_seconds
                if due or interrupts.requested:
                    agent.save(checkpoint)
                    saved = time.monotonic()
                return not interrupts.requested

            agent.learn(callback=after_round, reset_num_timesteps=False)
            agent.save(checkpoint)
        if interrupts.requested:
            raise InterruptedRun

    def _judge(self, denoiser: Denoiser, tables: dict[str, Tableau]) -> Judgement:
        return judge(denoiser, self.given, tables, self.prompts, self.flags.learning)

    def _report(self, agent: SolverAgent, table: Tableau, judgement: Judgement) -> dict[str, Any]:
        """Write the scheduler, the pictures and results.json; print what there is to know."""
        save_scheduler(table, self.denoiser, self.folder / "scheduler")
        order = [OWN, BEFORE, AFTER, TEACHER]
        family = self.opened.family
        pictures = {name: family.decoded(judgement.samples[name][:PICTURES]) for name in order}
        save_figure(side_by_side(pictures, self._titles(judgement)), self.folder / "pictures.png")
        save_figure(errors_by_step(judgement.by_step), self.folder / "errors.png")
        levels = [table.process.levels(t) for t in table.times[:-1].tolist()]
        summary = judgement.summary()
        results = {
            "pipeline": self.flags.pipeline,
            "table": table.name,
            "steps": table.steps,
            "evaluations": {name: judgement.calls[name] for name in order},
            "errors": summary,
            "error_by_step": {name: by[1] for name, by in judgement.by_step.items()},
            "timesteps": [self.denoiser.network_time(t) for t in table.times[:-1].tolist()],
            "sigmas": [sigma / alpha if alpha else None for alpha, sigma in levels],
            "held_out_prompts": None if self.prompts is None else self.prompts.held_out,
            "verdict": agent.report().sentence,
            "seconds": time.monotonic() - self._began,
        }
        write_json(self.folder / "results.json", results)
        where = "held-out noise" if self.prompts is None else "held-out prompts"
        print_summary(f"Errors to {judgement.calls[TEACHER]} evaluations, {where}", summary)
        return results

    def _titles(self, judgement: Judgement) -> list[str]:
        count = min(PICTURES, len(judgement.samples[TEACHER]))
        if self.prompts is None:
            return [str(i + 1) for i in range(count)]
        return [self.prompts.held_out[i % len(self.prompts.held_out)] for i in range(count)]


def _guidance(opened: OpenedPipeline, denoiser: Denoiser) -> float:
    """Return the guidance that is learned for, be it of two halves or told to the network."""
    if opened.family.splits and denoiser.conditioning is not None:
        return denoiser.conditioning.guidance
    return opened.family.guidance
