"""Agent: what all agents share: the learn loop, logging, sampling, checkpoint and resume.

An agent has Stable-Baselines3's face (learn, predict, save, load, set_logger), and SB3's callbacks
work on it, but it acts on the decision process itself (`DiffusionMDP`), whole batches at a time on
one device. A subclass implements `train_round`, one round of its algorithm, and names its state.

One timestep is one denoiser call on one sample.
"""

from __future__ import annotations

import copy
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ..common.checkpoint import (
    CheckpointError,
    NotFiniteError,
    counter,
    load_checkpoint,
    not_finite,
    save_checkpoint,
)
from ..common.distributed import Processes
from ..common.optimisation import OutOfMemoryError, TrainingDivergedError, is_out_of_memory
from ..common.reading import damage_named, shown
from ..common.settings import Settings
from ..envs import ENVIRONMENTS, DiffusionMDP, DiffusionVectorEnv, Schedule
from .denoisers.denoiser import Denoiser
from .presets import preset as look_up_preset
from .presets import preset_settings
from .samplers.sampling import sample
from .samplers.solver_policy import SolverPolicy
from .samplers.tableau import Tableau
from .solvers import Options, build_solver, default_schedule, default_solver_options

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger

Environment = DiffusionVectorEnv | DiffusionMDP | str
Callback: TypeAlias = "BaseCallback | list[BaseCallback] | Callable[..., bool] | None"
AnyAgent = TypeVar("AnyAgent", bound="Agent")


class Agent(ABC):
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
        settings: as they were given.
        num_timesteps: denoiser calls on single samples so far.
        mdp: the decision process; an agent with a critic has one of its own, which pays what the
            critic says.
        generator: the source of the training's randomness.
        processes: those that train together, under `torchrun`; else this one alone.
        data_parallel: whether several processes can train it together.
        checkpoint_name: what a run calls the file that `save` writes.
        will_log: whether this round's metrics are logged, so that dear ones are computed only then.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]]
    data_parallel: ClassVar[bool] = False
    checkpoint_name: ClassVar[str] = "checkpoint.safetensors"

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
        if not isinstance(settings, self.Settings | None):
            raise TypeError(f"settings must be {self.Settings.__name__}, got {settings!r}.")
        self.settings: Any = (settings or self.Settings()).replace(**changes)
        self.solver: str = self._solver()
        self.env = env = made_environment(env, self.solver)
        self.mdp = mdp_of(env)
        if denoiser.process != self.mdp.process:
            raise ValueError(
                f"The denoiser was made for {denoiser.process!r}, the environment has "
                f"{self.mdp.process!r}: build the environment with process=denoiser.process."
            )
        denoiser.check_shape(self.mdp.shape)
        self.device = torch.device(self.mdp.device)
        self.denoiser = denoiser.to(self.device)
        options = self.settings.solver_options
        if options is None:
            options = default_solver_options(self.solver, shape=self.mdp.shape)
        self.solver_options: Options = dict(options)
        self.seed = seed
        self.processes = Processes.current()
        if self.processes.count > 1 and not self.data_parallel:
            raise ValueError(
                f"'{self.name}' trains in one process, here are {self.processes.count}: start it "
                "without torchrun."
            )
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # Acting draws from a stream of its own: looking at samples does not change the training.
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self.verbose = verbose
        self.tensorboard_log = tensorboard_log
        self.num_timesteps = 0
        self.rounds = 0
        self.will_log = False
        self._total_timesteps = 0
        self._custom_logger: Logger | None = None
        self._started = 0.0
        self._timesteps_at_start = 0
        self._tableau = self.starting_tableau(self.denoiser)

    @classmethod
    def for_environment(
        cls: type[AnyAgent],
        env: Environment,
        denoiser: Denoiser,
        *,
        preset: str = "default",
        **settings: Any,
    ) -> AnyAgent:
        """Build the agent with the settings that `fewstep train` takes on this environment.

        `agent.learn(agent.total_timesteps)` then trains it as long as that. The same table says
        which process, schedule and network the command would take, where they are not the
        environment's own: `fewstep.agents.presets.preset(name_of_environment, cls.name)`.

        Args:
            env: see the class; presets go by the name of its target. Without one, as with an
                environment of yours, the agent's own defaults hold.
            denoiser: see the class.
            preset: "default", or "long" where there is one.
            settings: the constructor's arguments, which win over the preset's. The preset's
                `solver_options` go with its own solver only.

        Raises:
            ValueError: no preset of this name for this environment and agent.
        """
        defaults: Any = cls.Settings()
        solver = settings.get("solver") or defaults.solver or ""
        env = made_environment(env, solver)
        values = look_up_preset(mdp_of(env).target.name, cls.name, preset).agent
        shared = ("seed", "verbose", "tensorboard_log")
        given = {key: settings.pop(key) for key in (*shared, "critic") if key in settings}
        return cls(env, denoiser, preset_settings(cls.Settings, values, settings), **given)

    # -- what a subclass implements ------------------------------------------------------------

    @abstractmethod
    def train_round(self) -> dict[str, Tensor]:
        """Do one round: advance `num_timesteps`, return 0-d tensors to log by their full names."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything that training changes, as a tree for `save_checkpoint`."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    @property
    @abstractmethod
    def timesteps_per_round(self) -> int:
        """Denoiser calls on single samples that one round makes."""

    @property
    def planned_rounds(self) -> int | None:
        """Rounds that the settings call for; None leaves their number to the caller."""
        return getattr(self.settings, "rounds", None)

    def _solver(self) -> str:
        """Return the name of the solver that samples."""
        return self.settings.solver

    def smaller(self) -> str:
        """Return which settings need less memory, for the message when it ran out."""
        size = getattr(self.settings, "batch_size", None)
        return f"Take a batch_size below {size}." if size else "Take a smaller network."

    @property
    def done(self) -> bool:
        """Whether the algorithm has come to an end by itself; `learn` then stops."""
        return False

    @property
    def total_timesteps(self) -> int:
        """Timesteps that `learn` needs for all rounds that the settings or the preset call for.

        Raises:
            ValueError: neither says how many: the agent was not built by `for_environment`.
        """
        rounds = self.planned_rounds
        if rounds is None:
            raise ValueError(
                f"How long '{self.name}' trains is yours to say: rounds * "
                "agent.timesteps_per_round, or build it with for_environment."
            )
        return self.timesteps_until(rounds)

    def timesteps_until(self, rounds: int) -> int:
        """Return the timesteps left until `rounds` rounds are done; 0 if they are."""
        return max(rounds - self.rounds, 0) * self.timesteps_per_round

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The denoiser that samples: the averaged one where the agent averages."""
        return self.denoiser

    @property
    def schedule(self) -> Schedule:
        """The times that the sampler visits: the environment's, unless the agent learns them."""
        return self.mdp.schedule

    @property
    def tableau(self) -> Tableau:
        """The sampler: the solver on `schedule`."""
        return self._tableau

    def tableau_on(self, schedule: Schedule) -> Tableau:
        """Return the sampler on another schedule."""
        return build_solver(self.solver, schedule, self.sampling_denoiser, **self.solver_options)

    def starting_tableau(self, denoiser: Denoiser) -> Tableau:
        """Return the sampler before any training, for the denoiser as it was then."""
        return build_solver(self.solver, self.mdp.schedule, denoiser, **self.solver_options)

    # -- learning ------------------------------------------------------------------------------

    def learn(
        self: AnyAgent,
        total_timesteps: int,
        callback: Callback = None,
        log_interval: int = 10,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> AnyAgent:
        """Train for `total_timesteps` denoiser calls (rounded up to whole rounds).

        The denoiser is trained in place. Precision and compilation are those that the caller set
        again when a round ends; `channels_last` leaves its weights in that memory format.

        Args:
            total_timesteps: how many; added to those done when `reset_num_timesteps` is False.
            callback: Stable-Baselines3 callbacks; `on_step` is called once a round.
            log_interval: rounds between two log entries.
            tb_log_name: name of the TensorBoard run; the agent's name by default.
            reset_num_timesteps: start counting (and the learning-rate schedule) anew.
            progress_bar: show one.

        Raises:
            TrainingDivergedError: a logged quantity became NaN or infinite.
            OutOfMemoryError: a round does not fit; the message says which settings need less.
        """
        if reset_num_timesteps:
            self.num_timesteps = self.rounds = 0
        self._total_timesteps = total_timesteps + self.num_timesteps
        if self._custom_logger is None:
            from stable_baselines3.common.utils import configure_logger

            self._logger = configure_logger(
                self.verbose, self.tensorboard_log, tb_log_name or self.name, reset_num_timesteps
            )
        self._started, self._timesteps_at_start = time.monotonic(), self.num_timesteps
        callbacks = self._callbacks(callback, progress_bar)
        callbacks.on_training_start(locals(), globals())
        while self.num_timesteps < self._total_timesteps and not self.done:
            callbacks.on_rollout_start()
            last = self.num_timesteps + self.timesteps_per_round >= self._total_timesteps
            self.will_log = last or (self.rounds + 1) % log_interval == 0
            try:
                metrics = self.processes.mean(self.train_round())
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(self.smaller()) from None
            self.rounds += 1
            self._check_finite(metrics)
            if self.will_log:
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
    def progress(self) -> float:
        """Fraction of the training done, 0 to 1."""
        if not self._total_timesteps:
            return 0.0
        return min(self.num_timesteps / self._total_timesteps, 1.0)

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

    def _callbacks(self, callback: Callback, progress_bar: bool) -> BaseCallback:
        from stable_baselines3.common.callbacks import (
            BaseCallback,
            CallbackList,
            ConvertCallback,
            ProgressBarCallback,
        )

        if isinstance(callback, list):
            callback = CallbackList(callback)
        elif callback is not None and not isinstance(callback, BaseCallback):
            callback = ConvertCallback(callback)
        parts = [
            part for part in (callback, ProgressBarCallback() if progress_bar else None) if part
        ]
        callbacks = CallbackList(parts)
        callbacks.init_callback(self)  # type: ignore[arg-type]
        return callbacks

    def _check_finite(self, metrics: dict[str, Tensor]) -> None:
        # One reduction a round: a single device synchronisation, whatever the number of metrics.
        values = torch.stack([value.detach().float() for value in metrics.values()])
        if not values.isfinite().all():
            bad = [key for key, ok in zip(metrics, values.isfinite(), strict=True) if not ok]
            raise TrainingDivergedError(", ".join(bad), self.num_timesteps)

    def _check_state(self) -> None:
        # A round's metrics are those from before its last step, which may be the one that diverged.
        if (name := not_finite(self.tree())) is not None:
            raise TrainingDivergedError(name, self.num_timesteps)

    def _log(self, metrics: dict[str, Tensor]) -> None:
        for key, value in metrics.items():
            self.logger.record(key, value.item())
        elapsed = max(time.monotonic() - self._started, sys.float_info.epsilon)
        done = self.num_timesteps - self._timesteps_at_start
        self.logger.record("time/fps", int(done / elapsed))
        self.logger.record("time/iterations", self.rounds, exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    # -- acting --------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the next samples for NumPy observations, single or batched.

        The samples of a batch may be at different steps, unless the sampler has memory; their
        timesteps are (N,) or (N, 1). Finished ones stay as they are. A sampler with memory keeps it
        in `state`: hand it back with the next call.

        `deterministic` takes the mean of each transition. For an ancestral sampler that is a
        different, noise-free sampler, so False is the default here; Stable-Baselines3's
        `evaluate_policy` passes True unless told otherwise.
        """
        if not self.tableau.one_step:
            policy = SolverPolicy(self.tableau, self.sampling_denoiser, shape=self.mdp.shape)
            return policy.predict(observation, state, episode_start, True, self.acting_generator)
        sample = torch.as_tensor(observation["sample"], dtype=torch.float32, device=self.device)
        single = sample.ndim == len(self.mdp.shape)
        sample = sample.unsqueeze(0) if single else sample
        times = np.broadcast_to(np.ravel(observation["timestep"]), len(sample))
        tableau = self.tableau
        if deterministic:
            nothing = np.zeros(tableau.steps)
            tableau = tableau.replace(noise=nothing, covariance=None)
        action = sample.clone()  # that of a finished sample, whose action is ignored
        for timestep in np.unique(times[times != np.float32(self.schedule.times[-1])]):
            here = torch.from_numpy(times == timestep).to(self.device)
            step, part = self.schedule.step_of(float(timestep)), sample[here]
            output, std = tableau.evaluate_with_std(self.sampling_denoiser, part, step)
            moved = tableau.advance(step, {step: part}, {step: output}, self.acting_generator, std)
            action[here] = moved
        action = action[0] if single else action
        return action.cpu().numpy(), state

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> Tensor:
        """Draw finished samples (n, *shape) on the device.

        Args:
            n: how many.
            schedule: another grid than the environment's.
            generator: source of randomness; the agent's own for acting by default.
            noise: initial states (n, *shape) instead of fresh prior samples.
            return_trajectory: return all states (K + 1, n, *shape) instead, the noisiest first.
        """
        tableau = self.tableau if schedule is None else self.tableau_on(schedule)
        generator = self.acting_generator if generator is None else generator
        if noise is not None and len(noise) != n:
            raise ValueError(f"n is {n}, but noise holds {len(noise)} initial states.")
        return sample(
            tableau,
            self.sampling_denoiser,
            n if noise is None else noise,
            shape=self.mdp.shape,
            generator=generator,
            return_trajectory=return_trajectory,
        )

    @property
    def nfe(self) -> int:
        """Network evaluations a sample costs."""
        return self.tableau.nfe

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything that resuming needs to one safetensors file, atomically.

        Raises:
            TrainingDivergedError: something in it is not finite, be it weights, their average, a
                critic, a head or an optimizer's moments; an older file stays as it is.
            OSError: the file cannot be written; an older file stays as it is.
        """
        try:
            save_checkpoint(path, self.tree())
        except NotFiniteError as error:
            raise TrainingDivergedError(error.name, self.num_timesteps) from None

    def tree(self) -> dict[str, Any]:
        """Return everything that resuming needs, as `save` writes it and `restore` reads it."""
        denoiser = self.sampling_denoiser
        return {
            "kind": "agent",
            "agent": self.name,
            "settings": self.settings.to_tree(),
            "seed": self.seed,
            "environment": environment_identity(self.mdp),
            "num_timesteps": self.num_timesteps,
            "rounds": self.rounds,
            "generator": self.generator.get_state(),
            "acting_generator": self.acting_generator.get_state(),
            "denoiser": denoiser.to_tree(),
            "live": self.denoiser.body.state_dict() if denoiser is not self.denoiser else None,
            "state": self.state(),
        }

    @classmethod
    def load(
        cls: type[AnyAgent],
        path: str | Path,
        env: Environment,
        device: str | torch.device | None = None,
        **overrides: Any,
    ) -> AnyAgent:
        """Rebuild an agent that `save` wrote, ready to sample or to go on learning.

        Args:
            path: the file.
            env: the environment it was trained on, built again.
            device: where to put it; the environment's device by default.
            overrides: constructor arguments that differ or that JSON cannot hold, such as
                `critic=...`; a foreign network body is passed as `body=...`.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, another agent's, or another
                environment's.
        """
        tree = load_checkpoint(path)
        if tree.get("kind") != "agent" or tree.get("agent") != cls.name:
            raise CheckpointError(
                f"{path} was written by {tree.get('agent') or tree.get('kind')!r}, "
                f"not by {cls.name!r}."
            )
        denoiser = Denoiser.load(path, body=overrides.pop("body", None))
        with damage_named(path, CheckpointError):
            settings = settings_of(cls, tree, path)
        overrides.setdefault("seed", tree["seed"])
        with damage_named(path, CheckpointError, "cannot be loaded here"):
            agent = cls(env, denoiser, settings, **overrides)
        agent.check_device(device)
        agent.restore(tree, str(path))
        return agent

    def check_device(self, device: str | torch.device | None) -> None:
        """Raise CheckpointError if the environment is on another device than this one.

        "cuda" and "cuda:0" may be the same, so what counts is where a tensor would go.
        """
        if device is not None and torch.empty(0, device=device).device != self.device:
            raise CheckpointError(f"The environment is on {self.device}: build it on {device}.")

    def resume(self, path: str | Path) -> None:
        """Take over the training state of a file that `save` wrote; see `restore`.

        A file that is refused changes nothing.
        """
        tree = load_checkpoint(path)
        before = copy.deepcopy(self.tree())
        try:
            self.restore(tree, str(path))
        except Exception:
            self.restore(before)
            raise

    def restore(self, tree: dict[str, Any], origin: str = "checkpoint") -> None:
        """Take over the training state of a tree that `save` wrote.

        Raises:
            CheckpointError: the tree comes from another environment, or is damaged.
        """
        with damage_named(origin, CheckpointError):
            self._restore(tree, origin)

    def _restore(self, tree: dict[str, Any], origin: str) -> None:
        here, there = environment_identity(self.mdp), tree["environment"]
        here.pop("data")
        for key, value in here.items():
            if there.get(key) != value:
                found, wanted = shown(there.get(key)), shown(value)
                raise CheckpointError(
                    f"{origin} was trained on another environment: {key} is {found}, here it is "
                    f"{wanted}."
                )
        # Older files say nothing of the data.
        if "data" in there and not self.mdp.target.matches(there["data"]):
            raise CheckpointError(
                f"{origin} was trained on another environment: the training samples of its target "
                f"{self.mdp.target.name!r} were not those that there are here."
            )
        if tree["live"] is None and self._averages and tree["settings"] == self.settings.to_tree():
            raise CheckpointError(f"{origin} is damaged: it lacks the weights in training, live.")
        self.num_timesteps = counter(tree, "num_timesteps", origin)
        self.rounds = counter(tree, "rounds", origin)
        self.generator.set_state(tree["generator"].cpu())
        self.acting_generator.set_state(tree["acting_generator"].cpu())
        self.sampling_denoiser.body.load_state_dict(tree["denoiser"]["weights"])
        # None: saved by an agent that does not average; then both begin with the same weights.
        live = tree["denoiser"]["weights"] if tree["live"] is None else tree["live"]
        self.denoiser.body.load_state_dict(live)
        self.load_state(tree["state"])

    @property
    def _averages(self) -> bool:
        return self.sampling_denoiser is not self.denoiser


def settings_of(agent: type[Agent], tree: Mapping[str, Any], origin: str | Path) -> Settings:
    """Read an agent's settings out of the tree of a file.

    Raises:
        CheckpointError: one that the agent does not know, or that it does not take.
    """
    if not isinstance(tree["settings"], dict):
        raise CheckpointError(f"{origin} is damaged: its settings are {tree['settings']!r}.")
    try:
        return agent.Settings.from_tree(tree["settings"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{origin} is damaged: {error}") from None


def made_environment(env: Environment, solver: str) -> DiffusionVectorEnv | DiffusionMDP:
    """Make an environment that is given by its id, on the solver's `default_schedule`."""
    if not isinstance(env, str):
        return env
    made = gym.make_vec(env, **_default_settings(env, solver)).unwrapped
    assert isinstance(made, DiffusionVectorEnv)
    return made


def mdp_of(env: DiffusionVectorEnv | DiffusionMDP) -> DiffusionMDP:
    """Return the decision process of an environment."""
    return env if isinstance(env, DiffusionMDP) else env.unwrapped.mdp


def environment_identity(mdp: DiffusionMDP) -> dict[str, Any]:
    """Return what two environments must share for a checkpoint of one to fit the other."""
    schedule = mdp.schedule.to_config()
    schedule.pop("recipe", None)  # the same times by another name are the same schedule
    return {
        "target": mdp.target.name,
        "shape": list(mdp.shape),
        "schedule": schedule,
        "data": mdp.target.fingerprint,
    }


def _default_settings(env: str, solver: str) -> dict[str, Any]:
    """Return what an environment of ours is made with where only its id is given."""
    name = env.removeprefix("fewstep/").removesuffix("-v0")
    if name not in ENVIRONMENTS:
        return {}
    known = ENVIRONMENTS[name]
    process = known.process(known.steps)
    return {"schedule": default_schedule(solver, process, known.steps, known.schedule)}
