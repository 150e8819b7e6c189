"""DODE: distil a many-step solver into the weights of a few-step one, the network untouched.

Kim, Tang and Yu, "Distilling ODE Solvers of Diffusion Models into Smaller Steps" (CVPR 2024, paper
C; MATH.md 2). Each network evaluation gets one parameter, which mixes the last output into the
newest; least squares against a teacher's states fits them in closed form, in seconds. What is
learned is a tableau: a small table of numbers, saved as JSON.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.checkpoint import CheckpointError, counter
from ...common.files import write_atomically
from ...common.reading import damage_named
from ...envs import Schedule
from ..base import Agent, AnyAgent, Environment, settings_of
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau
from .distillation.files import read_distilled, write_distilled
from .distillation.fit import Batch, StepFit, best_constant, fit, noise_errors
from .distillation.forms import CONSTANT, directions, distilled
from .distillation.refine import ITERATIONS, Refiner
from .distillation.teacher import judge_teacher, make_teacher
from .no_data import mdp_without_data
from .selection import best_of, is_better
from .settings import DODESettings

# By default a fit sees about this many numbers, in at most so many batches.
_FITTED_NUMBERS, _MOST_BATCHES = 100_000, 10

# As many noises as this share of the fitted ones, and at least so many unless those are fewer, are
# held out to choose the table by; as many more to report its error.
_HELD_OUT_SHARE, _LEAST_HELD_OUT = 4, 25

GIVEN, DISTILLED, REFINED = "given", "distilled", "refined"
_TABLES = {
    GIVEN: "the base solver's table",
    DISTILLED: "the distilled table",
    REFINED: "the refined table",
}


class DODE(Agent):
    """Distil a many-step ODE solver into a few-step one, the network untouched.

    The first round is the fit, each later one a round of the refinement, if there is one. The agent
    keeps the base solver's table unless the distilled one errs less on noise that was not fitted,
    and that unless a refined one does, not by chance (`fewstep.agents.solver_learning.selection`).
    What counts is
    the finished sample's distance from the teacher's, not the steps'. `returned` says which table
    it is.

    Timesteps are the calls of teacher and student on single samples, a round of the refinement
    counted as `ITERATIONS` passes (its line search may take a few more or less); what measures
    them, such as the check of the teacher, is not counted.

    Args:
        env: the environment; its schedule is the student's, its process gives the noise.
        denoiser: the network, which stays as it is.
        settings: see `DODESettings`; the remaining arguments are `Agent`'s.

    Attributes:
        fits: what each step's parameters did (`StepFit`), empty before the first round.
        returned: which table `tableau` is: "given" (the base solver's), "distilled" or "refined".
        errors: mean squared errors per coordinate of finished samples from the teacher's, on noise
            that was neither fitted nor chosen by, of the base solver ("given"), the greedy fit
            ("distilled"), the refinement ("refined") and of what is returned ("returned"); and the
            teacher's own from a finer solver's ("teacher").
    """

    name = "dode"
    checkpoint_name = "tableau.json"

    settings: DODESettings
    Settings = DODESettings

    def __init__(self, env: Environment, denoiser: Denoiser, *args: Any, **arguments: Any) -> None:
        super().__init__(env, denoiser, *args, **arguments)
        settings = self.settings
        self.base = self._tableau
        self._rows = directions(self.base, settings.form)
        self.teacher = make_teacher(
            self.base,
            self.mdp.schedule,
            settings.teacher,
            settings.teacher_options or {},
            settings.scale,
            settings.align,
            settings.integer_times,
        )
        self.fits: list[StepFit] = []
        self.errors: dict[str, float] = {}
        self.returned = GIVEN
        self._pool: list[Batch] = []
        self._kept_errors: Tensor | None = None
        # The table that the refinement starts from.
        self._refined_from = DISTILLED
        self._refiner = self._new_refiner(self.base)

    @classmethod
    def without_data(
        cls, denoiser: Denoiser, schedule: Schedule, shape: tuple[int, ...], **settings: Any
    ) -> DODE:
        """Distil for a pretrained network alone: fitting a solver needs noise, but no data.

        Args:
            denoiser: the network; its device is where everything is done.
            schedule: the times of the student, on the denoiser's process.
            shape: of one sample.
            settings: the constructor's keyword arguments.
        """
        return cls(mdp_without_data(denoiser, schedule, shape), denoiser, **settings)

    # -- what there is -------------------------------------------------------------------------

    @property
    def lambdas(self) -> list[np.ndarray]:
        """The parameters of each step, (n_j,) each; in the paper's convention (MATH.md 2.3)."""
        return [fit.lambdas for fit in self.fits]

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why."""
        if "returned" not in self.errors:
            return f"There is {_TABLES[self.returned]}; nothing was compared with it."
        return (
            f"Returned, as the best on held-out noise: {_TABLES[self.returned]}. Mean squared "
            f"error per coordinate: {self.errors['returned']:.2e}, of what was given "
            f"{self.errors['given']:.2e}."
        )

    @property
    def noise_counts(self) -> tuple[int, int, int]:
        """How many noises are fitted, held out to choose by, and kept to report on."""
        fitted = self._fitted_count * self.settings.batch_size
        share = max(fitted // _HELD_OUT_SHARE, min(fitted, _LEAST_HELD_OUT))
        return fitted, fitted if self.settings.refine == "end-to-end" else share, share

    @property
    def _fitted_count(self) -> int:
        numbers = self.settings.batch_size * math.prod(self.mdp.shape)
        return self.settings.batches or min(-(-_FITTED_NUMBERS // numbers), _MOST_BATCHES)

    @property
    def planned_rounds(self) -> int:
        """The fit, and the steps of the refinement."""
        return 1 + (self.settings.refine_steps if self.settings.refine == "end-to-end" else 0)

    @property
    def timesteps_per_round(self) -> int:
        """Denoiser calls on single samples of the next round: of the fit, or of the refinement."""
        return self._refinement_cost if self._refines_next else self._fit_cost

    @property
    def _refines_next(self) -> bool:
        return self.settings.refine == "end-to-end" and self.rounds > 0

    @property
    def _refinement_cost(self) -> int:
        return ITERATIONS * self._fitted_count * self.settings.batch_size * self.base.nfe

    @property
    def _fit_cost(self) -> int:
        counts = self.noise_counts
        return sum(counts) * self.teacher.tableau.nfe + counts[0] * self.base.nfe

    def timesteps_until(self, rounds: int) -> int:
        """Return the timesteps left until `rounds` rounds are done; the first one is dearer."""
        left = max(rounds - self.rounds, 0)
        if self.settings.refine == "none" or not left:
            return left * self._fit_cost
        first = self._fit_cost if self.rounds == 0 else self._refinement_cost
        return first + (left - 1) * self._refinement_cost

    def tableau_on(self, schedule: Schedule) -> Tableau:
        """Return the solver on another schedule of as many steps, with the same parameters.

        Raises:
            ValueError: another number of network calls, or weights that were refined, which belong
                to their schedule.
        """
        base = super().tableau_on(schedule)
        if self.returned == GIVEN:
            return base
        if base.steps != self.base.steps or self.returned == REFINED:
            raise ValueError(
                f"This table was distilled for {self.base.steps} network calls on its own "
                "schedule; its parameters carry over to schedules of as many calls, refined "
                "weights to none."
            )
        return distilled(base, directions(base, self.settings.form), self.lambdas)

    # -- learning ------------------------------------------------------------------------------

    def train_round(self) -> dict[str, Tensor]:
        """Fit all steps, or go on with the refinement."""
        cost = self.timesteps_per_round
        metrics = self._refine_once() if self._refines_next else self._fit()
        self.num_timesteps += cost
        return {f"train/{key}": torch.tensor(value) for key, value in metrics.items()}

    def _fit(self) -> dict[str, float]:
        pool = self._fitted
        self.errors, self._kept_errors = {}, None
        if self.settings.check_teacher:
            self.errors["teacher"] = judge_teacher(
                self.teacher,
                self.base,
                self.mdp.schedule,
                self.settings.scale,
                self.denoiser,
                pool[0].noise,
                self.settings.integer_times,
            )
        constant = None
        if self.settings.form in CONSTANT:
            constant = best_constant(self.base, self._rows, self.denoiser, pool)
        self.fits = fit(self.base, self._rows, self.denoiser, pool, self.settings.ridge, constant)
        tables = {GIVEN: self.base, DISTILLED: distilled(self.base, self._rows, self.lambdas)}
        held_out = {name: self._errors_of(table) for name, table in tables.items()}
        self.returned = self._refined_from = best_of(held_out)
        self._tableau, self._kept_errors = tables[self.returned], held_out[self.returned]
        self._refiner = self._new_refiner(self._tableau)
        for name, table in tables.items():
            self.errors[name] = self._reported_error(table)
        self.errors["returned"] = self.errors[self.returned]
        if self.returned == GIVEN:
            means = [float(held_out[name].mean()) for name in (GIVEN, DISTILLED)]
            warnings.warn(
                f"Distillation made {self.base.name} no better, and it is kept: on held-out "
                f"noise the mean squared error of finished samples was {means[0]:.2e}, distilled "
                f"{means[1]:.2e}. More batches, a larger ridge or refine='end-to-end' may help.",
                stacklevel=2,
            )
        per_step = {"returned": float(list(_TABLES).index(self.returned))}
        per_step |= {
            f"lambda_{j:03d}": float(fit.lambdas[0])
            for j, fit in enumerate(self.fits)
            if len(fit.lambdas)
        }
        return {f"{key}_error": value for key, value in self.errors.items()} | per_step

    def _refine_once(self) -> dict[str, float]:
        """Go on with the refinement; keep the table if it is the best so far on held-out noise."""
        loss = self._refiner.step(self.denoiser, self._fitted)
        candidate = self._refiner.module.export()
        if self._kept_errors is None:  # after a resume
            self._kept_errors = self._errors_of(self._tableau)
        errors = self._errors_of(candidate)
        if better := is_better(errors, self._kept_errors):
            self._tableau, self._kept_errors, self.returned = candidate, errors, REFINED
        if better or self.returned != REFINED:
            self.errors["refined"] = self._reported_error(candidate)
        self.errors["returned"] = self.errors[self.returned]
        return {
            "loss": loss,
            "refined_error": self.errors["refined"],
            "held_out_error": float(errors.mean()),
            "returned": float(list(_TABLES).index(self.returned)),
        }

    def _errors_of(self, table: Tableau) -> Tensor:
        """Return a table's errors (N,) on the noise that it is chosen by."""
        return noise_errors(table, self.denoiser, self.make_batches()[self._fitted_count : -1])

    def _reported_error(self, table: Tableau) -> float:
        """Return a table's mean error on the noise that is only reported on."""
        return float(noise_errors(table, self.denoiser, self.make_batches()[-1:]).mean())

    def _new_refiner(self, start: Tableau) -> Refiner:
        return Refiner(start, self.base.weights, self.device)

    def make_batches(self) -> list[Batch]:
        """Return noise and the teacher's states, made once: to fit, to choose by, to report on.

        They follow from the seed alone: a resumed run makes the same ones again.
        """
        if not self._pool:
            generator = torch.Generator(self.device).manual_seed(self.seed)
            fitted, chosen_by, reported = self.noise_counts
            sizes = [self.settings.batch_size] * self._fitted_count
            sizes += (
                sizes if chosen_by == fitted and self.settings.refine != "none" else [chosen_by]
            )
            for i, size in enumerate([*sizes, reported]):
                noise = self.mdp.initial(size, generator)
                states = self.teacher.states(self.denoiser, noise)
                # Of noise that is not fitted only the finished samples count.
                states = states if i < self._fitted_count else states[-1:].clone()
                self._pool.append(Batch(noise, states))
        return self._pool

    @property
    def _fitted(self) -> list[Batch]:
        """The batches that are fitted: all but those that judge."""
        return self.make_batches()[: self._fitted_count]

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what training found, as JSON values."""
        return {
            "fits": [
                {"lambdas": fit.lambdas.tolist(), "before": fit.before, "after": fit.after}
                for fit in self.fits
            ],
            "errors": self.errors,
            "refinement": self._refiner.state(),
            "returned": self.returned,
            "refined_from": self._refined_from,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.fits = [
            StepFit(np.array(fit["lambdas"], dtype=np.float64), fit["before"], fit["after"])
            for fit in state["fits"]
        ]
        self.errors = dict(state["errors"])
        # Files of before the comparison: what was found last was returned.
        last = REFINED if state["refinement"] else DISTILLED if self.fits else GIVEN
        self.returned = state.get("returned", last)
        self._refined_from = state.get("refined_from", DISTILLED)
        self._kept_errors = None
        starts_at_fit = self.fits and self._refined_from == DISTILLED
        start = distilled(self.base, self._rows, self.lambdas) if starts_at_fit else self.base
        self._refiner = self._new_refiner(start)
        self._refiner.load_state(state["refinement"])

    def save(self, path: str | Path) -> None:
        """Write the tableau as JSON, with what its training needs to go on beside it.

        `Tableau.load` reads the same file; the denoiser, which is not trained, is not in it.
        """
        training = {
            "agent": self.name,
            "settings": self.settings.to_tree(),
            "seed": self.seed,
            "environment": {"target": self.mdp.target.name, "shape": list(self.mdp.shape)},
            "num_timesteps": self.num_timesteps,
            "rounds": self.rounds,
        }
        text = write_distilled(self.tableau, training, **self.state())
        write_atomically(path, lambda temporary: temporary.write_text(text))

    @classmethod
    def load(
        cls: type[AnyAgent],
        path: str | Path,
        env: Environment,
        device: str | torch.device | None = None,
        **overrides: Any,
    ) -> AnyAgent:
        """Rebuild a distilled solver that `save` wrote.

        Args:
            path: the JSON file.
            env: the environment it was distilled on, built again.
            device: where to put it; the environment's device by default.
            overrides: `denoiser=...` is needed: the file does not hold it. Other constructor
                arguments may differ from the saved ones.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, or another environment's.
            TypeError: no denoiser given.
        """
        _, tree = read_distilled(path, cls.name)
        if "denoiser" not in overrides:
            raise TypeError("A distilled tableau holds no network: pass denoiser=... to load.")
        with damage_named(path, CheckpointError):
            settings = settings_of(cls, tree["training"], path)
            overrides.setdefault("seed", tree["training"]["seed"])
        agent = cls(env, overrides.pop("denoiser"), settings, **overrides)
        agent.check_device(device)
        agent.resume(path)
        return agent

    def resume(self, path: str | Path) -> None:
        """Take over what a file of `save` holds.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, or another environment's.
        """
        with damage_named(path, CheckpointError):
            self._take_over(path)

    def _take_over(self, path: str | Path) -> None:
        tableau, tree = read_distilled(path, self.name)
        training = tree["training"]
        here = {
            "target": self.mdp.target.name,
            "shape": list(self.mdp.shape),
            "solver": self.solver,
            "solver_options": self.solver_options,
            "form": self.settings.form,
        }
        there = {**training["environment"], **training["settings"]}
        for key, value in here.items():
            if there.get(key) != value:
                raise CheckpointError(
                    f"{path} was distilled on another environment or with other settings: {key} "
                    f"is {there.get(key)!r}, here it is {value!r}."
                )
        if tableau.process != self.base.process or not np.array_equal(
            tableau.times, self.base.times
        ):
            raise CheckpointError(f"{path} was distilled on another schedule or solver.")
        num_timesteps = counter(training, "num_timesteps", str(path))
        rounds = counter(training, "rounds", str(path))
        self.load_state(tree)
        self.num_timesteps, self.rounds = num_timesteps, rounds
        self._tableau = tableau
