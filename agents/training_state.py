"""Trainee: an actor with settings and a training state, which is saved, loaded and resumed."""

from __future__ import annotations

import copy
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..common.arguments import check_seed
from ..common.checkpoint import (
    CheckpointError,
    NotFiniteError,
    counter,
    load_checkpoint,
    save_checkpoint,
)
from ..common.optimisation import TrainingDivergedError
from ..common.reading import damage_named, shown
from ..common.settings import Settings
from ..envs import ENVIRONMENTS
from .acting import Actor
from .denoisers.denoiser import Denoiser
from .environments import (
    Environment,
    environment_identity,
    made_environment,
    name_of,
    told_apart,
)
from .presets import LEARNERS, preset_settings
from .presets import preset as look_up_preset

AnyTrainee = TypeVar("AnyTrainee", bound="Trainee")


class Trainee(Actor, ABC):
    """What training changes, and what it was told to.

    Args:
        env: see `Actor`, as for `denoiser`.
        denoiser: the network.
        settings: an instance of the agent's `Settings`; the defaults if None.
        seed: seed of all the agent's randomness.
        changes: single settings by name, which win: see `fewstep.common.settings.Settings.replace`.

    Attributes:
        settings: as they were given.
        num_timesteps: denoiser calls on single samples so far.
        rounds: rounds of training so far.
        generator: the source of the training's randomness.
        checkpoint_name: what a run calls the file that `save` writes.
        budgets: names of the settings that say how many rounds it trains.
    """

    settings: Any
    name: ClassVar[str]
    Settings: ClassVar[type[Settings]]
    checkpoint_name: ClassVar[str] = "checkpoint.safetensors"
    budgets: ClassVar[tuple[str, ...]] = ("rounds",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(name := vars(cls).get("name"), str):
            LEARNERS.add(name)

    def __init__(
        self, env: Environment, denoiser: Denoiser, settings: Any, seed: int, **changes: Any
    ) -> None:
        if not isinstance(settings, self.Settings | None):
            raise TypeError(f"settings must be {self.Settings.__name__}, got {settings!r}.")
        check_seed(seed)
        told: Any = (settings or self.Settings()).replace(**changes)
        self.settings = told
        super().__init__(env, denoiser, self._solver(), told.solver_options, seed)
        self.seed = seed
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.num_timesteps = 0
        self.rounds = 0

    @classmethod
    def for_environment(
        cls: type[AnyTrainee],
        env: Environment,
        denoiser: Denoiser,
        *,
        preset: str = "default",
        **settings: Any,
    ) -> AnyTrainee:
        """Build the agent with the settings that `fewstep train` takes on this environment.

        `agent.learn()` then trains it as long as that. The same table says which process, schedule
        and network the command would take, where they are not the environment's own:
        `fewstep.agents.presets.preset(name_of_environment, cls.name)`.

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
        if isinstance(env, str):  # it is made for the solver, which may be the preset's
            name, known = name_of(env), {}
            if name in ENVIRONMENTS:
                known = look_up_preset(name, cls.name, preset).agent
            solver = settings.get("solver") or known.get("solver") or defaults.solver or ""
            env = made_environment(env, solver)
        values = look_up_preset(name_of(env), cls.name, preset).agent
        shared = ("seed", "verbose", "tensorboard_log")
        own = ("critic", "features", "tableau")
        given = {key: settings.pop(key) for key in (*shared, *own) if key in settings}
        return cls(env, denoiser, preset_settings(cls.Settings, values, settings), **given)

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything that training changes, as a tree for `save_checkpoint`."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def _solver(self) -> str:
        """Return the name of the solver that samples."""
        return self.settings.solver

    def step_sizes(self) -> list[str]:
        """Return the settings to lower where training diverges, dotted: those that it reads."""
        return ["optimizer.learning_rate"] if hasattr(self.settings, "optimizer") else []

    def diverged(self, quantity: str) -> TrainingDivergedError:
        """Return the error that says what became NaN or infinite, and what to lower."""
        return TrainingDivergedError(quantity, self.num_timesteps, lower=self.step_sizes())

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
            raise self.diverged(error.name) from None

    def tree(self) -> dict[str, Any]:
        """Return everything that resuming needs, as `save` writes it and `restore` reads it."""
        denoiser = self.sampling_denoiser
        return {
            "kind": "agent",
            **self.header(),
            "device": self.device.type,
            "generator": self.generator.get_state(),
            "acting_generator": self.acting_generator.get_state(),
            "denoiser": denoiser.to_tree(),
            "live": self.denoiser.body.state_dict() if denoiser is not self.denoiser else None,
            "state": self.state(),
        }

    def header(self) -> dict[str, Any]:
        """Return what a file says of who wrote it, as JSON values."""
        return {
            "agent": self.name,
            "settings": self.settings.to_tree(),
            "seed": self.seed,
            "environment": self.identity(),
            "num_timesteps": self.num_timesteps,
            "rounds": self.rounds,
        }

    def identity(self) -> dict[str, Any]:
        """Return what a file and whoever takes it up have to share."""
        return {**environment_identity(self.mdp), **self.terms()}

    def terms(self) -> dict[str, Any]:
        """Return under which conditions its denoiser is asked, and how; nothing without any."""
        terms = self.denoiser.conditioning
        if terms is None:
            return {}
        # What dropped labels allow is the network's, and changes when it is cloned.
        asked = {name: value for name, value in terms.to_config().items() if name != "drops"}
        return {"conditional": self.mdp.conditional, "given": asked}

    @classmethod
    def load(
        cls: type[AnyTrainee],
        path: str | Path,
        env: Environment,
        device: str | torch.device | None = None,
        **overrides: Any,
    ) -> AnyTrainee:
        """Rebuild an agent that `save` wrote, ready to sample or to go on learning.

        Args:
            path: the file.
            env: the environment it was trained on, built again.
            device: where to put it; the environment's device by default.
            overrides: constructor arguments that differ or that JSON cannot hold, such as
                `critic=...`; a foreign network body is passed as `body=...`. The file's
                `solver_options` go with its own solver only.

        Raises:
            CheckpointError: a missing, corrupt or foreign file, another agent's, or another
                environment's.
        """
        tree = load_checkpoint(path)
        cls._check_writer(tree, path)
        denoiser = Denoiser.load(path, body=overrides.pop("body", None))
        agent = cls._rebuilt(tree, path, env, denoiser, device, overrides)
        agent.restore(tree, str(path))
        return agent

    @classmethod
    def _check_writer(cls, tree: Mapping[str, Any], path: str | Path) -> None:
        """Raise CheckpointError for the file of another agent, or of none."""
        if tree.get("kind") != "agent" or tree.get("agent") != cls.name:
            raise CheckpointError(
                f"{path} was written by {tree.get('agent') or tree.get('kind')!r}, "
                f"not by {cls.name!r}."
            )

    @classmethod
    def _remembered(cls, state: Mapping[str, Any], denoiser: Denoiser) -> dict[str, Any]:
        """Return the constructor arguments that a file's training state holds, if it holds any.

        Args:
            state: what `state` returned.
            denoiser: the file's network, which an agent may ask in another way than it was saved.
        """
        return {}

    @classmethod
    def _rebuilt(
        cls: type[AnyTrainee],
        header: Mapping[str, Any],
        path: str | Path,
        env: Environment,
        denoiser: Denoiser,
        device: str | torch.device | None,
        overrides: dict[str, Any],
    ) -> AnyTrainee:
        """Build the agent that a file's header tells of, not trained yet."""
        with damage_named(path, CheckpointError):
            settings: Any = settings_of(cls, header, path)
            if overrides.get("solver", settings.solver) != settings.solver:
                settings = settings.replace(solver_options=None)  # they are for the file's solver
            overrides.setdefault("seed", header["seed"])
            known = cls._remembered(header.get("state", {}), denoiser)
            overrides = {**known, **overrides}
        with damage_named(path, CheckpointError, "cannot be loaded here"):
            agent = cls(env, denoiser, settings, **overrides)
        # "cuda" and "cuda:0" may be the same, so what counts is where a tensor would go.
        if device is not None and torch.empty(0, device=device).device != agent.device:
            raise CheckpointError(f"The environment is on {agent.device}: build it on {device}.")
        return agent

    def resume(self, path: str | Path) -> None:
        """Take over the training state of a file that `save` wrote; see `restore`.

        A file that is refused changes nothing. The training that goes on is the one of the file:
        only how long it takes, how fast it learns and how it is executed may have changed, any
        `rounds`, `learning_rate`, `batch_size`, and the groups `optimizer` and `execution`. `load`
        takes other changes.

        Raises:
            CheckpointError: also another agent's file, or one of an agent with other settings.
        """
        tree = load_checkpoint(path)
        self._check_writer(tree, path)
        self._check_settings(tree.get("settings"), path)
        before = copy.deepcopy(self.tree())
        try:
            self.restore(tree, str(path))
        except Exception:
            self.restore(before)
            raise

    def _check_settings(self, there: Any, path: str | Path) -> None:
        """Raise CheckpointError if a training under other settings is to go on under these."""
        groups = self.Settings.groups()
        known, own = (_flat(tree, groups) for tree in (there, self.settings.to_tree()))
        for name in known.keys() & own.keys():  # older files lack newer settings
            group, _, last = name.rpartition(".")
            free = group in _FREE_GROUPS or last.endswith(_FREE)
            if not free and known[name] != own[name]:
                raise CheckpointError(
                    f"{path} was trained with {name}={shown(known[name])}, here it is "
                    f"{shown(own[name])}: give the agent the file's settings, or load the file "
                    f"with the new one, {type(self).__name__}.load(path, env, ...)."
                )

    def restore(self, tree: dict[str, Any], origin: str = "checkpoint") -> None:
        """Take over the training state of a tree that `save` wrote.

        Raises:
            CheckpointError: the tree comes from another environment, or is damaged.
        """
        with damage_named(origin, CheckpointError):
            self._restore(tree, origin)

    def _restore(self, tree: dict[str, Any], origin: str) -> None:
        self.check_identity(tree["environment"], origin)
        if tree["live"] is None and self._averages and tree["settings"] == self.settings.to_tree():
            raise CheckpointError(f"{origin} is damaged: it lacks the weights in training, live.")
        self.num_timesteps = counter(tree, "num_timesteps", origin)
        self.rounds = counter(tree, "rounds", origin)
        for name in ("generator", "acting_generator"):
            self._take_up(getattr(self, name), tree[name].cpu(), tree.get("device"))
        self.sampling_denoiser.body.load_state_dict(tree["denoiser"]["weights"])
        # None: saved by an agent that does not average; then both begin with the same weights.
        live = tree["denoiser"]["weights"] if tree["live"] is None else tree["live"]
        self.denoiser.body.load_state_dict(live)
        self.load_state(tree["state"])

    def _take_up(self, generator: torch.Generator, state: Tensor, written_on: str | None) -> None:
        """Let a source of random numbers go on where a file's was; older files name no device.

        A GPU's cannot go on on a CPU: there new numbers begin, which depend on seed and progress.
        """
        if (written_on or "cpu") == self.device.type:
            generator.set_state(state)
        else:
            generator.manual_seed(zlib.crc32(f"{self.seed} {self.num_timesteps}".encode()))

    def check_identity(self, there: Mapping[str, Any], origin: str) -> None:
        """Raise CheckpointError if a file's identity is not this agent's."""
        for key, value in self.identity().items():
            if key != "data" and there.get(key) != value:
                found, wanted = told_apart(key, there.get(key), value)
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

    @property
    def _averages(self) -> bool:
        return self.sampling_denoiser is not self.denoiser


# What may change in a training that goes on.
_FREE_GROUPS = ("optimizer", "execution")
# A table is compared itself.
_FREE = ("rounds", "learning_rate", "batch_size", "table")


def _flat(tree: Any, groups: Collection[str]) -> dict[str, Any]:
    """Return the settings of a file by their names, those in groups as `group.name`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        inner = value.items() if name in groups and isinstance(value, Mapping) else ()
        flat |= {f"{name}.{key}": part for key, part in inner} if inner else {name: value}
    return flat


def settings_of(agent: type[Trainee], tree: Mapping[str, Any], origin: str | Path) -> Settings:
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
