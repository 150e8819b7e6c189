"""Monitor: what the runner does between an agent's rounds, as a Stable-Baselines3 callback.

Progress bar with the live metric, checkpoints by the clock, evaluations with pictures in
TensorBoard, and Ctrl-C: the round is finished, the checkpoint written, and the run can be resumed.
A context manager: what it changes while training runs is as before however training ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, HParam
from torch import Tensor
from tqdm import tqdm

from ...agents.base import Agent
from ...critics.metrics.evaluation import NOISE_SEED, Evaluation, Sampler
from ..reports.plots import conditions_shown, pictured, samples_figure
from .interrupts import Interrupts
from .logs import LIVE_METRIC, NOT_TENSORBOARD

PICTURES = 4


class Monitor(BaseCallback):
    """Watch one stage of a run.

    Args:
        checkpoint: file to save the agent to.
        checkpoint_seconds: seconds between two checkpoints; 0 saves every round.
        rounds: rounds of the stage, for the bar.
        evaluation: the metrics; None evaluates nothing.
        evaluations: how many in the whole stage; 0 makes none.
        hyperparameters: for TensorBoard's HParams tab.
        on_save: called after each checkpoint.
    """

    model: Agent  # type: ignore[assignment]

    def __init__(
        self,
        checkpoint: Path,
        checkpoint_seconds: float,
        rounds: int,
        evaluation: Evaluation | None = None,
        evaluations: int = 20,
        hyperparameters: dict[str, Any] | None = None,
        on_save: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.checkpoint_seconds = checkpoint_seconds
        self.total_rounds = rounds
        self.evaluation = evaluation
        self.interval = max(rounds // evaluations, 1) if evaluations > 0 else 0
        self.picture_interval = self.interval * max(evaluations // PICTURES, 1)
        self.hyperparameters = hyperparameters or {}
        self.on_save = on_save
        self.interrupts = Interrupts()
        self.bar: tqdm[Any] | None = None
        self._saved = time.monotonic()

    def __enter__(self) -> Monitor:
        self.interrupts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.interrupts.__exit__(*error)
        finally:
            if self.bar is not None:
                self.bar.close()

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C asked for an end."""
        return self.interrupts.requested

    def _on_training_start(self) -> None:
        flat = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in self.hyperparameters.items()
        }
        metrics = {LIVE_METRIC: float("nan"), "rollout/ep_rew_mean": float("nan")}
        self.logger.record("hparams", HParam(flat, metrics), exclude=NOT_TENSORBOARD)
        self.bar = tqdm(
            total=self.total_rounds,
            initial=self.model.rounds,
            desc=self.model.name,
            unit="round",
            dynamic_ncols=True,
        )

    def _on_step(self) -> bool:
        assert self.bar is not None  # made when training starts
        self.bar.update()
        rounds = self.model.rounds
        if self.evaluation is not None and self.interval and rounds % self.interval == 0:
            self._evaluate(rounds)
        if self.interrupted or time.monotonic() - self._saved >= self.checkpoint_seconds:
            self._save()
        return not self.interrupted

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        self.model.save(self.checkpoint)
        self.on_save()
        self._saved = time.monotonic()

    def _evaluate(self, rounds: int) -> None:
        assert self.evaluation is not None
        assert self.bar is not None
        scores = self.evaluation.quick(
            finite(
                lambda n, generator, **under: self.model.sample(n, generator=generator, **under),
                self.model,
            )
        )
        self.bar.set_postfix_str(f"sliced W2 {scores['sliced_wasserstein']:.2e}")
        for name, score in scores.items():
            self.logger.record(f"eval/{name}", score)
        if rounds % self.picture_interval == 0 or rounds == self.total_rounds:
            generator = torch.Generator(self.model.device).manual_seed(NOISE_SEED)
            count = pictured(self.model.mdp.shape)
            under: dict[str, Any] = conditions_shown(self.model.mdp, count)
            samples = self.model.sample(count, generator=generator, **under)
            real = self.evaluation.target.take(count)
            figure = samples_figure({"samples": samples}, real)
            self.logger.record(
                "samples/sampler", Figure(figure, close=True), exclude=NOT_TENSORBOARD
            )
        self.logger.dump(self.model.num_timesteps)


def finite(sample: Sampler, agent: Agent) -> Sampler:
    """Return a sampler that raises TrainingDivergedError instead of giving NaN or infinity.

    Args:
        sample: of the agent.
        agent: in training, or trained.
    """

    def draw(n: int, generator: torch.Generator, **under: Any) -> Tensor:
        samples = sample(n, generator, **under)
        if not samples.isfinite().all():
            raise agent.diverged("a sample")
        return samples

    return draw
