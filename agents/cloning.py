"""BehaviorCloning: ordinary diffusion training, seen as imitation of the reversed noising process.

    loss = E_{x_0, t, eps} || prediction(alpha_t x_0 + sigma_t eps, t) - target ||^2    (DDPM)

It gives SFT-PG its initial policy. With an "edm" denoiser the same loss is EDM's weighted one, and
noise levels are drawn as there: ln sigma ~ N(p_mean, p_std^2) (Karras et al. 2022, Table 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.optimisation import (
    Averaged,
    adam,
    learning_rate,
    seeded,
    set_learning_rate,
)
from ..common.settings import bounded
from .base import Agent
from .denoisers.denoiser import Denoiser
from .environments import Environment
from .policy_gradient.execution import Execution, as_executed
from .settings import AgentSettings, ExecutionSettings, OptimizerSettings


@dataclass(frozen=True)
class CloningSettings(AgentSettings):
    """Settings of `BehaviorCloning`."""

    rounds: int = bounded(2000, least=1)
    """Rounds of training, each of one gradient step."""
    batch_size: int = bounded(1024, least=1)
    """Samples a gradient step."""
    p_mean: float = bounded(-1.2)
    """Mean of ln sigma in the draw of noise levels, for an edm denoiser only; EDM's -1.2 suits
    images of standard deviation 0.5."""
    p_std: float = bounded(1.2, above=0)
    """Standard deviation of ln sigma there."""
    label_dropout: float = bounded(0.1, least=0, most=1)
    """Share of the samples whose condition is hidden, in a conditional environment: what guidance
    and sampling without a condition need. 0 hides none."""
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(5e-3, lr_schedule="cosine", ema=0.99)
    )
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)


class BehaviorCloning(Agent):
    """Train a denoiser with the DDPM loss. One round is one gradient step.

    Args:
        env: the environment; its target gives the data, its process the noise.
        denoiser: the network to train, in place.
        *args: the settings, see `CloningSettings`.
        **arguments: single settings by name, and `Agent`'s remaining arguments.
    """

    name = "behavior-cloning"
    data_parallel = True
    needs_denoiser = False

    settings: CloningSettings
    Settings = CloningSettings

    def __init__(self, env: Environment, denoiser: Denoiser, *args: Any, **arguments: Any) -> None:
        super().__init__(env, denoiser, *args, **arguments)
        settings = self.settings
        if self.denoiser.conditioning is not None and self.denoiser.conditioning.guidance != 1:
            raise ValueError(
                "Behaviour cloning trains the network under each condition: give it the denoiser "
                "without guidance."
            )
        self.optimizer = adam(self.denoiser.parameters(), settings.optimizer.betas)
        self.averaged = Averaged(self.denoiser, settings.optimizer.ema)
        if self.denoiser.conditioning is not None:
            # Whoever samples with the network knows by this that it can do without one.
            drops = settings.label_dropout > 0
            trained = replace(self.denoiser.conditioning, drops=drops)
            self.averaged.module.conditioning = trained
        self.execution = Execution(self.denoiser, settings.execution)

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module

    @property
    def timesteps_per_round(self) -> int:
        """One call on each sample of the batch, on all processes."""
        return self._size

    @property
    def _size(self) -> int:
        return self.settings.batch_size * self.processes.count

    def files(self) -> dict[str, Any]:
        """Return nothing: the denoiser is for any sampler."""
        return {}

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        half = max((self.settings.execution.micro_batch_size or self.settings.batch_size) // 2, 1)
        return f"Take micro_batch_size={half}, the same gradient in more pieces."

    @as_executed
    def train_round(self) -> dict[str, Tensor]:
        """Take one gradient step on one batch."""
        # Building the agent left the caller's denoiser as it was; training makes it know "none".
        self.denoiser.conditioning = self.averaged.module.conditioning
        # What all processes need, the same on each, of which each takes its share.
        kind = None if self.denoiser.conditions is None else self.denoiser.conditions.kind
        everyone, given = self.mdp.target.draw(self._size, self.generator, kind)
        t = self.processes.share(self._draw_times())
        noise = self.processes.share(torch.empty_like(everyone).normal_(generator=self.generator))
        clean = self.processes.share(everyone)
        condition = self._condition(given)
        self.optimizer.zero_grad()
        size = self.settings.execution.micro_batch_size or self.settings.batch_size
        loss = torch.zeros((), device=self.device)
        with self._training_mode():
            for first in range(0, len(clean), size):
                rows = slice(first, first + size)
                under = None if condition is None else condition[rows]
                piece = self._loss(clean[rows], t[rows], noise[rows], under)
                part = len(clean[rows]) / self.settings.batch_size * piece
                part.backward()
                loss += part.detach()
        self.processes.average_gradients(self.denoiser.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.denoiser.parameters(), self.settings.optimizer.max_grad_norm or math.inf
        )
        rate = learning_rate(
            self.settings.optimizer.learning_rate,
            self.settings.optimizer.lr_schedule,
            self.progress,
        )
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.averaged.update()
        self.num_timesteps += self.timesteps_per_round
        return {"train/loss": loss, "train/grad_norm": grad_norm}

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Turn dropout on, where there is any, with noise that the round and the process fix."""
        dropouts = (
            m for m in self.denoiser.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        )
        if not any(module.p > 0 for module in dropouts):
            yield
            return
        key = (self.seed, self.rounds, self.processes.rank)
        self.denoiser.train()
        try:
            with seeded(int(np.random.SeedSequence(key).generate_state(1)[0])):
                yield
        finally:
            self.denoiser.eval()

    def _condition(self, given: Tensor | None) -> Tensor | None:
        """Hide some of the conditions (N, ...) behind "none"; keep this process's share of them."""
        conditions = self.denoiser.conditions
        if conditions is None or given is None:
            return None
        if self.settings.label_dropout > 0:
            chance = torch.rand(self._size, generator=self.generator, device=self.device)
            hidden = chance < self.settings.label_dropout
            hidden = hidden.view(-1, *[1] * (given.ndim - 1))
            given = torch.where(hidden, conditions.none(len(given), given.device), given)
        return self.processes.share(given)

    def _loss(self, clean: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        noisy = self.mdp.process.add_noise(clean, t, noise)
        denoiser = self.denoiser.under(condition)
        target = denoiser.training_target(clean, noise, t)
        return (denoiser(noisy, t) - target).square().mean()

    def _draw_times(self) -> Tensor:
        """Draw times for the batches of all processes.

        Levels of a discrete process are alike; others are uniform in log-SNR, or log-normal for an
        "edm" denoiser.
        """
        return self.denoiser.parameterisation.draw_times(
            self.mdp.process,
            self._size,
            self.generator,
            self.device,
            self.settings.p_mean,
            self.settings.p_std,
        )

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state["optimizer"])
