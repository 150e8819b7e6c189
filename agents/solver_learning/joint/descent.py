"""Solver learning's descent: parameters of tables go down a loss, watched on held-out noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....common.optimisation import TrainingDivergedError, frozen, learning_rate, set_learning_rate
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ..scheduling.descent import LEAST_GAP
from ..scheduling.pool import Batch, joined
from .ball import Ball
from .family import FACTORS, SHIFTS, TIMES, WEIGHTS, Parameters, TableFamily
from .settings import DescentSettings
from .slopes import EndObjective, Slope, Value

# Steps of L-BFGS in one round; each round starts it anew, so that a resumed training needs the
# parameters alone.
ITERATIONS = 10

# The setting of Adam's rate on each of the parameters.
_RATES = {
    TIMES: "times_rate",
    SHIFTS: "shifts_rate",
    FACTORS: "coefficients_rate",
    WEIGHTS: "coefficients_rate",
}

# Adam's step grows over so many updates, as that of schedule learning.
WARM_UP = 20


class TableDescent:
    """The descent of the parameters of a family of tables.

    Args:
        family: the tables.
        settings: how they descend.

    Attributes:
        live: the parameters in training.
        averaged: their average, which samples.
        updates: rounds done.
    """

    def __init__(self, family: TableFamily, settings: DescentSettings) -> None:
        self.family, self.settings = family, settings
        self.live: Parameters = {
            name: torch.nn.Parameter(value) for name, value in self.family.zeros().items()
        }
        self.averaged: Parameters = {}
        self.updates = 0
        self._adam = self._new_adam()
        self.begin(self.family.zeros())

    @property
    def done(self) -> bool:
        """Whether all rounds are done."""
        return self.updates >= self.settings.rounds

    @property
    def due(self) -> bool:
        """Whether what there is now is to be compared on held-out noise."""
        every = 1 if self.settings.optimizer == "lbfgs" else self.settings.check_interval
        return self.done or self.updates % every == 0

    def begin(self, parameters: Parameters) -> None:
        """Start from parameters."""
        self._set(self.live, parameters)
        self.averaged = {name: value.clone() for name, value in parameters.items()}
        self._adam = self._new_adam()

    def update(
        self,
        objective: EndObjective,
        denoiser: Denoiser,
        batches: list[Batch],
        ball: Ball | None = None,
        value: Value | None = None,
    ) -> tuple[dict[str, float], Slope]:
        """Do one round.

        Args:
            objective: what is to fall.
            denoiser: the network.
            batches: all that are learned on.
            ball: of soft teacher forcing.
            value: of the critic.

        Returns:
            What to log, and the loss before the round with its derivatives, on all batches or on
            the one whose turn it is.

        Raises:
            TrainingDivergedError: a parameter is not finite, or two levels are the same.
        """
        with frozen(denoiser):
            if self.settings.optimizer == "lbfgs":
                slope = self._quasi_newton(objective, denoiser, batches)
            else:
                slope = self._adam_step(objective, denoiser, batches, ball, value)
        self.updates += 1
        self._check()
        self._average()
        norm = torch.cat([part.flatten() for part in slope.gradient.values()]).norm()
        return {"loss": slope.loss, "grad_norm": float(norm)}, slope

    def table(self) -> Tableau:
        """Return the table that samples."""
        return self.family.table(self.averaged)

    def copy(self) -> Parameters:
        """Return the parameters of the table that samples."""
        return {name: value.clone() for name, value in self.averaged.items()}

    def _adam_step(
        self,
        objective: EndObjective,
        denoiser: Denoiser,
        batches: list[Batch],
        ball: Ball | None,
        value: Value | None,
    ) -> Slope:
        index = self.updates % len(batches)
        batch = batches[index]
        if ball is not None:
            batch = batch._replace(noise=ball.noises[index])
        slope = objective.slope(denoiser, self.live, [batch], value)
        for name in self._turn():
            self.live[name].grad = slope.gradient[name]
        done = self.updates / self.settings.rounds
        rates = [
            learning_rate(rate, "cosine", done, self.updates, WARM_UP) for rate in self._rates()
        ]
        set_learning_rate(self._adam, *rates)
        self._adam.step()
        self._adam.zero_grad()
        self.family.cut_shifts(self.live)
        if ball is not None:
            # Each noise follows its derivative, where its loss falls by it.
            rollouts = slope.rollouts[0]
            moved = ball.step(index, rollouts.by_noise)
            table = self.family.table(self.live)
            now = objective.shares(denoiser, table, [batch._replace(noise=moved)])
            ball.keep(index, moved, now < rollouts.contributions)
        return slope

    def _quasi_newton(
        self, objective: EndObjective, denoiser: Denoiser, batches: list[Batch]
    ) -> Slope:
        if not objective.loss.coupled:
            batches = joined(batches)
        names = self._turn()
        before = {name: value.detach().clone() for name, value in self.live.items()}
        lbfgs = torch.optim.LBFGS(
            [self.live[name] for name in names],
            max_iter=ITERATIONS,
            history_size=ITERATIONS,
            line_search_fn="strong_wolfe",
        )
        slopes: list[Slope] = []

        def closure() -> float:
            slope = objective.slope(denoiser, self.live, batches)
            slopes.append(slope._replace(rollouts=[]))
            # L-BFGS's tolerances are absolute: the loss is measured by what it was at first.
            unit = abs(slopes[0].loss) or 1.0
            for name in names:
                self.live[name].grad = slope.gradient[name] / unit
            return slope.loss / unit

        try:
            lbfgs.step(closure)
            self.family.cut_shifts(self.live)
            found = all(bool(value.isfinite().all()) for value in self.live.values())
        except ValueError:
            # The line search tried a table that is none, with numbers that are not finite.
            if not slopes:
                raise
            found = False
        if not found:
            self._set(self.live, before)
        for value in self.live.values():
            value.grad = None
        return slopes[0]

    def _turn(self) -> list[str]:
        """Return the names of what is learned in this round."""
        if not self.settings.alternate:
            return list(self.live)
        groups = ((TIMES, SHIFTS), (FACTORS, WEIGHTS))
        group = groups[self.updates // self.settings.alternate % 2]
        return [name for name in self.live if name in group]

    @property
    def rate_names(self) -> list[str]:
        """The names of the rates that act, each once; none of lbfgs, whose line search finds it."""
        if self.settings.optimizer == "lbfgs":
            return []
        return list(dict.fromkeys(_RATES[name] for name in self.live))

    def _rates(self) -> list[float]:
        return [getattr(self.settings, _RATES[name]) for name in self.live]

    def _new_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [value]} for value in self.live.values()])

    @torch.no_grad()
    def _average(self) -> None:
        # Over the first rounds a long average would still be its start.
        n = self.updates
        decay = min(self.settings.ema, (1 + n) / (10 + n))
        for name, value in self.averaged.items():
            value.lerp_(self.live[name], 1 - decay)

    @torch.no_grad()
    def _set(self, into: Parameters, values: Mapping[str, Tensor]) -> None:
        for name, value in into.items():
            value.copy_(values[name])

    def _check(self) -> None:
        levels = self.family.levels(self.live)
        apart = bool((levels[:-1] > (1 + LEAST_GAP) * levels[1:]).all())
        if not (apart and all(bool(value.isfinite().all()) for value in self.live.values())):
            lower = " or ".join(f"descent.{name}" for name in self.rate_names)
            advice = f" Lower {lower}." if lower else ""
            raise TrainingDivergedError(
                "a number of the table",
                self.updates,
                f"Solver learning diverged: after round {self.updates} a number of its table is "
                f"not finite, or two noise levels are the same.{advice} Checkpoints written before "
                "are good.",
            )

    def state(self) -> dict[str, Any]:
        """Return what the rounds changed, but for how many are done."""
        return {
            "live": {name: value.detach() for name, value in self.live.items()},
            "averaged": self.averaged,
            "adam": self._adam.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._set(self.live, {name: value.cpu() for name, value in state["live"].items()})
        self._set(self.averaged, {name: value.cpu() for name, value in state["averaged"].items()})
        self._adam.load_state_dict(state["adam"])
