"""ScheduleLearning: learn which noise levels to visit, then tune the denoiser there.

The two stages of Huang (2024), "Optimizing Few-step Sampler for Diffusion Probabilistic Model"
(MATH.md 3). Stage one moves the levels of the schedule so that the rollout ends where it should;
stage two tunes the denoiser on the levels it will be asked at. Both compare the rollout with a fine
solver from the same noise, and need no data. The paper compares it with data, an objective whose
optimum is a sampler that returns the mean of the data (MATH.md 3.6): see `scheduling.paper`.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ...common.checkpoint import counter
from ...envs import Schedule
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..report import Panel, Report
from ..samplers.tableau import Tableau
from ..solvers import build_solver
from .agent import SolverAgent, comparison
from .distillation.teacher import Teacher, judge_teacher, make_teacher
from .scheduling.assembly import (
    make_descent,
    make_objective,
    make_pool,
    make_programme,
    make_tuning,
)
from .scheduling.descent import GIVEN, GRID, LEARNED, PROGRAMME
from .scheduling.levels import noise_levels, step_weights, with_signal
from .scheduling.objective import Slope
from .scheduling.pool import Batch
from .scheduling.probe import check_differentiable
from .scheduling.starts import starting_schedule
from .settings import ScheduleSettings

# The origins of a schedule in words; their order is that of the numbers in the log.
_SCHEDULES = {
    GIVEN: "the environment's own schedule",
    GRID: "the grid to start from",
    PROGRAMME: "the dynamic programme's schedule",
    LEARNED: "the learned schedule",
}


class ScheduleLearning(SolverAgent):
    """Learn the noise levels of a few-step sampler, then tune the denoiser on them.

    A round is one update of the levels (stage one) or of the denoiser (stage two); the stages
    alternate. Timesteps are all network calls on single samples, those of the teacher and those
    that only measure among them. A resumed run asks the teacher again, and counts that again.

    Each stage keeps what there was before it unless it found something better: the error of
    finished samples from the pretrained network's fine solver, on noise that was not learned on,
    has to fall, and not by chance (`fewstep.agents.selection`). Compared are the
    environment's own schedule, the start, and the best levels that the descent met; then the
    network before and during its tuning, whatever that minimises. `returned` and `tuned` say what
    it was. With target="data" nothing is compared: what was learned last is returned, and may be
    worse than what was given.

    Args:
        env: the environment; its schedule gives the number of steps and the ends. Where no signal
            is left at its first time the noise level has no end: there the log-SNR -5.1 is taken.
        denoiser: the network; stage two trains it, in place.
        *args: the settings, see `ScheduleSettings`.
        **arguments: single settings by name, and `Agent`'s remaining arguments.

    Attributes:
        converged: whether the alternation ended because the levels stayed.
        errors: mean squared errors per coordinate of finished samples from the fine solver's, on
            noise that was neither learned on nor chosen by: of the environment's own schedule
            ("given"), the start ("grid", "programme"), the best levels of the last stage one
            ("learned"), the tuned network of the last stage two ("tuned") and of what is returned
            ("returned"); and the teacher's from a finer solver's ("teacher"). With target="data"
            those of rollouts at the smallest level from the noised data.
        optimizer: Adam on the denoiser; None without a stage two.
        averaged: the average of the denoiser's weights.

    Raises:
        ValueError: a setting that is unknown or out of range, settings that do not go together,
            fewer than three noise levels, a stochastic solver, or a network that is not
            differentiable in its time.
    """

    name = "schedule"
    grid = "karras"
    obeys_transitions = False
    budgets = ("schedule_rounds", "tuning_rounds")

    settings: ScheduleSettings
    Settings = ScheduleSettings

    def __init__(self, env: Environment, denoiser: Denoiser, *args: Any, **arguments: Any) -> None:
        super().__init__(env, denoiser, *args, **arguments)
        self.mdp = self.mdp.with_schedule(with_signal(self.mdp.schedule))
        settings = self.settings
        if self.mdp.conditional and settings.target == "data":
            raise ValueError(
                "target='data' is that of the publication, which knows no conditions: in a "
                "conditional environment learn with target='teacher'."
            )
        if not self.mdp.target.has_samples:
            settings.check_without_data()
        like = starting_schedule(self.mdp.schedule, settings.start, settings.integer_times)
        self._base = self._build(like)
        if not self._base.linear:
            raise ValueError(
                f"The solver '{self._base.name}' adds noise or clamps its predictions; a schedule "
                "is learned for a deterministic one, such as euler, dpm-solver++-2m or ipndm."
            )
        self._objective = make_objective(settings, self._build, like, self.mdp)
        self.teacher = self._new_teacher()
        if settings.gradient != "none":
            probed = self.denoiser.under_some()
            check_differentiable(
                probed,
                like.times[:-1].tolist(),
                self.mdp.shape,
                learner="Schedule learning",
                instead="take gradient='none' with start='trajectory-dp' or 'diffusion-dp'",
            )
        # Stage two changes the network; the teacher is the network as it was given.
        self._original = self.denoiser
        if settings.tuning.rounds:
            self._original = copy.deepcopy(self.denoiser).requires_grad_(False)
        self._pool = make_pool(settings, self.mdp, like, self.teacher, self._original, self.seed)
        self._programme = make_programme(settings, like)
        self._descent = make_descent(
            settings, self._objective, self._pool, self.mdp.schedule, self._programme is not None
        )
        self._tuning = make_tuning(settings, self.denoiser, self._pool)
        self.averaged, self.optimizer = self._tuning.averaged, self._tuning.optimizer
        self.converged = False
        self.errors = {}
        self._alternation = 0

    def _build(self, schedule: Schedule) -> Tableau:
        return build_solver(self.solver, schedule, self.denoiser, **self.solver_options)

    def _new_teacher(self) -> Teacher:
        """Build the teacher; of its states, those at the smallest level and the end are wanted."""
        teacher = make_teacher(
            self._base,
            self._objective.like,
            self.settings.teacher,
            self.settings.teacher_options or {},
            self.settings.scale,
            integer=self.settings.integer_times,
        )
        smallest = self._objective.rows(self._base) - 1
        return dataclasses.replace(teacher, targets=teacher.targets[smallest:])

    # -- what there is -------------------------------------------------------------------------

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module

    def networks(self) -> list[nn.Module]:
        """Return the networks whose calls are counted; the teacher's is one of its own."""
        return [*super().networks(), self._original]

    @property
    def levels(self) -> Tensor:
        """The noise levels sigma / alpha as they are now, (T,) descending, without a final 0."""
        return self._descent.levels

    @property
    def weights(self) -> Tensor:
        """Lambda of the levels, (T - 1,); see `solver_learning.scheduling.levels.step_weights`."""
        return step_weights(self.levels)

    @property
    def schedule(self) -> Schedule:
        """The schedule as it is now: give it to an environment, a solver or another agent."""
        return self._descent.schedule

    @property
    def tableau(self) -> Tableau:
        """The sampler: the solver on `schedule`."""
        return self._descent.tableau

    @property
    def returned(self) -> str:
        """Where `schedule` comes from: "given", "grid", "programme" or "learned"."""
        return self._descent.origin

    @property
    def tuned(self) -> bool:
        """Whether the network that samples is a tuned one."""
        return self._tuning.tuned

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why."""
        network = "the tuned network" if self.tuned else "the network as it was given"
        what = f"{_SCHEDULES[self.returned]}, with {network}"
        if not self._judges:
            return f"Returned without comparison, as target='data' asks: {what}."
        if not self.finished or "returned" not in self.errors:
            return f"Training is not over; so far there is {what}."
        return f"Returned, as the best on held-out noise: {what}. {comparison(self.errors)}"

    @property
    def _judges(self) -> bool:
        return self.settings.target == "teacher"

    @property
    def collapsed(self) -> bool:
        """Whether stage one ended because the samples' variance fell, with target="data"."""
        return self._descent.collapsed

    @property
    def budget(self) -> int:
        """Rounds of all alternations, if none is cut short."""
        settings = self.settings
        return settings.alternations * (settings.level_rounds + settings.tuning.rounds)

    @property
    def finished(self) -> bool:
        """Whether all alternations are done, the levels stayed, or they had collapsed."""
        over = self.collapsed and self._alternation > 0
        return over or self.converged or self._alternation >= self.settings.alternations

    @property
    def done(self) -> bool:
        """Whether it is `finished`: learning anew does not begin anew."""
        return self.finished

    # -- learning ------------------------------------------------------------------------------

    def step_sizes(self) -> list[str]:
        """Return the learning rates of the stages that there are."""
        sizes = []
        if self.settings.gradient != "none" and self.settings.schedule_rounds:
            sizes.append("schedule_learning_rate")
        return [*sizes, "tuning.learning_rate"] if self.settings.tuning.rounds else sizes

    def train_round(self) -> dict[str, Tensor]:
        """Update the levels, or where their stage is done the denoiser; then both anew."""
        metrics = self._tune() if self._descent.done else self._learn_levels()
        whole = self._descent.done and self._tuning.done
        if whole:
            self._alternation += 1
            self._descent.updates = self._tuning.updates = 0
        # A last stage one after which no stage two follows changed what is returned, too.
        if whole or self.finished:
            self.errors["returned"] = metrics["returned_error"] = self._reported_error()
        return {f"train/{key}": torch.as_tensor(value) for key, value in metrics.items()}

    def _learn_levels(self) -> dict[str, Any]:
        """Move the levels once; measure before and after the stage."""
        denoiser, descent = self.sampling_denoiser, self._descent
        if descent.updates == 0:
            self._begin_levels(denoiser)
        metrics: dict[str, Any] = dict(descent.update(denoiser, self.generator))
        if descent.done:
            self.errors |= descent.compared
            metrics |= {f"{name}_error": error for name, error in descent.compared.items()}
            metrics["returned"] = float(list(_SCHEDULES).index(self.returned))
            self.converged = self._alternation > 0 and descent.moved < self.settings.tolerance
        return metrics

    def _begin_levels(self, denoiser: Denoiser) -> None:
        """Measure the teacher, and find where the levels start."""
        first = self._alternation == 0
        if first and self.settings.check_teacher and self._judges:
            self.errors["teacher"] = self._judge_teacher()
        found = None
        # Levels that do not descend are found anew for each network.
        if first or self.settings.gradient == "none":
            found = self._find_levels(denoiser)
        self._descent.begin(denoiser, first, found)
        self.errors |= self._descent.compared

    def _find_levels(self, denoiser: Denoiser) -> list[Tensor] | None:
        """Return what the dynamic programme finds, or None for the other starts."""
        if self._programme is None:
            return None
        return self._programme.levels(self._pool, denoiser, self._base)

    def _skip_levels(self, denoiser: Denoiser) -> None:
        """Choose where the levels stay, where there is no stage one."""
        # Without comparison the grid is taken as it is; only a programme's has to be found.
        if self._judges or self._programme is not None:
            self._descent.skip(denoiser, self._find_levels(denoiser))
            self.errors |= self._descent.compared

    def _tune(self) -> dict[str, Any]:
        """Update the denoiser once; compare it with the one before the stage."""
        denoiser, descent, tuning = self.sampling_denoiser, self._descent, self._tuning
        if tuning.updates == 0 and self._alternation == 0 and not descent.rounds:
            self._skip_levels(denoiser)
        if self._judges and tuning.updates == 0:
            tuning.begin(descent.errors(denoiser, self._pool.held_out))
        metrics: dict[str, Any] = tuning.update(self.tableau, self.levels, self.generator)
        if self._judges:
            error = tuning.judge(lambda: descent.errors(denoiser, self._pool.held_out))
            metrics |= {} if error is None else {"held_out_error": error}
        if tuning.done:
            if self._judges:
                self.errors["tuned"] = self._reported_error()
            tuning.finish()
            metrics["tuned"] = float(self.tuned)
        return metrics

    def _reported_error(self) -> float:
        """Return the sampler's error on the noise that is only reported on."""
        return float(self._descent.errors(self.sampling_denoiser, self._pool.reported).mean())

    def _judge_teacher(self) -> float:
        """Return the teacher's error; warn if it is no better than the sampler at the start."""
        batch = self._pool.held_out[-1]
        return judge_teacher(
            self.teacher,
            self._base,
            self._objective.like,
            self.settings.scale,
            self._original,
            batch.noise,
            self.settings.integer_times,
            batch.condition,
        )

    def slope(self, batch: Batch) -> Slope:
        """Return stage one's objective on a batch, with its derivatives by the levels."""
        return self._descent.slope(self.sampling_denoiser, batch, self.generator)

    def make_batches(self) -> list[Batch]:
        """Return the pool, made once: batches to learn on, as many to choose by, one to report.

        They follow from the seed and the network as it was given: a resumed run makes them again.
        """
        return self._pool.batches

    # -- what a run shows and writes -----------------------------------------------------------

    def report(self) -> Report:
        """Return the levels beside those before, their weights, and how they were learned."""
        before, after = noise_levels(self.mdp.schedule), self.levels
        process, steps = self.mdp.process, len(before) - 1
        named = {
            "learned": after,
            "Karras": noise_levels(Schedule.karras(process, steps, append_zero=False)),
            "uniform": noise_levels(Schedule.uniform(process, steps, end=process.t_min)),
        }
        weights = {name: step_weights(named[name]) for name in ("learned", "Karras")}
        calls, last = [str(j + 1) for j in range(len(before))], ["-"]
        table = {
            "call": calls,
            "level before": before.tolist(),
            "level learned": after.tolist(),
            "lambda": [*self.weights.tolist(), *last],
        }
        history = {
            "error": "train/disc_loss",
            "error on held-out noise": "train/held_out_error",
            "L_diff": "train/diff_loss",
            "variance ratio": "train/variance_ratio",
        }
        panels = [
            _panel("noise level", named),
            _panel("weight lambda", weights),
            Panel("stage one", "update", logged=history, scale="log"),
        ]
        results = {
            "levels": after.tolist(),
            "weights": self.weights.tolist(),
            "errors": self.errors,
            "returned": self.returned,
            "tuned": self.tuned,
            "converged": self.converged,
            "collapsed": self.collapsed,
        }
        tables = {"What schedule learning did": table}
        return Report(self.verdict, results, tables, {"schedule.png": panels})

    def files(self) -> dict[str, Any]:
        """Return what a run writes beside each checkpoint: the table, and its schedule."""
        return {"schedule.json": self.schedule, **super().files()}

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what training changed."""
        tuned = self._original is not self.denoiser
        return {
            **self._descent.state(),
            **self._tuning.state(),
            "original": self._original.body.state_dict() if tuned else None,
            "position": [self._alternation, self._descent.updates, self._tuning.updates],
            "converged": self.converged,
            "errors": self.errors,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        names = ("alternation", "updates", "tuned")
        counts = dict(zip(names, state["position"], strict=True))
        position = [counter(counts, name, "the checkpoint") for name in names]
        self._tuning.load_state(state)
        # None: saved by an agent without stage two.
        if self.optimizer is not None and state["original"] is not None:
            self._original.body.load_state_dict(state["original"])
        self._pool.forget()
        self._descent.load_state(state)
        self._alternation, self._descent.updates, self._tuning.updates = position
        self.converged = state["converged"]
        self.errors = state["errors"]


def _panel(what: str, curves: dict[str, Tensor]) -> Panel:
    """Return a panel with one number for each network call."""
    lines = {name: (list(range(len(values))), values.tolist()) for name, values in curves.items()}
    return Panel(f"{what} of each call", "network call", lines, scale="log")
