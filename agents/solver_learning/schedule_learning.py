"""ScheduleLearning: learn which noise levels to visit, then tune the denoiser there.

The two stages of Huang, "Optimizing Few-step Sampler for Diffusion Probabilistic Model" (paper B;
MATH.md 3). Stage one moves the levels of the schedule so that the rollout ends where it should;
stage two tunes the denoiser on the levels it will be asked at. Paper B compares the rollout with
data, an objective whose optimum is a sampler that returns the mean of the data (MATH.md 3.6); the
default here compares it with a fine solver from the same noise, and needs no data.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...common.checkpoint import CheckpointError, counter
from ...envs import Schedule
from ..base import Agent, Environment
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau
from ..solvers import build_solver
from .distillation.teacher import Teacher, judge_teacher, make_teacher
from .no_data import NO_DATA, mdp_without_data
from .scheduling.descent import GIVEN, GRID, LEARNED, PROGRAMME, Descent
from .scheduling.objective import Objective, Slope
from .scheduling.plan import Plan, Position
from .scheduling.pool import Batch, Pool
from .scheduling.probe import check_differentiable
from .scheduling.starts import programme_for, starting_schedule
from .scheduling.tuning import Tuning
from .scheduling.weights import step_weights
from .settings import ScheduleSettings

# The origins of a schedule in words; their order is that of the numbers in the log.
_SCHEDULES = {
    GIVEN: "the environment's own schedule",
    GRID: "the grid to start from",
    PROGRAMME: "the dynamic programme's schedule",
    LEARNED: "the learned schedule",
}


class ScheduleLearning(Agent):
    """Learn the noise levels of a few-step sampler, then tune the denoiser on them.

    A round is one update of the levels (stage one) or of the denoiser (stage two); the stages
    alternate. Timesteps are the network calls on single samples of both, and of the teacher; what
    only measures, on held-out noise, is not counted.

    With a teacher each stage keeps what there was before it unless it found something better: the
    error of finished samples from the pretrained network's fine solver, on noise that was not
    learned on, has to fall, and not by chance (`fewstep.agents.solver_learning.selection`).
    Compared are the
    environment's own schedule, the start, and the best levels that the descent met; then the
    network before and during its tuning, whatever that minimises. `returned` and `tuned` say what
    it was. With target="data", which is there to reproduce paper B, nothing is compared: what
    was learned last is returned, and may be worse than what was given.

    Args:
        env: the environment; its schedule gives the number of steps and the ends.
        denoiser: the network; stage two trains it, in place.
        settings: see `ScheduleSettings`; the remaining arguments are `Agent`'s.

    Attributes:
        converged: whether the alternation ended because the levels stayed.
        collapsed: whether stage one ended because the samples' variance fell.
        returned: where `schedule` comes from: "given" (the environment's own), "grid" or
            "programme" (the start), or "learned".
        tuned: whether the network that samples is a tuned one, or the one that was given.
        errors: mean squared errors per coordinate of finished samples from the fine solver's, on
            noise that was neither learned on nor chosen by: of the environment's own schedule
            ("given"), the start ("grid", "programme"), the best levels of the last stage one
            ("learned"), the tuned network of the last stage two ("tuned") and of what is returned
            ("returned"); and the teacher's from a finer solver's ("teacher"). With target="data"
            those of rollouts at the smallest level from the noised data.

    Raises:
        ValueError: a setting that is unknown or out of range, settings that do not go together,
            fewer than three noise levels, a stochastic solver, or a network that is not
            differentiable in its time.
    """

    name = "schedule"

    settings: ScheduleSettings
    Settings = ScheduleSettings

    def __init__(self, env: Environment, denoiser: Denoiser, *args: Any, **arguments: Any) -> None:
        super().__init__(env, denoiser, *args, **arguments)
        settings, tuning = self.settings, self.settings.tuning
        if self.mdp.target.name == NO_DATA:
            settings.check_without_data()

        like = starting_schedule(self.mdp.schedule, settings.start, settings.integer_times)
        reading = settings.reading if settings.gradient == "eq14" else None
        self._objective = Objective(
            self._build, like, reading, settings.gamma, settings.diffusion_share
        )
        self._base = self._build(like)
        if not self._base.linear:
            raise ValueError(
                f"The solver '{self._base.name}' adds noise or clamps its predictions; a schedule "
                "is learned for a deterministic one, such as euler, dpm-solver++-2m or ipndm."
            )
        self.teacher = self._new_teacher()
        if settings.gradient != "none":
            check_differentiable(self.denoiser, like.times[:-1].tolist(), self.mdp.shape)
        # Stage two changes the network; the teacher is the network as it was given.
        self._original = (
            copy.deepcopy(self.denoiser).requires_grad_(False) if tuning.rounds else self.denoiser
        )
        wanted = self.teacher if settings.target == "teacher" else None
        self._pool = Pool(
            self.mdp, like, wanted, self._original, settings.batch_size, settings.batches, self.seed
        )
        self._programme = programme_for(settings.start, like, settings.integer_times)
        same = torch.allclose(like.times, self.mdp.schedule.times, rtol=1e-9, atol=0.0)
        kind = PROGRAMME if self._programme else GIVEN if same else GRID
        self._descent = Descent(
            self._objective,
            self._pool,
            given=self.mdp.schedule,
            start=kind,
            space=settings.space,
            moves=settings.gradient != "none",
            integer_times=settings.integer_times,
            rounds=1 if settings.gradient == "none" else settings.schedule_rounds,
            learning_rate=settings.level_rate,
            collapse=settings.collapse,
        )
        self._tuning = Tuning(
            self.denoiser,
            self._pool,
            weights=settings.tuning_weights,
            rounds=tuning.rounds,
            batch_size=tuning.batch_size,
            learning_rate=tuning.learning_rate,
            last_weight=tuning.last_weight,
            max_grad_norm=tuning.max_grad_norm,
            ema=tuning.ema,
        )
        self.averaged, self.optimizer = self._tuning.averaged, self._tuning.optimizer
        self._plan = Plan(
            settings.alternations,
            self._descent.rounds,
            tuning.rounds,
            pool_calls=self._pool.calls,
            programme_calls=self._programme.calls * settings.batch_size if self._programme else 0,
            programme_again=settings.gradient == "none",
            level_calls=(
                self._objective.calls(self._base) * settings.batch_size
                if settings.gradient != "none"
                else 0
            ),
            tuning_calls=self._tuning.calls(self._base),
        )

        self.converged = False
        self.errors: dict[str, float] = {}
        self._alternation = 0

    @classmethod
    def without_data(
        cls, denoiser: Denoiser, schedule: Schedule, shape: tuple[int, ...], **settings: Any
    ) -> ScheduleLearning:
        """Learn for a pretrained network alone: with a teacher, neither stage needs data.

        Args:
            denoiser: the network; its device is where everything is done.
            schedule: gives the number of steps and the ends, on the denoiser's process.
            shape: of one sample.
            settings: the constructor's keyword arguments.
        """
        return cls(mdp_without_data(denoiser, schedule, shape), denoiser, **settings)

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

    @property
    def levels(self) -> Tensor:
        """The noise levels sigma / alpha as they are now, (T,) descending, without a final 0."""
        return self._descent.levels

    @property
    def weights(self) -> Tensor:
        """Lambda of the levels, (T - 1,); see `solver_learning.scheduling.weights`."""
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
        if not self.done or "returned" not in self.errors:
            return f"Training is not over; so far there is {what}."
        return (
            f"Returned, as the best on held-out noise: {what}. Mean squared error per coordinate: "
            f"{self.errors['returned']:.2e}, of what was given {self.errors['given']:.2e}."
        )

    @property
    def _judges(self) -> bool:
        return self.settings.target == "teacher"

    @property
    def collapsed(self) -> bool:
        """Whether stage one ended because the samples' variance fell."""
        return self._descent.collapsed

    @property
    def done(self) -> bool:
        """Whether all alternations are done, the levels stayed, or they had collapsed."""
        over = self.collapsed and self._alternation > 0
        return over or self.converged or self._alternation >= self.settings.alternations

    @property
    def planned_rounds(self) -> int:
        """Rounds of all alternations."""
        return self._plan.rounds

    @property
    def timesteps_per_round(self) -> int:
        """Denoiser calls on single samples of the next round."""
        return self._plan.calls(self._position, 1, first=not self.num_timesteps)

    def timesteps_until(self, rounds: int) -> int:
        """Return the timesteps left until `rounds` rounds are done, if none is cut short."""
        left = 0 if self.done else max(rounds - self.rounds, 0)
        return self._plan.calls(self._position, left, first=not self.num_timesteps)

    @property
    def _position(self) -> Position:
        return Position(self._alternation, self._descent.updates, self._tuning.updates)

    # -- learning ------------------------------------------------------------------------------

    def train_round(self) -> dict[str, Tensor]:
        """Do one update of the stage that it is at."""
        cost = self.timesteps_per_round
        metrics = self._tune() if self._descent.done else self._learn_levels()
        self.num_timesteps += cost
        if self._descent.done and self._tuning.done:
            self.errors["returned"] = self._reported_error()
            metrics["returned_error"] = torch.tensor(self.errors["returned"])
            self._alternation += 1
            self._descent.updates = self._tuning.updates = 0
        return {f"train/{key}": value for key, value in metrics.items()}

    def _tune(self) -> dict[str, Tensor]:
        """Update the denoiser once; compare it with the one before the stage."""
        denoiser = self.sampling_denoiser
        if self._judges and self._tuning.updates == 0:
            if self._alternation == 0 and not self._descent.rounds:
                self._descent.skip(denoiser)
                self.errors.update(self._descent.compared)
            self._tuning.begin(self._descent.errors(denoiser, self._pool.held_out))
        metrics = self._tuning.update(self.tableau, self.levels, self.generator)
        if self._judges:
            held_out = self._tuning.judge(
                lambda: self._descent.errors(denoiser, self._pool.held_out)
            )
            if held_out is not None:
                metrics["held_out_error"] = torch.tensor(held_out)
        if self._tuning.done:
            if self._judges:
                self.errors["tuned"] = self._reported_error()
            self._tuning.finish()
            metrics["tuned"] = torch.tensor(float(self.tuned))
        return metrics

    def _reported_error(self) -> float:
        """Return the sampler's error on the noise that is only reported on."""
        return float(self._descent.errors(self.sampling_denoiser, self._pool.reported).mean())

    def _learn_levels(self) -> dict[str, Tensor]:
        """Move the levels once; measure before and after the stage."""
        denoiser = self.sampling_denoiser
        if self._descent.updates == 0:
            if (
                self._alternation == 0
                and self.settings.check_teacher
                and self.settings.target == "teacher"
            ):
                self.errors["teacher"] = self._judge_teacher()
            found = None
            if self._programme and self._plan.begins_with_programme(self._alternation):
                found = self._programme.levels(self._pool, denoiser, self._base)
            self._descent.begin(denoiser, self._alternation == 0, found)
            self.errors.update(self._descent.compared)
        metrics = self._descent.update(denoiser, self.generator)
        if self._descent.done:
            self.errors.update(self._descent.compared)
            metrics.update({f"{name}_error": e for name, e in self._descent.compared.items()})
            metrics["returned"] = float(list(_SCHEDULES).index(self.returned))
            self.converged = self._alternation > 0 and self._descent.moved < self.settings.tolerance
        return {key: torch.tensor(value) for key, value in metrics.items()}

    def _judge_teacher(self) -> float:
        """Return the teacher's error; warn if it is no better than the sampler at the start."""
        like, noise = self._objective.like, self._pool.held_out[-1].noise
        return judge_teacher(
            self.teacher,
            self._base,
            like,
            self.settings.scale,
            self._original,
            noise,
            self.settings.integer_times,
        )

    def slope(self, batch: Batch) -> Slope:
        """Return stage one's objective on a batch, with its derivatives by the levels."""
        return self._descent.slope(self.sampling_denoiser, batch, self.generator)

    def make_batches(self) -> list[Batch]:
        """Return the pool, made once: batches to learn on, as many to choose by, one to report.

        They follow from the seed and the network as it was given: a resumed run makes them again.
        """
        return self._pool.batches

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what training changed."""
        tuned = self._original is not self.denoiser
        return {
            **self._descent.state(),
            **self._tuning.state(),
            "original": self._original.body.state_dict() if tuned else None,
            "position": list(self._position),
            "converged": self.converged,
            "errors": self.errors,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        if "origin" not in state:
            raise CheckpointError(
                "The checkpoint comes from a version of fewstep whose schedule learning did not "
                "compare what it learned with what it was given, and cannot go on from there: its "
                "schedule.json and denoiser still serve, or learn anew in another folder."
            )
        self._tuning.load_state(state)
        counts = dict(zip(Position._fields, state["position"], strict=True))
        position = [counter(counts, name, "the checkpoint") for name in Position._fields]
        # None: saved by an agent without stage two.
        if self.optimizer is not None and state["original"] is not None:
            self._original.body.load_state_dict(state["original"])
        self._pool.forget()
        self._descent.load_state(state)
        self._alternation, self._descent.updates, self._tuning.updates = position
        self.converged = state["converged"]
        self.errors = state["errors"]
