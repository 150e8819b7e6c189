"""DODE: distil a many-step solver into the weights of a few-step one, the network untouched.

Kim, Tang & Yu (2024), "Distilling ODE Solvers of Diffusion Models into Smaller Steps" (MATH.md 2).
Each network evaluation gets one parameter, which mixes the last output into the newest; least
squares against a teacher's states fits them in closed form, in seconds. What is learned is a
tableau: a small table of numbers, saved as JSON.
"""

from __future__ import annotations

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
from ..base import AnyAgent
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..report import Panel, Report
from ..samplers.tableau import Tableau
from ..selection import best_of, is_better
from .agent import SolverAgent, comparison
from .distillation.files import read_distilled, write_distilled
from .distillation.fit import StepFit, best_constant, fit, noise_errors
from .distillation.forms import CONSTANT, directions, distilled
from .distillation.pool import Pool
from .distillation.refine import Refiner
from .distillation.teacher import judge_teacher, make_teacher
from .settings import DODESettings

GIVEN, DISTILLED, REFINED = "given", "distilled", "refined"
_TABLES = {
    GIVEN: "the base solver's table",
    DISTILLED: "the distilled table",
    REFINED: "the refined table",
}


class DODE(SolverAgent):
    """Distil a many-step ODE solver into a few-step one, the network untouched.

    The first round is the fit, each later one a round of the refinement, if there is one. The agent
    keeps the base solver's table unless the distilled one errs less on noise that was not fitted,
    and that unless a refined one does, not by chance (`fewstep.agents.selection`).
    What counts is the finished sample's distance from the teacher's, not the steps'. `returned`
    says which table it is.

    Timesteps are all calls of teacher and student on single samples, also those that measure. A
    resumed run draws its batches from the teacher again, and counts those calls again; an agent
    from a file draws its samples' noise from its seed's beginning, for the file is the table's.

    Args:
        env: the environment; its schedule is the student's, its process gives the noise.
        denoiser: the network, which stays as it is.
        *args: the settings, see `DODESettings`.
        **arguments: single settings by name, and `Agent`'s remaining arguments.

    Attributes:
        fits: what each step's parameters did (`StepFit`), empty before the first round.
        returned: which table `tableau` is: "given" (the base solver's), "distilled" or "refined".
        errors: mean squared errors per coordinate of finished samples from the teacher's, on noise
            that was neither fitted nor chosen by, of the base solver ("given"), the greedy fit
            ("distilled"), the refinement ("refined") and of what is returned ("returned"); and the
            teacher's own from a finer solver's ("teacher").
        pool: the noises, with the teacher's states.
    """

    name = "dode"
    obeys_transitions = False
    checkpoint_name = "tableau.json"
    budgets = ("refine_steps",)

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
            settings.teacher_times,
        )
        self.pool = Pool(self.mdp, self.teacher, self.denoiser, settings, self.seed)
        self.fits: list[StepFit] = []
        self.errors = {}
        self.returned = GIVEN
        self._kept_errors: Tensor | None = None
        # The table that the refinement starts from.
        self._refined_from = DISTILLED
        self._refiner = self._new_refiner(self.base)

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
        what = _TABLES[self.returned]
        return f"Returned, as the best on held-out noise: {what}. {comparison(self.errors)}"

    @property
    def budget(self) -> int:
        """The fit, and the steps of the refinement."""
        return 1 + (self.settings.refine_steps if self._refines else 0)

    @property
    def finished(self) -> bool:
        """Whether there is a fit, and no refinement to go on with."""
        return self.rounds > 0 and not self._refines

    @property
    def _refines(self) -> bool:
        return self.settings.refine == "end-to-end"

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
                f"This table was distilled for {self.base.nfe} network calls on its own "
                "schedule; its parameters carry over to schedules of as many calls, refined "
                "weights to none."
            )
        return distilled(base, directions(base, self.settings.form), self.lambdas)

    # -- learning ------------------------------------------------------------------------------

    def train_round(self) -> dict[str, Tensor]:
        """Fit all steps; in the rounds after that go on with the refinement."""
        metrics = self._refine() if self._refines and self.rounds > 0 else self._fit()
        metrics["returned"] = float(list(_TABLES).index(self.returned))
        return {f"train/{key}": torch.tensor(value) for key, value in metrics.items()}

    def _fit(self) -> dict[str, float]:
        """Fit each step's parameters, one after the other; keep the better table."""
        settings, fitted = self.settings, self.pool.fitted
        self.errors = self._judge_teacher() if settings.check_teacher else {}
        constant = None
        if settings.form in CONSTANT:
            constant = best_constant(self.base, self._rows, self.denoiser, fitted)
        self.fits = fit(self.base, self._rows, self.denoiser, fitted, settings.ridge, constant)
        tables = {GIVEN: self.base, DISTILLED: distilled(self.base, self._rows, self.lambdas)}
        held_out = {name: self._held_out_errors(table) for name, table in tables.items()}
        self.returned = self._refined_from = best_of(held_out)
        self._tableau, self._kept_errors = tables[self.returned], held_out[self.returned]
        self._refiner = self._new_refiner(self._tableau)
        self.errors |= {name: self._reported_error(table) for name, table in tables.items()}
        self.errors["returned"] = self.errors[self.returned]
        if self.returned == GIVEN:
            before, after = (float(held_out[name].mean()) for name in tables)
            warnings.warn(
                f"Distillation made {self.base.name} no better, and it is kept: on held-out "
                f"noise the mean squared error of finished samples was {before:.2e}, distilled "
                f"{after:.2e}. More batches, a larger ridge or refine='end-to-end' may help.",
                stacklevel=2,
            )
        firsts = {j: values[0] for j, values in enumerate(self.lambdas) if len(values)}
        return {
            **{f"{name}_error": error for name, error in self.errors.items()},
            **{f"lambda_{j:03d}": float(value) for j, value in firsts.items()},
        }

    def _refine(self) -> dict[str, float]:
        """Go on with the refinement; keep the table if it is the best so far on held-out noise."""
        loss = self._refiner.step(self.denoiser, self.pool.fitted)
        candidate = self._refiner.module.export()
        if self._kept_errors is None:  # after a resume
            self._kept_errors = self._held_out_errors(self._tableau)
        errors = self._held_out_errors(candidate)
        if better := is_better(errors, self._kept_errors):
            self._tableau, self._kept_errors, self.returned = candidate, errors, REFINED
        if better or self.returned != REFINED:
            self.errors["refined"] = self._reported_error(candidate)
        self.errors["returned"] = self.errors[self.returned]
        refined, held_out = self.errors["refined"], float(errors.mean())
        return {"loss": loss, "refined_error": refined, "held_out_error": held_out}

    def _judge_teacher(self) -> dict[str, float]:
        batch = self.pool.fitted[0]
        error = judge_teacher(
            self.teacher,
            self.base,
            self.mdp.schedule,
            self.settings.scale,
            self.denoiser,
            batch.noise,
            self.settings.integer_times,
            batch.condition,
        )
        return {"teacher": error}

    def _held_out_errors(self, table: Tableau) -> Tensor:
        """Return a table's errors (N,) on the noise that it is chosen by."""
        return noise_errors(table, self.denoiser, self.pool.held_out)

    def _reported_error(self, table: Tableau) -> float:
        """Return a table's mean error on the noise that is only reported on."""
        return float(noise_errors(table, self.denoiser, self.pool.reported).mean())

    def _new_refiner(self, start: Tableau) -> Refiner:
        return Refiner(start, self.base.weights, self.device)

    # -- what a run shows and writes -----------------------------------------------------------

    def report(self) -> Report:
        """Return what each step's parameters did, and what all of them did together."""
        times = self.base.times.tolist()
        most = max((len(values) for values in self.lambdas), default=0)
        curves = {}
        for k in range(most):
            calls = [j for j, values in enumerate(self.lambdas) if len(values) > k]
            curves[f"{k + 1}"] = calls, [float(self.lambdas[j][k]) for j in calls]
        table = {
            "call": [str(j + 1) for j in range(len(self.fits))],
            "from": times[: len(self.fits)],
            "to": times[1 : len(self.fits) + 1],
            "lambda": [", ".join(f"{v:.3f}" for v in fit.lambdas) or "-" for fit in self.fits],
            "squared error": [fit.before for fit in self.fits],
            "with lambda": [fit.after for fit in self.fits],
            "removed": [f"{100 * fit.removed:.1f} %" for fit in self.fits],
        }
        state = self.state()
        return Report(
            self.verdict,
            {key: state[key] for key in ("errors", "fits", "returned")},
            {f"What distillation did to {self.base.name}": table},
            {"lambdas.png": [Panel("lambda", "network call", curves, scale="symlog")]},
        )

    def files(self) -> dict[str, Any]:
        """Return nothing: the checkpoint is the tableau."""
        return {}

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
        self.returned, self._refined_from = state["returned"], state["refined_from"]
        self._kept_errors = None
        starts_at_fit = self.fits and self._refined_from == DISTILLED
        start = distilled(self.base, self._rows, self.lambdas) if starts_at_fit else self.base
        self._refiner = self._new_refiner(start)
        self._refiner.load_state(state["refinement"])

    def identity(self) -> dict[str, Any]:
        """Return what the table was distilled for; it tells of process and times itself."""
        return {
            "target": self.mdp.target.name,
            "shape": list(self.mdp.shape),
            "solver": self.solver,
            "solver_options": dict(self.solver_options),
            "form": self.settings.form,
            **self.terms(),
        }

    def save(self, path: str | Path) -> None:
        """Write the tableau as JSON, with what its training needs to go on beside it.

        `Tableau.load` reads the same file; the denoiser, which is not trained, is not in it.
        """
        text = write_distilled(self.tableau, self.header(), **self.state())
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
        denoiser = overrides.pop("denoiser")
        agent: Any = cls._rebuilt(tree["training"], path, env, denoiser, device, overrides)
        agent._take_over(path)
        return agent

    def resume(self, path: str | Path) -> None:
        """Take over what a file of `save` holds; see `Trainee.resume`.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, another environment's, or one of a
                training with other settings.
        """
        _, tree = read_distilled(path, self.name)
        self._check_settings(tree["training"]["settings"], path)
        self._take_over(path)

    def _take_over(self, path: str | Path) -> None:
        with damage_named(path, CheckpointError):
            tableau, tree = read_distilled(path, self.name)
            training = tree["training"]
            self.check_identity(training["environment"], str(path))
            same_times = np.array_equal(tableau.times, self.base.times)
            if tableau.process != self.base.process or not same_times:
                raise CheckpointError(f"{path} was distilled on another schedule or solver.")
            counts = {key: counter(training, key, str(path)) for key in ("num_timesteps", "rounds")}
            self.load_state(tree)
            self.num_timesteps, self.rounds = counts["num_timesteps"], counts["rounds"]
            self._tableau = tableau
