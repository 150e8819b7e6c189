"""Stage two: the denoiser tuned where the schedule asks it (MATH.md 3.7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....common.optimisation import Averaged, adam, learning_rate, set_learning_rate
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ..best import BestNetwork
from ..settings import TuningSettings
from .adjoint import backpropagate
from .pool import Pool

# Updates of the network between two looks at held-out noise.
CHECK_INTERVAL = 50


class Tuning:
    """Gradient steps on the denoiser, and the average of its weights.

    A stage that is judged ends with the network that errs least on held-out noise: the one from
    before the stage, or an average on the way that is better; see
    `fewstep.agents.selection`.

    What is minimised is the finished samples' distance from the teacher's, through the whole chain.

    Args:
        denoiser: the network to tune, in place.
        pool: the teacher's finished samples.
        settings: of the stage.

    Attributes:
        averaged: the average of the weights.
        optimizer: Adam; None without rounds.
        updates: how many of this stage are done.
        tuned: whether the network that samples is a tuned one.
    """

    def __init__(self, denoiser: Denoiser, pool: Pool, settings: TuningSettings) -> None:
        self.denoiser = denoiser
        self.pool = pool
        self.settings = settings
        self.averaged = Averaged(denoiser, settings.ema if settings.rounds else 0.0)
        self.optimizer = adam(denoiser.parameters()) if settings.rounds else None
        self.updates = 0
        self.tuned = False
        self._best = BestNetwork(self.averaged)

    @property
    def done(self) -> bool:
        """Whether the stage is done."""
        return self.updates >= self.settings.rounds

    def update(
        self, tableau: Tableau, levels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Take one gradient step.

        Args:
            tableau: the sampler.
            levels: (T,) its descending noise levels.
            generator: source of samples, levels and noise.

        Returns:
            What to log: the loss, for one coordinate, and the norm of the gradient before it is
            clipped, that of the sum over coordinates.
        """
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = self._loss(tableau, levels, generator)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.denoiser.parameters(), self.settings.max_grad_norm or math.inf
        )
        done = self.updates / self.settings.rounds
        rate = learning_rate(self.settings.learning_rate, "cosine", done)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.averaged.update()
        self.updates += 1
        return {"loss": loss, "grad_norm": grad_norm}

    def begin(self, errors: Tensor) -> None:
        """Begin a stage that is judged, with the sampler's errors on held-out noise before it."""
        self._best.begin(errors)

    def judge(self, errors: Callable[[], Tensor]) -> float | None:
        """Now and then, and at the end, compare the averaged network with the stage's best one.

        Args:
            errors: measures the sampler with the averaged network on held-out noise, (N,).

        Returns:
            The mean of the errors, or None if they were not measured.
        """
        if not self.done and self.updates % CHECK_INTERVAL:
            return None
        now = errors()
        self._best.judge(now)
        return float(now.mean())

    def finish(self) -> None:
        """Take the best network of the stage, if it was judged."""
        if not self._best.begun:
            self.tuned = True
            return
        self.tuned = self.tuned or self._best.improved
        assert self.optimizer is not None
        self._best.finish(self.optimizer)

    def state(self) -> dict[str, Any]:
        """Return what the stage remembers beside the networks and how many updates are done."""
        return {
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            **self._best.state(),
            "tuned": self.tuned,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        # None: saved by an agent without stage two.
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self._best.load_state(state)
        self.tuned = state["tuned"]

    def _loss(self, tableau: Tableau, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Return what is minimised, for one coordinate; add its gradient to the weights'."""
        batches = self.pool.fitted
        noise = torch.cat([batch.noise for batch in batches])
        finished = torch.cat([batch.finished for batch in batches])
        given = [batch.condition for batch in batches if batch.condition is not None]
        size = (self.settings.batch_size,)
        drawn = torch.randint(len(noise), size, generator=generator, device=noise.device)
        trained = [weight for weight in self.denoiser.parameters() if weight.requires_grad]
        denoiser = self.denoiser.under(torch.cat(given)[drawn] if given else None)
        loss, _, _ = backpropagate(
            tableau, denoiser, noise[drawn], finished[drawn], tableau.steps, trained
        )
        return torch.tensor(loss / noise[0].numel())
