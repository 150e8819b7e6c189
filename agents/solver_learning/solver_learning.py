"""SolverLearning: times, weights and the network's times of a few-step solver, learned together.

One objective at the end of the chain, one backward pass, flat memory (MATH.md 5). LD3 (Tong et al.
2025), BNS (Shaul et al. 2024), S4S (Frankel et al. 2025), GS and GAS (2025), DDSS (Watson et al.
2022) and DyWeight are settings of it: `fewstep.agents.solver_learning.joint.presets`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import check_value
from ...common.checkpoint import CheckpointError, counter
from ...common.optimisation import frozen, learning_rate, seeded, set_learning_rate
from ...critics import IPMCritic
from ...envs import Schedule
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..policy_gradient.critic import learned_critic
from ..report import Report
from ..samplers.tableau import Tableau
from ..selection import best_of, coordinate_errors
from .agent import TableAgent, comparison
from .distillation.teacher import Teacher, judge_teacher, make_teacher
from .joint.ball import Ball
from .joint.builder import Builder
from .joint.descent import TableDescent
from .joint.family import Parameters, TableFamily
from .joint.features import Extractor, features_of
from .joint.losses import end_loss
from .joint.report import report_of
from .joint.settings import SolverLearningSettings
from .joint.slopes import EndObjective, Slope
from .joint.starts import Starts
from .scheduling.levels import noise_levels, with_signal
from .scheduling.pool import Batch, Pool
from .scheduling.probe import check_differentiable

GIVEN, START, LEARNED = "given", "start", "learned"
_TABLES = {
    GIVEN: "the base solver's table",
    START: "the table to start from",
    LEARNED: "the learned table",
}


class SolverLearning(TableAgent):
    """Learn a few-step solver's times, weights and the times the network is told, all at once.

    A round is one update of what is learned. The agent keeps the base solver's table unless the
    table that it starts from, or a learned one, is better on noise that was not learned on, by what
    is minimised, and not by chance (`fewstep.agents.selection`). Compared are the
    given table, the start, and the best that the descent met. With a critic it is the last that the
    descent met, and the critic has no say: it learned to tell that table's samples alone.

    Timesteps are all network calls on single samples, those of the teacher and those that only
    measure among them. A resumed run asks the teacher again, and counts that again.

    Args:
        env: the environment; its schedule gives the number of steps and the ends. Where no signal
            is left at its first time and times are learned, the log-SNR -5.1 is taken.
        denoiser: the network, which stays as it is.
        *args: the settings, see `SolverLearningSettings`.
        features: what makes features of samples (N, *shape), (N, d), for loss.compared="features".
        **arguments: single settings by name, and `Agent`'s remaining arguments.

    Attributes:
        returned: which table `tableau` is: "given", "start" or "learned".
        errors: mean squared errors per coordinate of finished samples from the teacher's, on noise
            that was neither learned on nor chosen by: of the base solver ("given"), the start
            ("start"), the best table of the descent ("learned") and what is returned ("returned");
            and the teacher's own from a finer solver's ("teacher").
        losses: likewise what is minimised, on the noise that was chosen by.

    Raises:
        ValueError: settings that do not go together; a stochastic solver; too few calls for the
            base solver, or too few noise levels to learn times; features that do not fit the
            samples; or a network that does not take them, or is not differentiable in its time,
            where that is learned.
    """

    name = "solver"
    grid = "karras"
    obeys_transitions = False
    takes_features = True
    budgets = ("descent_rounds",)

    settings: SolverLearningSettings
    Settings = SolverLearningSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        *args: Any,
        features: Extractor | None = None,
        **arguments: Any,
    ) -> None:
        check_value("features", features, Extractor | None)
        super().__init__(env, denoiser, *args, **arguments)
        settings = self.settings
        if not self.mdp.target.has_samples:
            settings.check_without_data()
        learn = settings.learn
        if learn.times or learn.shifts:
            self.mdp = self.mdp.with_schedule(with_signal(self.mdp.schedule))
        self._build = Builder(self.solver, self.denoiser, self.solver_options)
        self.base = self._build(self.mdp.schedule)
        if not self.base.linear:
            raise ValueError(
                f"The solver '{self.base.name}' adds noise or clamps its predictions; a solver is "
                "learned from a deterministic one, such as dpm-solver++-3m, unipc-2 or ipndm."
            )
        levels = len(noise_levels(self.mdp.schedule))
        if learn.times and levels < 3:
            there = "is 1 noise level" if levels == 1 else f"are {levels} noise levels"
            raise ValueError(
                f"There {there}, and the first and the last stay fixed: no times are left to "
                "learn; take more steps, or learn.times=False."
            )
        self.family = TableFamily(self._build, self.mdp.schedule, learn)
        if self.family.moves_levels:
            probed = self.denoiser.under_some()
            check_differentiable(
                probed,
                self.base.times[:-1].tolist(),
                self.mdp.shape,
                learner="Solver learning",
                instead="take learn.times=False and learn.shifts=False",
            )
        self.teacher = self._teacher_of(self.base, self.mdp.schedule)
        last = dataclasses.replace(self.teacher, targets=self.teacher.targets[-1:])
        self._pool = Pool(
            self.mdp,
            self.mdp.schedule,
            last,
            self.denoiser,
            settings.batch_size,
            settings.batches,
            self.seed,
        )
        self._features = None
        if settings.loss.compared == "features":
            self._features = features_of(features, self.mdp.shape, self.device)
        self._critic = self._new_critic() if settings.loss.adversarial else None
        self._descent = TableDescent(self.family, settings.descent)
        self.errors = {}
        self.losses: dict[str, float] = {}
        self.returned = GIVEN
        # Parameters of the start, of the best table met, and of what is returned.
        self._start = self._best = self._kept = self.family.zeros()
        self._least = math.inf
        self._ball_noises: list[Tensor] | None = None
        self._table = self.base

    def _teacher_of(
        self, base: Tableau, schedule: Schedule, others: Sequence[Tableau] = ()
    ) -> Teacher:
        """Return the teacher of a table on a schedule, and of others between the same ends."""
        settings = self.settings
        options = settings.teacher_options or {}
        return make_teacher(
            base, schedule, settings.teacher, options, settings.scale, others=others
        )

    def _new_critic(self) -> IPMCritic:
        with seeded(self.seed):
            return learned_critic(self.mdp, self.settings.critic, self.denoiser)

    @cached_property
    def _objective(self) -> EndObjective:
        """What is descended."""
        return self._objective_on(0)

    @cached_property
    def _judge(self) -> EndObjective:
        """What is compared on held-out noise: the same, with other real samples."""
        return self._objective_on(1)

    def _objective_on(self, draw: int) -> EndObjective:
        settings = self.settings.loss
        # Fixed real samples, by the seed alone: a resumed run draws them again.
        loss = end_loss(settings, self._features, self.mdp, self.seed, draw)
        return EndObjective(self.family, loss, settings.adversarial)

    @cached_property
    def _ball(self) -> Ball | None:
        settings = self.settings.loss
        if not settings.ball:
            return None
        std = self.mdp.process.prior_std(float(self.mdp.schedule.times[0]))
        noises = [batch.noise for batch in self._pool.fitted]
        ball = Ball(noises, std, settings.ball, settings.ball_rate)
        if self._ball_noises is not None:
            ball.noises = self._ball_noises
        return ball

    # -- what there is -------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The times of its states."""
        if self.returned == GIVEN:
            return self.mdp.schedule
        return self.family.schedule(self._kept)

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why."""
        what = _TABLES[self.returned]
        if not self.finished or "returned" not in self.errors:
            return f"Training is not over; so far there is {what}."
        return f"Returned, as the best on held-out noise: {what}. {comparison(self.errors)}"

    @property
    def budget(self) -> int:
        """Rounds of the descent."""
        return self.settings.descent.rounds

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._descent.done

    @property
    def done(self) -> bool:
        """Whether it is `finished`: learning anew does not begin anew."""
        return self.finished

    # -- learning ------------------------------------------------------------------------------

    def step_sizes(self) -> list[str]:
        """Return the rates of adam's descent, of the noises in their balls, and of the critic."""
        sizes = [f"descent.{name}" for name in self._descent.rate_names]
        if self.settings.loss.ball:
            sizes.append("loss.ball_rate")
        return sizes if self._critic is None else [*sizes, "critic.learning_rate"]

    def train_round(self) -> dict[str, Tensor]:
        """Update what is learned; compare on held-out noise now and then, and choose at the end."""
        descent, critic = self._descent, self._critic
        metrics: dict[str, float] = {}
        if descent.updates == 0:
            self._begin()
        index = descent.updates % len(self._pool.fitted)
        value = None if critic is None else critic
        found, slope = descent.update(
            self._objective, self.denoiser, self._pool.fitted, self._ball, value
        )
        metrics |= found
        if critic is not None:
            metrics |= self._train_critic(critic, slope, index)
        if descent.due:
            metrics["held_out_loss"] = self._compare()
        if descent.done:
            self._end()
            metrics |= {f"{name}_error": error for name, error in self.errors.items()}
            metrics["returned"] = float(list(_TABLES).index(self.returned))
        return {f"train/{key}": torch.tensor(value) for key, value in metrics.items()}

    def slope(self, batches: list[Batch]) -> Slope:
        """Return the loss of what there is in training on batches, with its exact gradient."""
        with frozen(self.denoiser):
            return self._objective.slope(self.denoiser, self._descent.live, batches)

    def make_batches(self) -> list[Batch]:
        """Return the pool, made once: batches to learn on, as many to choose by, one to report."""
        return self._pool.batches

    def _begin(self) -> None:
        """Measure the teacher; go to the start, unless the given table errs less."""
        self.errors = {}
        if self.settings.check_teacher:
            batch = self._pool.held_out[-1]
            self.errors["teacher"] = judge_teacher(
                self.teacher,
                self.base,
                self.mdp.schedule,
                self.settings.scale,
                self.denoiser,
                batch.noise,
                condition=batch.condition,
            )
        given = float(self._held_out(self.base).mean())
        self._start, self._least = self.family.zeros(), given
        for parameters in self._starts():
            loss = float(self._held_out(self.family.table(parameters)).mean())
            if loss < self._least:
                self._start, self._least = parameters, loss
        self._best = self._start
        self._descent.begin(self._start)
        self._keep(GIVEN if self._least == given else START, self._start)

    def _starts(self) -> list[Parameters]:
        """Return where the descent may start, beside the base solver."""
        starts = Starts(self.family, self._build, self._teacher_of, self._pool, self.denoiser)
        return starts.best(self.settings.starting, self._objective)

    def _compare(self) -> float:
        """Return the loss on held-out noise; remember the best table, or with a critic the last."""
        descent = self._descent
        table = descent.table()
        loss = float(self._held_out(table).mean())
        if loss < self._least or self._critic is not None:
            self._best, self._least = descent.copy(), loss
            self._keep(LEARNED, self._best, table)
        return loss

    def _end(self) -> None:
        """Return the table that is best on held-out noise; measure all that were compared."""
        parameters = {GIVEN: self.family.zeros(), START: self._start, LEARNED: self._best}
        tables = {name: self.family.table(value) for name, value in parameters.items()}
        tables[GIVEN] = self.base
        held_out = {name: self._held_out(table) for name, table in tables.items()}
        chosen = best_of(held_out, by_lead=not self._judge.loss.coupled)
        self._keep(chosen, parameters[chosen], tables[chosen])
        self.losses = {name: float(losses.mean()) for name, losses in held_out.items()}
        self.errors |= {name: self._reported_error(table) for name, table in tables.items()}
        for found in (self.losses, self.errors):
            found["returned"] = found[chosen]
        if chosen == GIVEN:
            warnings.warn(
                f"Solver learning made {self.base.name} no better beyond chance: it is kept. On "
                f"held-out noise its loss was {self.losses[GIVEN]:.2e}, that of the learned table "
                f"{self.losses[LEARNED]:.2e}. More batches or rounds may help.",
                stacklevel=2,
            )

    def _keep(self, returned: str, parameters: Parameters, table: Tableau | None = None) -> None:
        self.returned, self._kept = returned, parameters
        if returned == GIVEN:
            table = self.base
        self._table = self.family.table(parameters) if table is None else table

    def _held_out(self, table: Tableau) -> Tensor:
        """Return a table's shares of the loss on the noise that it is chosen by."""
        return self._judge.shares(self.denoiser, table, self._pool.held_out)

    @torch.no_grad()
    def _reported_error(self, table: Tableau) -> float:
        """Return a table's mean squared error on the noise that is only reported on."""
        (batch,) = self._pool.reported
        ends = table.sample(self.denoiser.under(batch.condition), batch.noise)
        return float(coordinate_errors(ends, batch.finished).mean())

    def _train_critic(self, critic: IPMCritic, slope: Slope, index: int) -> dict[str, float]:
        """Let the critic tell the finished samples from the teacher's of another batch."""
        fitted = self._pool.fitted
        fake, real = fitted[index], fitted[(index + 1) % len(fitted)]
        under: dict[str, Any] = {}
        if fake.condition is not None:
            under["conditions"] = (real.condition, fake.condition)
        # The table's update of this round is counted already.
        its, done = self.settings.critic, (self._descent.updates - 1) / self.budget
        set_learning_rate(critic.optimizer, learning_rate(its.learning_rate, its.lr_schedule, done))
        metrics = critic.update(real.finished, slope.rollouts[0].ends, **under)
        return {name: float(value) for name, value in metrics.items()}

    # -- what a run shows and writes -----------------------------------------------------------

    def report(self) -> Report:
        """Return the learned times, factors and weights beside the base solver's."""
        results = {"errors": self.errors, "losses": self.losses, "returned": self.returned}
        return report_of(self.mdp.process, self.base, self._table, self.verdict, results)

    def files(self) -> dict[str, Any]:
        """Return what a run writes beside each checkpoint: the table, and its schedule."""
        return {"schedule.json": self.schedule, **super().files()}

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what training changed."""
        begun = self._descent.updates > 0 and self.settings.loss.ball > 0
        return {
            **self._descent.state(),
            "updates": self._descent.updates,
            "start": self._start,
            "best": self._best,
            "least": self._least if math.isfinite(self._least) else None,
            "kept": self._kept,
            "returned": self.returned,
            "errors": self.errors,
            "losses": self.losses,
            "ball": self._ball.noises if begun and self._ball is not None else None,
            "critic": None if self._critic is None else self._critic.state_dict(),
            "features": None if self._features is None else self._features.probed,
        }

    def _restore(self, tree: dict[str, Any], origin: str) -> None:
        """Refuse to go on by other features than those that the training has descended in."""
        there = tree["state"].get("features")  # older files do not say
        if there is not None and self._features is not None and not self._features.are(there):
            raise CheckpointError(
                f"{origin} was trained with other features than '{self._features.name}' of here: "
                "give it those that it was trained with, features=."
            )
        super()._restore(tree, origin)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._descent.load_state(state)
        self._descent.updates = counter(state, "updates", "the checkpoint")
        for name in ("start", "best", "kept"):
            found = {key: value.cpu() for key, value in state[name].items()}
            setattr(self, f"_{name}", found)
        self._least = math.inf if state["least"] is None else state["least"]
        self.errors, self.losses = dict(state["errors"]), dict(state["losses"])
        ball = state["ball"]
        self._ball_noises = None if ball is None else [noise.to(self.device) for noise in ball]
        self.__dict__.pop("_ball", None)
        if self._critic is not None and state["critic"] is not None:
            self._critic.load_state_dict(state["critic"])
        self._keep(state["returned"], self._kept)
