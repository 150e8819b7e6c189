"""Agent: what all agents share, and the loop in which they learn.

An agent has Stable-Baselines3's face (learn, predict, save, load, set_logger), and SB3's callbacks
work on it, but it acts on the decision process itself (`DiffusionMDP`), whole batches at a time on
one device. It acts by `Actor`, and is saved by `Trainee`; here it learns.

A subclass implements `train_round`, one round of its algorithm, and names its `state`. Runs treat
all agents through these two, `sampler`, `done`, `report` and `files`.

One timestep is one denoiser call on one sample.
"""

from __future__ import annotations

import math
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..common.arguments import at_least, checked
from ..common.checkpoint import not_finite
from ..common.distributed import Processes
from ..common.optimisation import OutOfMemoryError, is_out_of_memory
from .denoisers.denoiser import Denoiser
from .environments import Environment
from .report import Report
from .samplers.tableau import Tableau
from .training_state import Trainee

if TYPE_CHECKING:
    from stable_baselines3.common.logger import Logger

    from .callbacks import Callback

AnyAgent = TypeVar("AnyAgent", bound="Agent")
# A metric that some rounds have, those in which an agent compares what it learns: they are logged.
MEASURED = "train/held_out_error"


class Agent(Trainee):
    """Base of the agents.

    Args:
        env: a `DiffusionVectorEnv`, its `DiffusionMDP`, or an environment id, which stands for the
            environment on the solver's `default_schedule`.
        denoiser: the network, moved to the environment's device. Building an agent changes nothing
            else of it, and nothing of the environment.
        settings: the agent's settings, an instance of its `Settings`; the defaults if None.
        seed: seed of all the agent's randomness.
        verbose: 1 prints the log to the screen.
        tensorboard_log: folder for TensorBoard; None logs nothing.
        changes: single settings by name, which win: see `fewstep.common.settings.Settings.replace`.

    Attributes:
        mdp: the decision process; an agent with a critic has one of its own, which pays what the
            critic says.
        processes: those that train together, under `torchrun`; else this one alone.
        data_parallel: whether several processes can train it together.
        needs_denoiser: whether it starts from a trained network, rather than from nothing.
        takes_features: whether it may be given a feature extractor, `features=...`.
        takes_tableau: whether it may be given a finished table, `tableau=...`, to sample with or to
            start from.
        grid: schedule that a run takes where none is named, if not the environment's.
        will_log: whether this round's metrics are logged, so that dear ones are computed only then.
    """

    data_parallel: ClassVar[bool] = False
    needs_denoiser: ClassVar[bool] = True
    takes_features: ClassVar[bool] = False
    takes_tableau: ClassVar[bool] = False
    grid: ClassVar[str | None] = None

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: Any = None,
        *,
        seed: int = 0,
        verbose: int = 0,
        tensorboard_log: str | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, seed, **changes)
        self.processes = Processes.current()
        if self.processes.count > 1 and not self.data_parallel:
            raise ValueError(
                f"'{self.name}' trains in one process, here are {self.processes.count}: start it "
                "without torchrun."
            )
        self.verbose = verbose
        self.tensorboard_log = tensorboard_log
        self.will_log = False
        # How many timesteps `learn` was told to go to; None: until the agent's budget is done.
        self._goal: int | None = None
        self._custom_logger: Logger | None = None
        self._started = 0.0
        self._timesteps_at_start = 0

    # -- what a subclass implements ------------------------------------------------------------

    @abstractmethod
    def train_round(self) -> dict[str, Tensor]:
        """Do one round; return 0-d tensors to log by their full names.

        An agent that says `timesteps_per_round` advances `num_timesteps` itself.
        """

    @property
    def timesteps_per_round(self) -> int | None:
        """Denoiser calls on single samples that each round makes; None where they are counted.

        Counted are all that a round makes, also those that only measure what was learned.
        """
        return None

    @property
    def budget(self) -> int:
        """Rounds that the settings call for; an algorithm may end before."""
        return self.settings.rounds

    @property
    def finished(self) -> bool:
        """Whether the algorithm has come to an end by itself: `learn` then does nothing more."""
        return False

    def report(self) -> Report:
        """Return what there is to show of the learning beside samples and their scores."""
        return Report()

    def files(self) -> dict[str, Any]:
        """Return what a run writes beside its checkpoint: file name -> what has a `save(path)`."""
        return {"tableau.json": self.tableau}

    @property
    def learns_tableau(self) -> bool:
        """Whether training changes the table: then a run writes it at every checkpoint."""
        return self.tableau is not self._tableau

    @classmethod
    def given_tableau(cls, path: str | Path) -> Tableau | None:
        """Return the finished table that the agent was given which wrote a file, if it was any."""
        return None

    def networks(self) -> list[nn.Module]:
        """Return the networks whose calls are counted, where they are."""
        return [self.denoiser, self.sampling_denoiser]

    def smaller(self) -> str:
        """Return which settings need less memory, for the message when it ran out."""
        size = getattr(self.settings, "batch_size", None)
        return f"Take a batch_size below {size}." if size else "Take a smaller network."

    # -- learning ------------------------------------------------------------------------------

    @checked
    def learn(
        self: AnyAgent,
        total_timesteps: int | None = None,
        callback: Callback = None,
        log_interval: int = 10,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> AnyAgent:
        """Train until the agent's own budget is done, or for so many denoiser calls.

        The denoiser is trained in place. Precision and compilation are those that the caller set
        again when a round ends; `channels_last` leaves its weights in that memory format.

        Args:
            total_timesteps: how many calls, at least 0, rounded up to whole rounds; added to those
                done when `reset_num_timesteps` is False. None goes on until the agent is `done`.
            callback: Stable-Baselines3 callbacks; `on_step` is called once a round.
            log_interval: rounds between two log entries, at least 1; rounds in which what is
                learned is compared on held-out noise are logged, too.
            tb_log_name: name of the TensorBoard run; the agent's name by default.
            reset_num_timesteps: start counting (and the learning-rate schedule) anew.
            progress_bar: show one.

        Raises:
            TrainingDivergedError: a logged quantity became NaN or infinite.
            OutOfMemoryError: a round does not fit; the message says which settings need less.
        """
        at_least(1, log_interval=log_interval)
        at_least(0, total_timesteps=total_timesteps)
        if reset_num_timesteps:
            self.num_timesteps = self.rounds = 0
        self._goal = None if total_timesteps is None else total_timesteps + self.num_timesteps
        # Both load Stable-Baselines3, which sampling does without.
        from .callbacks import configure_logger, one_callback

        if self._custom_logger is None:
            self._logger = configure_logger(
                self.verbose, self.tensorboard_log, tb_log_name or self.name, reset_num_timesteps
            )
        self._started, self._timesteps_at_start = time.monotonic(), self.num_timesteps
        callbacks = one_callback(callback, progress_bar)
        callbacks.init_callback(self)  # type: ignore[arg-type]
        callbacks.on_training_start(locals(), globals())
        while not self._over:
            callbacks.on_rollout_start()
            self.will_log = self.last_round or (self.rounds + 1) % log_interval == 0
            # Some are counted on the CPU.
            metrics = {name: value.to(self.device) for name, value in self._round().items()}
            metrics = self.processes.mean(metrics)
            self.rounds += 1
            self._check_finite(metrics)
            if self.will_log or self._over or MEASURED in metrics:
                self._log(metrics)
            callbacks.update_locals(locals())
            stop = not callbacks.on_step()
            if self.processes.any(stop, self.device):
                break
            callbacks.on_rollout_end()
        self._check_state()
        callbacks.on_training_end()
        return self

    @property
    def done(self) -> bool:
        """Whether the agent's own budget is done."""
        return self.finished or self.rounds >= self.budget

    @property
    def progress(self) -> float:
        """Fraction of the training done, 0 to 1."""
        done, whole = self.rounds, self.budget
        if self._goal is not None:
            done, whole = self.num_timesteps, self._goal
        return min(done / whole, 1.0) if whole else 0.0

    @property
    def planned(self) -> float:
        """How many rounds there are when `learn` ends; infinite if that is not known.

        Asked within a round, before the round's own calls are counted.
        """
        if self._goal is None:
            return self.budget
        calls, left = self.timesteps_per_round, self._goal - self.num_timesteps
        return math.inf if calls is None else self.rounds + math.ceil(left / calls)

    @property
    def last_round(self) -> bool:
        """Whether `learn` ends with the round that comes, if that is known; see `planned`."""
        return self.rounds + 1 >= self.planned

    @property
    def _over(self) -> bool:
        if self._goal is None:
            return self.done
        return self.finished or self.num_timesteps >= self._goal

    def _round(self) -> dict[str, Tensor]:
        """Do one round; count its calls where the agent does not say how many there are."""
        try:
            if self.timesteps_per_round is not None:
                return self.train_round()
            with self._counting():
                return self.train_round()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(self.smaller()) from None

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Add each sample of each call of a network to `num_timesteps`."""

        def count(_network: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.num_timesteps += len(arguments[0])

        networks = {id(network): network for network in self.networks()}
        hooks = [network.register_forward_pre_hook(count) for network in networks.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def logger(self) -> Logger:
        """The Stable-Baselines3 logger in use."""
        return self._custom_logger or self._logger

    def set_logger(self, logger: Logger) -> None:
        """Log to a Stable-Baselines3 logger of one's own."""
        self._custom_logger = logger

    def get_env(self) -> Environment:
        """Return the environment (Stable-Baselines3's callbacks ask)."""
        return self.env

    def get_vec_normalize_env(self) -> None:
        """Return None: samples are never normalised (Stable-Baselines3's callbacks ask)."""
        return

    def _check_finite(self, metrics: dict[str, Tensor]) -> None:
        # One reduction a round: a single device synchronisation, whatever the number of metrics.
        values = torch.stack([value.detach().float() for value in metrics.values()])
        if not values.isfinite().all():
            bad = [key for key, ok in zip(metrics, values.isfinite(), strict=True) if not ok]
            raise self.diverged(", ".join(bad))

    def _check_state(self) -> None:
        # A round's metrics are those from before its last step, which may be the one that diverged.
        if (name := not_finite(self.tree())) is not None:
            raise self.diverged(name)

    def _log(self, metrics: dict[str, Tensor]) -> None:
        for key, value in metrics.items():
            self.logger.record(key, value.item())
        elapsed = max(time.monotonic() - self._started, sys.float_info.epsilon)
        done = self.num_timesteps - self._timesteps_at_start
        self.logger.record("time/fps", int(done / elapsed))
        self.logger.record("time/iterations", self.rounds, exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)
