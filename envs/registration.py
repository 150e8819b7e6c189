"""The table of environments: a new one is one line here.

Importing `fewstep.envs` registers each as `fewstep/<name>-v0` for `gym.make` and
`gym.make_vec`. `make_mdp` builds the decision process behind a name, which is what the shells
and the agents act on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from ..common.arguments import checked
from ..common.conditions import Conditional, kind_of
from ..common.names import unknown_name
from .inpainting import Inpainting
from .mdp import DiffusionMDP, Reward
from .processes import DiscreteVP, NoiseProcess, as_process
from .schedules import Schedule, listed_times, make_schedule
from .targets.images import IMAGE_SETS
from .targets.known import make_target
from .targets.target import Target


@dataclass(frozen=True)
class Environment:
    """What stands behind an environment's name.

    Attributes:
        target: Name of the target.
        process: `steps -> NoiseProcess`; the toys' process has one beta a step, as SFT-PG's, that
            of images is DDPM's whatever the steps.
        steps: Default number of steps.
        schedule: Default schedule; None is the process's own kind of grid.
    """

    target: str
    process: Callable[[int], NoiseProcess]
    steps: int = 10
    schedule: str | None = None


def _ddpm(steps: int) -> NoiseProcess:
    """DDPM's chain of 1000 betas, which ends in noise whatever the number of steps."""
    return DiscreteVP.linear(1000)


ENVIRONMENTS: dict[str, Environment] = {
    "SwissRoll": Environment("SwissRoll", DiscreteVP.sigmoid),
    "Moons": Environment("Moons", DiscreteVP.sigmoid),
    "GaussianCluster": Environment("GaussianCluster", DiscreteVP.sigmoid),
    "Digits": Environment("Digits", _ddpm),
    **{name: Environment(name, _ddpm) for name in IMAGE_SETS},
}


def known_environment(name: str) -> str | None:
    """Turn `SwissRoll`, `swissroll` or `fewstep/SwissRoll-v0` into the key of the table, if any."""
    short = name.removeprefix("fewstep/").removesuffix("-v0")
    return {known.lower(): known for known in ENVIRONMENTS}.get(short.lower())


def resolve_environment(name: str) -> str:
    """Turn a name into the table's key, see `known_environment`.

    Raises:
        ValueError: The name is unknown.
    """
    if (known := known_environment(name)) is None:
        raise unknown_name("environment", name, ENVIRONMENTS)
    return known


def make_registered(name: str, num_envs: int = 1, **settings: Any) -> gym.vector.VectorEnv:
    """Make a vector environment by any name of one of ours, or by another's registered id.

    Raises:
        ValueError: The name is unknown.
    """
    known = known_environment(name)
    try:
        return gym.make_vec(name if known is None else _id(known), num_envs, **settings)
    except gym.error.UnregisteredEnv:
        raise unknown_name("environment", name, ENVIRONMENTS) from None


@checked
def make_mdp(
    name: str,
    *,
    steps: int | None = None,
    schedule: Schedule | str | Path | None = None,
    reward: Reward | None = None,
    device: torch.device | str = "cpu",
    data_dir: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    process: NoiseProcess | str | None = None,
    target: Target | str | None = None,
    schedule_options: dict[str, Any] | None = None,
    inpaint: str | torch.Tensor | None = None,
    conditional: Conditional = False,
) -> DiffusionMDP:
    """Build the decision process of a known environment, with any part replaced.

    Args:
        name: A key of `ENVIRONMENTS`, see `known_environment`.
        steps: Number of steps, at least 1; that of a given `Schedule` or list of times, else the
            default.
        schedule: The times to visit, or a name for `make_schedule`, or the `.json` file of a
            `Schedule`; `process.grid` if None. A given `Schedule` brings its process.
        reward: `(N, *shape) -> (N,)`, high on data; `MMDCritic` if None.
        device: Where tensors live.
        data_dir: Folder of the data files, for targets that need one; see `make_target`.
        download: Fetch missing data files into `data_dir`.
        image_size: Side in pixels of the images of `ImageFolder`; 64 by default.
        process: The noise process, or a name for `make_process`.
        target: The real distribution, or the name of one.
        schedule_options: Options of a schedule given by name, such as `{"rho": 5.0}`.
        inpaint: A mask, or a name of one, "half", "quarter" or "random": the part of each sample
            that is known, and put back after every step (`Inpainting`). None knows nothing.
        conditional: Play each episode under a class of the target's, or under a caption or an
            embedding, see `DiffusionMDP`.

    Raises:
        ValueError: A name is unknown, `steps` is below 1 or contradicts the schedule, the process
            contradicts it, it takes no such options, the target takes no `image_size`, the mask
            does not fit, a data file is damaged, or there are no conditions of this kind.
        TypeError: The reward is not callable, or the mask no tensor of bool.
        FileNotFoundError: `data_dir` is given and is not a folder, data files are missing, or no
            such schedule file.
        ConnectionError: The download failed.
    """
    known = ENVIRONMENTS[resolve_environment(name)]
    process = None if process is None else as_process(process)
    if isinstance(schedule, str | Path) and str(schedule).endswith(".json"):
        schedule = Schedule.load(schedule)
    if isinstance(schedule, Schedule):
        if steps not in (None, schedule.steps):
            raise ValueError(f"steps={steps}, but the given schedule has {schedule.steps}")
        if schedule_options:
            raise ValueError(
                "schedule_options are for a schedule given by name; build the Schedule with them"
            )
        process = schedule.process if process is None else process
    else:
        schedule = schedule or known.schedule
        if steps is None:
            times = listed_times(str(schedule))
            steps = known.steps if times is None else len(times) - 1
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        process = known.process(steps) if process is None else process
        schedule = str(schedule or process.grid)
        schedule = make_schedule(schedule, process, steps, **(schedule_options or {}))
    if not isinstance(target, Target):
        target = make_target(
            target or known.target,
            device=device,
            data_dir=data_dir,
            download=download,
            image_size=image_size,
            captions=kind_of(conditional) == "captions",
        )
    elif image_size not in (None, target.shape[-1]):
        raise ValueError(
            "image_size is for a target given by name; the given one has samples of shape "
            f"{tuple(target.shape)}"
        )
    parts = target.to(device), process, schedule, reward, conditional
    return DiffusionMDP(*parts) if inpaint is None else Inpainting(*parts, mask=inpaint)


def _id(name: str) -> str:
    return f"fewstep/{name}-v0"


def register_environments() -> None:
    """Register every entry of `ENVIRONMENTS` that Gymnasium does not know yet."""
    for name in ENVIRONMENTS:
        env_id = _id(name)
        # No max_episode_steps: the episode ends by itself after the schedule's steps, and the
        # environment's own spec says so.
        if env_id not in gym.registry:
            gym.register(
                env_id,
                entry_point="fewstep.envs.single:DiffusionEnv",
                vector_entry_point="fewstep.envs.numpy_vector:make_vector_env",
                kwargs={"mdp": name},
            )
