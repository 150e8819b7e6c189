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
import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..envs import Schedule
from ..envs.names import unknown_name
from .base import NO_DATA, Agent, Environment, mdp_without_data
from .denoiser import Denoiser
from .distillation.teacher import Teacher, judge_teacher, make_teacher
from .scheduling.adjoint import backpropagate
from .scheduling.levels import (
    EVEN,
    LevelMap,
    Space,
    check_levels,
    even_schedule,
    noise_levels,
    schedule_at,
)
from .scheduling.objective import Objective, Slope
from .scheduling.pool import Batch, data_batch, teacher_batch
from .scheduling.probe import check_differentiable
from .scheduling.programmes import diffusion_programme, trajectory_programme
from .scheduling.surrogate import Reading
from .scheduling.tuning import TuningWeights, tuning_loss
from .scheduling.watch import Watch
from .scheduling.weights import step_weights
from .solvers import Options, make_solver
from .training import Averaged, adam, frozen, learning_rate_schedule, set_learning_rate

LevelTarget = Literal["teacher", "data"]
Gradient = Literal["exact", "eq14", "none"]
Programme = Literal["diffusion-dp", "trajectory-dp"]
ENVIRONMENT = "environment"

# The dynamic programmes choose from a grid of so many levels.
GRID = 200

# Updates of the levels between two looks at held-out noise.
CHECK_INTERVAL = 10

# The step grows over so many updates: Adam's first ones go the whole rate along every parameter,
# which can strand levels at the noisy end where nothing pulls them back.
WARM_UP = 20


class ScheduleLearning(Agent):
    """Learn the noise levels of a few-step sampler, then tune the denoiser on them.

    A round is one update of the levels (stage one) or of the denoiser (stage two); the stages
    alternate. Timesteps are the network calls on single samples of both, and of the teacher; what
    only measures, on held-out noise, is not counted.

    Args:
        env: the environment; its schedule gives the number of steps and the ends.
        denoiser: the network; stage two trains it, in place.
        solver: the solver whose schedule is learned, any deterministic one of
            `fewstep.agents.solvers`; "euler" is paper B's.
        solver_options: its options.
        start: where the levels start: what a dynamic programme finds, "trajectory-dp" for the least
            errors of Euler's jumps between a teacher's states, which spares the gradient many a
            poor local optimum, or "diffusion-dp" for the least L_diff of paper B; "karras", paper
            B's, or another name of a schedule, between the environment's ends; or "environment",
            its own.
        space: the scale on which levels are parameters: "rho" (level^(1/7), Karras's), "log" or
            "sigma" (paper B's, badly scaled).
        target: what a rollout should end at: "teacher", where a fine solver ends from the same
            noise; "data", paper B's: the sample whose noising it started from. The optimum of the
            latter is a sampler that returns the mean of the data; training stops on the way there,
            see `collapse`.
        gradient: "exact", in memory independent of the number of steps; "eq14", paper B's estimate,
            for Euler's steps only; "none" stops at `start`.
        residual: how eq14 is read, see `fewstep.agents.scheduling.surrogate.Reading`: "rollout",
            "one-shot" or "convex"; the latter two need target="data".
        network_input: also of eq14: "moving", "rollout" or "noised"; the latter needs
            target="data".
        weight_term: also of eq14: add the change of Euler's weights.
        teacher: the teacher's solver.
        teacher_options: its options.
        scale: the teacher's steps for each step of the sampler; 5 to 30.
        integer_times: for networks that know whole noisings only: round the times of the teacher
            and of the dynamic programmes' grid; needs gradient="none".
        check_teacher: warn if the teacher is no better than the sampler at the start.
        gamma: weight of the rollout's error in stage one.
        diffusion_weight: weight of paper B's L_diff there, which needs data; None takes 1 for
            target="data" and 0 for "teacher", which it does not help.
        schedule_rounds: updates of the levels a stage; 50 to 500.
        schedule_learning_rate: of Adam on the levels' parameters, warmed up and then falling on a
            cosine; None takes 0.3 for the exact gradient and 0.1 for eq14, whose large steps do not
            descend.
        batch_size: rollouts an update; 100 to 1000.
        batches: how many such batches are taken by turns; as many more are held out to choose the
            best levels.
        tuning_rounds: updates of the denoiser a stage; 0 leaves it as it is.
        tuning_batch_size: real samples, or rollouts, an update.
        tuning_learning_rate: of Adam on the denoiser; 1e-5 to 1e-3.
        tuning_weights: what stage two minimises: "rollout", the distance of finished samples from
            the teacher's, through the whole chain; on real samples at the schedule's levels
            "lambda", paper B's L_diff, or "original", the loss of pretraining. None takes "rollout"
            for target="teacher" and "lambda" for "data".
        last_weight: weight of the smallest level beside lambda, which is of no level there.
        max_grad_norm: the denoiser's gradient is clipped here; None does not clip.
        ema: decay of the average of the denoiser's weights, 0 (none) to 1 (excluded); the averaged
            weights sample.
        alternations: how often the two stages are done at most.
        tolerance: they end before if stage one moved no level by this share.
        collapse: stage one ends, and goes back, when the samples' variance falls below this share
            of what it was; 0 never does.
        seed: seed of noise, data and training.
        verbose: see `Agent`, as the remaining arguments.

    Attributes:
        converged: whether the alternation ended because the levels stayed.
        collapsed: whether stage one ended because the samples' variance fell.
        errors: mean squared distances from the target, at the smallest level and on held-out noise:
            before ("start") and after ("learned") the last stage one, and after the last stage two
            ("tuned"); and the teacher's finished samples' from a finer solver's ("teacher").

    Raises:
        ValueError: a setting that is unknown or out of range, settings that do not go together,
            fewer than three noise levels, a stochastic solver, or a network that is not
            differentiable in its time.
    """

    name = "schedule"

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        *,
        solver: str = "euler",
        solver_options: Options | None = None,
        start: str = "trajectory-dp",
        space: str = "rho",
        target: str = "teacher",
        gradient: str = "exact",
        residual: str = "rollout",
        network_input: str = "moving",
        weight_term: bool = False,
        teacher: str = "heun",
        teacher_options: Options | None = None,
        scale: int = 10,
        integer_times: bool = False,
        check_teacher: bool = True,
        gamma: float = 1.0,
        diffusion_weight: float | None = None,
        schedule_rounds: int = 150,
        schedule_learning_rate: float | None = None,
        batch_size: int = 500,
        batches: int = 2,
        tuning_rounds: int = 300,
        tuning_batch_size: int = 256,
        tuning_learning_rate: float = 3e-4,
        tuning_weights: str | None = None,
        last_weight: float = 1.0,
        max_grad_norm: float | None = 1.0,
        ema: float = 0.99,
        alternations: int = 1,
        tolerance: float = 0.05,
        collapse: float = 0.7,
        seed: int = 0,
        verbose: int = 0,
        tensorboard_log: str | None = None,
    ) -> None:
        super().__init__(
            env,
            denoiser,
            solver=solver,
            solver_options=solver_options,
            seed=seed,
            verbose=verbose,
            tensorboard_log=tensorboard_log,
        )
        if tuning_weights is None:
            tuning_weights = "rollout" if target == "teacher" else "lambda"
        for what, value, known in (
            ("start", start, (*get_args(Programme), *EVEN, ENVIRONMENT)),
            ("target", target, get_args(LevelTarget)),
            ("gradient", gradient, get_args(Gradient)),
            ("tuning_weights", tuning_weights, get_args(TuningWeights)),
        ):
            if value not in known:
                raise unknown_name(what, value, known)
        self.start = start
        self.space: Space = space  # type: ignore[assignment]
        self.target: LevelTarget = target  # type: ignore[assignment]
        self.gradient: Gradient = gradient  # type: ignore[assignment]
        self.reading = Reading(residual, network_input, weight_term)  # type: ignore[arg-type]
        self.teacher_name = teacher
        self.teacher_options = dict(teacher_options or {})
        self.scale = scale
        self.integer_times = integer_times
        self.check_teacher = check_teacher
        self.gamma = gamma
        self.diffusion_weight = diffusion_weight
        self.schedule_rounds = schedule_rounds
        if schedule_learning_rate is None:
            schedule_learning_rate = 0.1 if gradient == "eq14" else 0.3
        self.schedule_learning_rate = schedule_learning_rate
        self.batch_size = batch_size
        self.batches = batches
        self.tuning_rounds = tuning_rounds
        self.tuning_batch_size = tuning_batch_size
        self.tuning_learning_rate = tuning_learning_rate
        self.tuning_weights: TuningWeights = tuning_weights  # type: ignore[assignment]
        self.last_weight = last_weight
        self.max_grad_norm = max_grad_norm
        self.alternations = alternations
        self.tolerance = tolerance
        self.collapse = collapse
        self._check_settings()

        self._like = self._starting_schedule()
        levels = noise_levels(self._like)
        self._map = LevelMap(float(levels[-1]), float(levels[0]), self.space)
        self._parameters = torch.nn.Parameter(self._map.parameters(levels))
        self._objective = Objective(
            lambda schedule: make_solver(
                self.solver, schedule, self.denoiser, **self.solver_options
            ),
            self._like,
            self.reading if gradient == "eq14" else None,
            gamma,
            self._diffusion_weight,
        )
        self._base = self._objective.build(self._like)
        if not self._base.linear:
            raise ValueError(
                f"The solver '{self._base.name}' adds noise or clamps its predictions; a schedule "
                "is learned for a deterministic one, such as euler, dpm-solver++-2m or ipndm."
            )
        self.teacher = self._new_teacher()
        if gradient != "none":
            check_differentiable(self.denoiser, self._like.times[:-1].tolist(), self.mdp.shape)
        # Stage two changes the network; the teacher is the network as it was given.
        self._original = (
            copy.deepcopy(self.denoiser).requires_grad_(False) if tuning_rounds else self.denoiser
        )
        self.averaged = Averaged(self.denoiser, ema if tuning_rounds else 0.0)
        self.optimizer = adam(self.denoiser.parameters()) if tuning_rounds else None
        self._descent = torch.optim.Adam([self._parameters])
        self._cosine = learning_rate_schedule("cosine")
        self._ema = ema

        self.converged = self.collapsed = False
        self.errors: dict[str, float] = {}
        self._alternation = self._updates = self._tuned = 0
        self._watch: Watch | None = None
        self._pool: list[Batch] = []
        self._move_to(self._parameters.detach())

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

    def _check_settings(self) -> None:
        """Raise ValueError for numbers out of range and settings that do not go together."""
        for what, least in (
            ("schedule_rounds", 0),
            ("batch_size", 2),
            ("batches", 1),
            ("tuning_rounds", 0),
            ("tuning_batch_size", 1),
            ("alternations", 1),
        ):
            if getattr(self, what) < least:
                raise ValueError(f"{what} must be at least {least}, got {getattr(self, what)}.")
        for what in ("gamma", "last_weight", "tolerance", "collapse", "_diffusion_weight"):
            if not 0 <= getattr(self, what) < math.inf:
                raise ValueError(
                    f"{what.lstrip('_')} must be a finite number >= 0, got {getattr(self, what)}."
                )
        for what in ("schedule_learning_rate", "tuning_learning_rate"):
            if not 0 < getattr(self, what) < math.inf:
                raise ValueError(f"{what} must be positive and finite, got {getattr(self, what)}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None; got {self.max_grad_norm}.")
        if not self.planned_rounds:
            raise ValueError(
                "There is nothing to do: schedule_rounds and tuning_rounds are both 0."
            )
        if self.tuning_weights == "rollout" and self.target != "teacher":
            raise ValueError("tuning_weights='rollout' needs target='teacher'.")
        if self.integer_times and (self.gradient != "none" or self.start in EVEN):
            raise ValueError(
                "integer_times leaves nothing to differentiate: take gradient='none', and start "
                "from a dynamic programme or the environment's schedule."
            )
        if self.gradient == "eq14":
            if self.solver not in ("euler", "ddim"):
                raise ValueError(
                    f"gradient='eq14' is derived for Euler's steps: take solver='euler' or 'ddim' "
                    f"instead of '{self.solver}', or gradient='exact'."
                )
            if self.reading.needs_data and self.target != "data":
                raise ValueError(
                    f"residual='{self.reading.residual}' with network_input="
                    f"'{self.reading.input}' compares with real samples: it needs target='data'."
                )
        if self.mdp.target.name == NO_DATA:
            users = {
                f"tuning_weights='{self.tuning_weights}'": self.tuning_weights != "rollout"
                and self.tuning_rounds,
                "target='data'": self.target == "data",
                "diffusion_weight": self._diffusion_weight,
                "start='diffusion-dp'": self.start == "diffusion-dp",
            }
            for what, used in users.items():
                if used:
                    raise ValueError(f"{what} needs real samples, and there are none here.")

    def _starting_schedule(self) -> Schedule:
        """Return the schedule to start from, or for the programmes the one that gives the ends."""
        here = self.mdp.schedule
        check_levels(noise_levels(here))
        if self.integer_times:
            if not torch.equal(here.times, here.times.round()):
                raise ValueError(
                    "integer_times needs an environment whose schedule has whole times, such as "
                    "'trailing' or 'uniform'."
                )
            return here
        if self.start == ENVIRONMENT:
            return here
        return even_schedule(here, "karras" if self.start in get_args(Programme) else self.start)

    def _new_teacher(self) -> Teacher:
        """Build the teacher; of its states, those at the smallest level and the end are wanted."""
        teacher = make_teacher(
            self._base,
            self._like,
            self.teacher_name,
            self.teacher_options,
            self.scale,
            integer=self.integer_times,
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
        return self._map.levels(self._parameters.detach())

    @property
    def weights(self) -> Tensor:
        """Lambda of the levels, (T - 1,); see `fewstep.agents.scheduling.weights`."""
        return step_weights(self.levels)

    @property
    def schedule(self) -> Schedule:
        """The schedule as it is now: give it to an environment, a solver or another agent."""
        return self._schedule

    @property
    def done(self) -> bool:
        """Whether all alternations are done, the levels stayed, or they had collapsed."""
        over = self.collapsed and self._alternation > 0
        return over or self.converged or self._alternation >= self.alternations

    @property
    def planned_rounds(self) -> int:
        """Rounds of all alternations."""
        return self.alternations * (self._level_rounds + self.tuning_rounds)

    @property
    def timesteps_per_round(self) -> int:
        """Denoiser calls on single samples of the next round."""
        return self._cost(self._alternation, self._updates, first=not self.num_timesteps)

    def timesteps_until(self, rounds: int) -> int:
        """Return the timesteps left until `rounds` rounds are done, if none is cut short."""
        if self.done:
            return 0
        alternation, updates, tuned = self._alternation, self._updates, self._tuned
        total = 0
        for left in range(max(rounds - self.rounds, 0), 0, -1):
            first = left == rounds and not self.num_timesteps
            total += self._cost(alternation, updates, first)
            if updates < self._level_rounds:
                updates += 1
            else:
                tuned += 1
            if updates == self._level_rounds and tuned >= self.tuning_rounds:
                alternation, updates, tuned = alternation + 1, 0, 0
        return total

    @property
    def total_timesteps(self) -> int:
        """Timesteps that `learn` needs for all that the settings call for."""
        return self.timesteps_until(self.planned_rounds)

    def _cost(self, alternation: int, updates: int, first: bool) -> int:
        """Count the calls of a round, so many alternations and updates of the levels in."""
        count = 0
        if first and self.target == "teacher":
            count += 2 * self.batches * self.batch_size * self.teacher.tableau.nfe
        if updates >= self._level_rounds:
            calls = 2 * self._base.steps if self.tuning_weights == "rollout" else 1
            return count + calls * self.tuning_batch_size
        if updates == 0 and self._begins_with_programme(alternation):
            nodes = int((self._grid().times > 0).sum())
            count += (nodes - (self.start == "trajectory-dp")) * self.batch_size
        levels = len(self._parameters) + 2
        if self.gradient == "exact":
            # Each call is made once on the way down, and once more for its derivatives.
            count += 2 * self._objective.rows(self._base) * self.batch_size
        elif self.gradient == "eq14":
            extra = {"rollout": 0, "one-shot": 1, "convex": levels - 1}[self.reading.residual]
            count += (2 * levels - 3 + extra) * self.batch_size
        if self._diffusion_weight and self.gradient != "none":
            count += (levels - 1) * self.batch_size
        return count

    def _begins_with_programme(self, alternation: int) -> bool:
        """Whether stage one begins with a dynamic programme in this alternation."""
        again = alternation > 0 and self.gradient != "none"
        return self.start in get_args(Programme) and not again

    @property
    def _level_rounds(self) -> int:
        return 1 if self.gradient == "none" else self.schedule_rounds

    @property
    def _diffusion_weight(self) -> float:
        if self.diffusion_weight is not None:
            return self.diffusion_weight
        return 1.0 if self.target == "data" else 0.0

    # -- learning ------------------------------------------------------------------------------

    def train_round(self) -> dict[str, Tensor]:
        """Do one update of the stage that it is at."""
        cost = self.timesteps_per_round
        in_stage_one = self._updates < self._level_rounds
        metrics = self._learn_levels() if in_stage_one else self._tune()
        self.num_timesteps += cost
        if self._updates >= self._level_rounds and self._tuned >= self.tuning_rounds:
            if self.tuning_rounds:
                self.errors["tuned"] = self._held_out_error()
            self._alternation += 1
            self._updates = self._tuned = 0
        return metrics

    def _learn_levels(self) -> dict[str, Tensor]:
        """Move the levels once; at the stage's beginning and end, compare them with the best."""
        if self._updates == 0:
            self._begin_stage_one()
        metrics: dict[str, float] = {}
        if self.gradient != "none":
            before = self._parameters.detach().clone()
            batch = self.make_batches()[self._updates % self.batches]
            slope = self._descend(batch)
            metrics["disc_loss"] = slope.disc_loss
            if slope.diff_loss is not None:
                metrics["diff_loss"] = slope.diff_loss
            metrics["variance_ratio"] = _variance(slope.ends) / _variance(batch.target)
            self._stop_at_collapse(before, metrics["variance_ratio"])
        self._updates += 1
        last = self.collapsed or self._updates == self._level_rounds
        if last or self._updates % CHECK_INTERVAL == 0:
            metrics["held_out_error"] = self._compare_with_best()
        if last:
            self._finish_stage_one()
        for j, level in enumerate(self.levels.tolist()):
            metrics[f"level_{j:03d}"] = level
        return {f"train/{key}": torch.tensor(value) for key, value in metrics.items()}

    def _begin_stage_one(self) -> None:
        """Go to the start, remember it, and see that the teacher is good enough."""
        before = self._parameters.detach().clone()
        self.errors["start"] = self._held_out_error()
        if self._alternation == 0 and self.check_teacher and self.target == "teacher":
            noise = self.make_batches()[-1].noise
            self.errors["teacher"] = judge_teacher(
                self.teacher,
                self._base,
                self._like,
                self.scale,
                self._original,
                noise,
                self.integer_times,
            )
        if self._begins_with_programme(self._alternation):
            self._move_to(self._map.parameters(self._programme()))
        start = self._parameters.detach().clone()
        self._watch = Watch(before, start, self._held_out_error(), start)
        self._descent = torch.optim.Adam([self._parameters])

    def slope(self, batch: Batch) -> Slope:
        """Return stage one's objective on a batch, with its derivatives by the levels."""
        clean = None
        if self._diffusion_weight:
            clean = self.mdp.target.sample(self.batch_size, self.generator)
        denoiser = self.sampling_denoiser
        with frozen(denoiser):
            return self._objective.slope(denoiser, self.levels, batch, clean, self.generator)

    def _descend(self, batch: Batch) -> Slope:
        """Take one step of Adam on the levels' parameters."""
        slope = self.slope(batch)
        self._descent.zero_grad()
        self._map.levels(self._parameters).backward(slope.gradient)
        rate = self.schedule_learning_rate * self._cosine(self._updates / self._level_rounds)
        set_learning_rate(self._descent, rate * min((self._updates + 1) / WARM_UP, 1.0))
        self._descent.step()
        self._move_to(self._parameters.detach())
        return slope

    def _stop_at_collapse(self, parameters: Tensor, ratio: float) -> None:
        """End the stage where the samples' variance was sound, if it stays low.

        Args:
            parameters: of the levels before this update.
            ratio: their samples' variance over that of the targets.
        """
        watch = self._watch
        assert watch is not None
        if not watch.collapses(parameters, ratio, self.collapse):
            return
        self.collapsed = True
        self._move_to(watch.sound)
        hint = (
            "The optimum of target='data' is a sampler that returns the mean of the data: take "
            "target='teacher', or a smaller schedule_learning_rate and fewer schedule_rounds."
            if self.target == "data"
            else "Take a smaller schedule_learning_rate, or more batches."
        )
        warnings.warn(
            f"Schedule learning stopped after {self._updates + 1} updates: the samples' variance "
            f"fell from {watch.first_ratio:.2f} to {ratio:.2f} of the target's, and the levels "
            f"went back to where it had not. {hint}",
            stacklevel=2,
        )

    def _held_out_error(self) -> float:
        held_out = self.make_batches()[self.batches :]
        return self._objective.error(self.sampling_denoiser, self.tableau, held_out)

    def _compare_with_best(self) -> float:
        """Return the error on held-out noise; remember the levels if it is the least so far."""
        assert self._watch is not None
        error = self._held_out_error()
        self._watch.compare(self._parameters.detach().clone(), error)
        return error

    def _finish_stage_one(self) -> None:
        """Keep the best levels; see whether the alternation has converged."""
        assert self._watch is not None
        self._updates = self._level_rounds
        if self.target == "teacher":
            # The least error of target="data" is a collapsed sampler's: there the last one counts.
            self._move_to(self._watch.best)
        self.errors["learned"] = self._held_out_error()
        before = self._map.levels(self._watch.before)
        moved = float((self.levels / before).log().abs().max())
        self.converged = self._alternation > 0 and moved < self.tolerance

    def _programme(self) -> Tensor:
        """Return the levels that a dynamic programme finds."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        count, grid = len(self._parameters) + 2, self._grid()
        if self.start == "trajectory-dp":
            teacher = make_solver("dpm-solver-2m", grid)
            noise = self.mdp.initial(self.batch_size, generator)
            return trajectory_programme(teacher, self._original, noise, count)
        clean = self.mdp.target.sample(self.batch_size, generator)
        times = grid.times[grid.times > 0]
        return diffusion_programme(self.sampling_denoiser, times, count, clean, generator)

    def _grid(self) -> Schedule:
        """Return the times that the programmes choose from, even on Karras's scale."""
        even = LevelMap(self._map.least, self._map.greatest)
        grid = schedule_at(even.levels(torch.ones(GRID - 2, dtype=torch.float64)), self._like)
        if not self.integer_times:
            return grid
        return Schedule(self.mdp.process, grid.times.round().unique().flip(0))

    def _tune(self) -> dict[str, Tensor]:
        """Take one gradient step on the denoiser."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = self._rollout_loss() if self.tuning_weights == "rollout" else self._denoising_loss()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.denoiser.parameters(), self.max_grad_norm or math.inf
        )
        rate = self.tuning_learning_rate * self._cosine(self._tuned / self.tuning_rounds)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.averaged.update()
        self._tuned += 1
        return {"train/loss": loss, "train/grad_norm": grad_norm}

    def _denoising_loss(self) -> Tensor:
        """Return the loss on real samples at the schedule's levels, with its gradient."""
        clean = self.mdp.target.sample(self.tuning_batch_size, self.generator)
        weights: TuningWeights = self.tuning_weights
        loss = tuning_loss(
            self.denoiser, self.levels, clean, weights, self.last_weight, self.generator
        )
        loss.backward()
        return loss.detach()

    def _rollout_loss(self) -> Tensor:
        """Return the finished samples' distance from the teacher's, with its gradient."""
        fitted = self.make_batches()[: self.batches]
        noise, finished = (
            torch.cat([getattr(batch, part) for batch in fitted]) for part in ("noise", "finished")
        )
        size = (self.tuning_batch_size,)
        drawn = torch.randint(len(noise), size, generator=self.generator, device=self.device)
        weights = [weight for weight in self.denoiser.parameters() if weight.requires_grad]
        loss, _, _ = backpropagate(
            self.tableau, self.denoiser, noise[drawn], finished[drawn], self.tableau.steps, weights
        )
        return torch.tensor(loss)

    def make_batches(self) -> list[Batch]:
        """Return the pool, made once: the batches to learn on, then as many held-out ones.

        They follow from the seed and the network as it was given: a resumed run makes them again.
        """
        if not self._pool:
            generator = torch.Generator(self.device).manual_seed(self.seed)
            for _ in range(2 * self.batches):
                if self.target == "teacher":
                    batch = teacher_batch(
                        self.mdp, self.teacher, self._original, self.batch_size, generator
                    )
                else:
                    batch = data_batch(self.mdp, self._like, self.batch_size, generator)
                self._pool.append(batch)
        return self._pool

    def _move_to(self, parameters: Tensor) -> None:
        """Set the levels' parameters, and build the sampler that they make."""
        with torch.no_grad():
            self._parameters.copy_(parameters)
        schedule = schedule_at(self.levels, self._like)
        if self.integer_times:
            schedule = Schedule(schedule.process, schedule.times.round())
        self._schedule = schedule
        self._tableau = self._objective.build(self._schedule)

    # -- checkpoints ---------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments."""
        return {
            "start": self.start,
            "space": self.space,
            "target": self.target,
            "gradient": self.gradient,
            "residual": self.reading.residual,
            "network_input": self.reading.input,
            "weight_term": self.reading.weight_term,
            "teacher": self.teacher_name,
            "teacher_options": self.teacher_options,
            "scale": self.scale,
            "integer_times": self.integer_times,
            "check_teacher": self.check_teacher,
            "gamma": self.gamma,
            "diffusion_weight": self.diffusion_weight,
            "schedule_rounds": self.schedule_rounds,
            "schedule_learning_rate": self.schedule_learning_rate,
            "batch_size": self.batch_size,
            "batches": self.batches,
            "tuning_rounds": self.tuning_rounds,
            "tuning_batch_size": self.tuning_batch_size,
            "tuning_learning_rate": self.tuning_learning_rate,
            "tuning_weights": self.tuning_weights,
            "last_weight": self.last_weight,
            "max_grad_norm": self.max_grad_norm,
            "ema": self._ema,
            "alternations": self.alternations,
            "tolerance": self.tolerance,
            "collapse": self.collapse,
        }

    def state(self) -> dict[str, Any]:
        """Return what training changed."""
        tuned = self._original is not self.denoiser
        return {
            "parameters": self._parameters.detach(),
            "descent": self._descent.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "original": self._original.body.state_dict() if tuned else None,
            "position": [self._alternation, self._updates, self._tuned],
            "watch": None if self._watch is None else dict(vars(self._watch)),
            "converged": self.converged,
            "collapsed": self.collapsed,
            "errors": self.errors,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._descent.load_state_dict(state["descent"])
        # None: saved by an agent without stage two.
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self._original.body.load_state_dict(state["original"])
        self._alternation, self._updates, self._tuned = state["position"]
        self._watch = None if state["watch"] is None else Watch(**state["watch"])
        self.converged, self.collapsed = state["converged"], state["collapsed"]
        self.errors = state["errors"]
        self._pool = []
        self._move_to(state["parameters"].cpu())


def _variance(samples: Tensor) -> float:
    """Return the total variance of samples (N, *shape): the sum over their dimensions."""
    return float(samples.double().flatten(1).var(0).sum())
