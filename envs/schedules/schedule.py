"""The clock of the environment: which times a sampler visits.

A `Schedule` of `K` steps is a noise process and `K + 1` strictly decreasing times, from the
noisiest to (nearly) clean: state `j` has time `times[j]`, step `j` leads to `times[j + 1]`. Its
constructors are the usual grids, see `grids`. A schedule remembers its recipe, so it can be
respaced. A plain list of times is a schedule too: `Schedule(process, [10, 4, 1, 0])`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import check_arguments, checked
from ...common.files import write_atomically
from ...common.names import unknown_name
from ...common.reading import damage_named, quoted, read_json
from ..processes import NoiseProcess
from . import grids
from .ends import warn_of_ends
from .grids import SCHEDULES, SPACINGS, Grid
from .spacings import Spacing, refine_times

Recipe = tuple[str, dict[str, Any]]
Options = ParamSpec("Options")

FORMAT = "fewstep-schedule"


def _recipe(grid: Grid, options: Mapping[str, Any]) -> Recipe:
    """Return a grid's name and all options that it was made with; None says nothing."""
    defaults = {p.name: p.default for p in list(signature(grid).parameters.values())[2:]}
    known = defaults | check_arguments(grid, options)
    return grid.__name__, {name: value for name, value in known.items() if value is not None}


def _constructor(
    grid: Callable[Concatenate[NoiseProcess, int, Options], Tensor],
) -> classmethod[Schedule, Concatenate[NoiseProcess, int, Options], Schedule]:
    """Make a constructor of `Schedule` out of a grid, with the grid's arguments and docstring."""

    @functools.wraps(grid)
    def build(cls: type[Schedule], process: NoiseProcess, steps: int, **options: Any) -> Schedule:
        times = grid(process, steps, **options)  # type: ignore[call-arg]
        return cls(process, times, recipe=_recipe(grid, options))

    first = Parameter("cls", Parameter.POSITIONAL_OR_KEYWORD)
    build.__signature__ = Signature(  # type: ignore[attr-defined]
        [first, *signature(grid).parameters.values()], return_annotation="Schedule"
    )
    return classmethod(build)  # type: ignore[arg-type]


class Schedule:
    """A noise process and the decreasing times at which a sampler meets it.

    Args:
        process: The noise process that gives the times their meaning.
        times: `(K + 1,)` strictly decreasing times in `[0, process.t_max]`, with `K >= 1`.
        recipe: How the times were made; left to the named constructors.

    Attributes:
        process: The same.
        times: The same, as a float64 tensor on the CPU; a copy at each access, for tensors cannot
            be read-only, and a schedule never changes.
        recipe: Key of `SCHEDULES` and the keyword options that made the times; None for a list of
            times. It takes no part in equality.

    Raises:
        ValueError: The times are too few, not finite, not strictly decreasing or out of range.
    """

    @checked
    def __init__(
        self,
        process: NoiseProcess,
        times: Tensor | Sequence[float],
        *,
        recipe: Recipe | None = None,
    ) -> None:
        self._process = process
        self._recipe = None if recipe is None else (recipe[0], dict(recipe[1]))
        times = torch.as_tensor(times, dtype=torch.float64).detach().cpu().clone()
        self._times = times
        if times.ndim != 1 or len(times) < 2:
            raise ValueError(
                f"a schedule needs a vector of at least two times; got {tuple(times.shape)}"
            )
        if not bool(times.isfinite().all()):
            raise ValueError("the times of a schedule must be finite")
        rises = (times.diff() >= 0).nonzero()
        if len(rises):
            j = int(rises[0])
            raise ValueError(
                "the times of a schedule must strictly decrease; "
                f"times[{j}:{j + 2}] = {times[j : j + 2].tolist()}"
            )
        if times[-1] < 0 or times[0] > process.t_max:
            raise ValueError(
                f"the times of a schedule must lie in [0, {process.t_max:g}]; "
                f"got {float(times[-1]):g} to {float(times[0]):g}"
            )
        # A time of 1e-320 is above 0 and has no noise in float64, by which solvers divide.
        if not bool((process.sigma(times[:-1]) > 0).all()):
            raise ValueError("the times of a schedule must have noise, but for the last")

    @property
    def process(self) -> NoiseProcess:
        """The noise process."""
        return self._process

    @property
    def times(self) -> Tensor:
        """A copy of the times, `(K + 1,)` float64 on the CPU."""
        return self._times.clone()

    @property
    def recipe(self) -> Recipe | None:
        """A copy of the name and the options that made the times, or None."""
        return None if self._recipe is None else (self._recipe[0], dict(self._recipe[1]))

    @property
    def steps(self) -> int:
        """`K`, the number of transitions."""
        return len(self._times) - 1

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw the noise `(N, *shape)` that sampling starts from at this schedule's first time.

        Its standard deviation is 1 on a variance-preserving process and `sigma(times[0])` on a
        `VE`; see `NoiseProcess.prior_sample`. Warns of a start or an end that makes the samples
        wrong (`envs.schedules.ends`).
        """
        first, last = float(self._times[0]), float(self._times[-1])
        warn_of_ends(self.process, first, last)
        return self.process.prior_sample(shape, generator, t=first, device=device, dtype=dtype)

    @property
    def spacing(self) -> Spacing:
        """The variable that its times are even in, a `spacing` of `refine_times`.

        A list of times is split as the process's own grid is: evenly in time, but Karras's way
        where the times are noise levels.
        """
        grid = self.process.grid if self.recipe is None else self.recipe[0]
        return SPACINGS.get(grid, "time")

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """`alpha` and `sigma` at the times, `(K + 1,)` float64 each, for the solvers."""
        return self.process.alpha(self._times).numpy(), self.process.sigma(self._times).numpy()

    def step_of(self, timestep: float) -> int:
        """The step whose state has this time, up to float32 rounding.

        Raises:
            ValueError: No step starts at that time.
        """
        distance = (self._times[:-1] - timestep).abs()
        step = int(distance.argmin())
        if float(distance[step]) > 1e-6 * abs(float(self._times[step])):
            raise ValueError(f"no step of {self!r} starts at time {timestep:g}")
        return step

    def respaced(self, steps: int) -> Schedule:
        """The same recipe with another number of steps, at least 1.

        Raises:
            ValueError: The schedule has no recipe, or its recipe refuses that many steps.
        """
        if self.recipe is None:
            raise ValueError(
                f"a list of times cannot be respaced; give the {steps} steps' times, or name a grid"
            )
        name, options = self.recipe
        return make_schedule(name, self.process, steps, **options)

    def refined(self, factor: int, *, integer: bool = False) -> Schedule:
        """Split each step into `factor` sub-steps, even in the grid's own variable (`spacing`).

        A last step to time 0 is split only if that variable is the time. The times of this schedule
        are among the new ones without any rounding.

        Args:
            factor: Sub-steps a step, at least 1.
            integer: Round the new times to whole numbers and drop those that coincide.

        Raises:
            ValueError: `factor` is below 1.
        """
        rho = 7.0 if self.recipe is None else self.recipe[1].get("rho", 7.0)
        times = refine_times(self.process, self.times, factor, self.spacing, integer, rho=rho)
        return Schedule(self.process, times)

    # The usual grids; each has the arguments of its function in `grids`.
    uniform = _constructor(grids.uniform)
    quadratic = _constructor(grids.quadratic)
    karras = _constructor(grids.karras)
    log_snr = _constructor(grids.log_snr)
    dmn = _constructor(grids.dmn)
    leading = _constructor(grids.leading)
    uniform_torch = _constructor(grids.uniform_torch)
    quad = _constructor(grids.quad)
    linspace = _constructor(grids.linspace)
    trailing = _constructor(grids.trailing)
    fast_dpm = _constructor(grids.fast_dpm)

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description that `Schedule.from_config` reads back exactly."""
        config = {"process": self.process.to_config(), "times": self.times.tolist()}
        if self.recipe is not None:
            name, options = self.recipe
            config["recipe"] = [name, dict(options)]
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Rebuild the schedule that `to_config` described.

        Raises:
            ValueError: The recipe is not a name with options, or another part is refused.
        """
        process = NoiseProcess.from_config(config["process"])
        return cls(process, config["times"], recipe=_check_recipe(config.get("recipe")))

    def save(self, path: str | Path) -> None:
        """Write the schedule to a JSON file, atomically."""
        tree = {"format": FORMAT, "version": 1, **self.to_config()}
        text = json.dumps(tree, indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is no schedule, or one that this version refuses.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No schedule at {path}.")
        tree = read_json(path)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ValueError(f"{path} is not a schedule: it has no 'format': '{FORMAT}'.")
        if tree.get("version") != 1:
            raise ValueError(
                f"{path} has version {quoted(tree.get('version'))}; this fewstep reads 1."
            )
        with damage_named(path):
            return cls.from_config(tree)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return torch.equal(self._times, other._times) and self.process == other.process

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        first, last = float(self._times[0]), float(self._times[-1])
        return f"Schedule({self.process!r}, steps={self.steps}, {first:g} to {last:g})"


@checked
def make_schedule(name: str, process: NoiseProcess, steps: int, **options: Any) -> Schedule:
    """Build a schedule by name, or from a list of times such as `"1000, 300, 50, 0"`.

    Args:
        name: A key of `SCHEDULES`, or the times themselves, separated by commas.
        process: The noise process that gives the times their meaning.
        steps: Number of transitions; that of the list, if it is one.
        options: Keyword arguments of the named constructor.

    Raises:
        ValueError: The name or an option is unknown, a time is no number, the list has another
            number of steps, or the constructor refuses its arguments.
    """
    times = listed_times(name)
    if times is not None:
        if options:
            raise ValueError(f"a list of times takes no options; got {', '.join(options)}")
        if steps != len(times) - 1:
            raise ValueError(f"steps={steps}, but the list of times has {len(times) - 1}: {name}")
        return Schedule(process, times)
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    known = schedule_options(name)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of schedule {name}", option, known)
    grid = SCHEDULES[name]
    return Schedule(process, grid(process, steps, **options), recipe=_recipe(grid, options))


@checked
def schedule_options(name: str) -> list[str]:
    """Names of the options of a named schedule.

    Raises:
        TypeError: `name` is no string.
        ValueError: No schedule has that name.
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return list(signature(SCHEDULES[name]).parameters)[2:]


@checked
def listed_times(name: str) -> list[float] | None:
    """Read a comma-separated list of times; None for a name, which has no comma.

    Raises:
        ValueError: A part of the list is no number.
    """
    if "," not in name:
        return None
    try:
        return [float(part) for part in name.split(",")]
    except ValueError:
        raise ValueError(
            f"a list of times needs numbers between its commas; got {name!r}"
        ) from None


def _check_recipe(recipe: Any) -> Recipe | None:
    if recipe is None:
        return None
    # JSON knows no tuples.
    if (
        not isinstance(recipe, (list, tuple))
        or [type(part) for part in recipe] != [str, dict]
        or not all(isinstance(key, str) for key in recipe[1])
    ):
        raise ValueError(
            f"a schedule's recipe must be a name and a dict of options; got {recipe!r}"
        )
    return recipe[0], dict(recipe[1])
