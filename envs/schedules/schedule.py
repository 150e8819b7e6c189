"""The clock of the environment: which times a sampler visits.

A ``Schedule`` of ``K`` steps is a noise process and ``K + 1`` strictly decreasing times, from the
noisiest to (nearly) clean: state ``j`` has time ``times[j]``, step ``j`` leads to ``times[j + 1]``.
The constructors are the usual grids (MATH.md 0.5). ``uniform`` spaces its times down to 0;
``quadratic``, ``karras`` and ``log_snr`` down to ``process.t_min``, for the log-SNR is infinite at
0; the subsets (``leading``, ``quad``, ...) pick whole noisings of a ``DiscreteVP``. With
``append_zero`` they reach 0 by one last step. A schedule remembers its recipe, so it can be
respaced. A plain list of times is a schedule too: ``Schedule(process, [10, 4, 1, 0])``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import checked
from ...common.files import write_atomically
from ...common.names import unknown_name
from ...common.reading import damage_named, quoted, read_json
from ..processes.process import DiscreteVP, NoiseProcess
from .ends import warn_of_ends
from .fast_dpm import fast_times
from .spacings import Spacing, refine_times, subset_times, variable

Recipe = tuple[str, dict[str, Any]]

FORMAT = "fewstep-schedule"

# Spacing of each recipe that is even in something else than the time.
_SPACINGS: dict[str, Spacing] = {
    "quadratic": "sqrt_time",
    "karras": "karras",
    "log_snr": "log_snr",
}


class Schedule:
    """A noise process and the decreasing times at which a sampler meets it.

    Args:
        process: The noise process that gives the times their meaning.
        times: ``(K + 1,)`` strictly decreasing times in ``[0, process.t_max]``, with ``K >= 1``.
        recipe: How the times were made; left to the named constructors.

    Attributes:
        process: The same.
        times: The same, as a float64 tensor on the CPU; a copy at each access, for tensors cannot
            be read-only, and a schedule never changes.
        recipe: Key of ``SCHEDULES`` and the keyword options that made the times; None for a list of
            times. It takes no part in equality.

    Raises:
        ValueError: The times are too few, not finite, not strictly decreasing or out of range.
    """

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
        """A copy of the times, ``(K + 1,)`` float64 on the CPU."""
        return self._times.clone()

    @property
    def recipe(self) -> Recipe | None:
        """A copy of the name and the options that made the times, or None."""
        return None if self._recipe is None else (self._recipe[0], dict(self._recipe[1]))

    @property
    def steps(self) -> int:
        """``K``, the number of transitions."""
        return len(self._times) - 1

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw the noise ``(N, *shape)`` that sampling starts from at this schedule's first time.

        Its standard deviation is 1 on a variance-preserving process and ``sigma(times[0])`` on a
        ``VE``; see ``NoiseProcess.prior_sample``. Warns of a start or an end that makes the samples
        wrong (``envs.ends``).
        """
        first, last = float(self._times[0]), float(self._times[-1])
        warn_of_ends(self.process, first, last)
        return self.process.prior_sample(shape, generator, t=first, device=device, dtype=dtype)

    @property
    def spacing(self) -> Spacing:
        """The variable that its times are even in, a ``spacing`` of ``refine_times``.

        A list of times is split evenly in time, but one of noise levels as Karras's grid is.
        """
        if self.recipe is None:
            return "time" if isinstance(self.process, DiscreteVP) else "karras"
        return _SPACINGS.get(self.recipe[0], "time")

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """``alpha`` and ``sigma`` at the times, ``(K + 1,)`` float64 each, for the solvers."""
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
        """Split each step into ``factor`` sub-steps, even in the grid's own variable (``spacing``).

        A last step to time 0 is split only if that variable is the time. The times of this schedule
        are among the new ones without any rounding.

        Args:
            factor: Sub-steps a step, at least 1.
            integer: Round the new times to whole numbers and drop those that coincide.

        Raises:
            ValueError: ``factor`` is below 1.
        """
        rho = 7.0 if self.recipe is None else self.recipe[1].get("rho", 7.0)
        times = refine_times(self.process, self.times, factor, self.spacing, integer, rho=rho)
        return Schedule(self.process, times)

    @classmethod
    @checked
    def uniform(
        cls,
        process: NoiseProcess,
        steps: int,
        *,
        end: float = 0.0,
        start: float | None = None,
        append_zero: bool = False,
    ) -> Schedule:
        """Times on a line from ``start`` to ``end`` (0 or ``process.t_min``, say).

        On a ``DiscreteVP`` of ``steps`` betas this visits each integer exactly.

        Args:
            process: Any process.
            steps: Number of transitions, at least 1.
            end: Where the line ends, in ``[0, start)``.
            start: Where it starts; ``t_max`` if None.
            append_zero: Spend the last step on going from ``end``, above 0, to 0.
        """
        inner = _check_steps(steps) - bool(append_zero)
        first = process.t_max if start is None else start
        # Multiply before dividing: an integer grid then has no rounding at all.
        ramp = torch.arange(inner, -1, -1, dtype=torch.float64)
        times = end + (first - end) * ramp / inner if inner else torch.tensor([first])
        if append_zero:
            times = torch.cat([times, times.new_zeros(1)])
        options = {"end": end, **_given(start=start, append_zero=append_zero or None)}
        return cls(process, times, recipe=("uniform", options))

    @classmethod
    @checked
    def quadratic(
        cls,
        process: NoiseProcess,
        steps: int,
        *,
        append_zero: bool = True,
        start: float | None = None,
    ) -> Schedule:
        """Square roots of the times on a line from ``start`` (``t_max``) to ``t_min``, then 0."""
        options = {"append_zero": append_zero, **_given(start=start)}
        return cls._between(process, steps, ("quadratic", options))

    @classmethod
    @checked
    def karras(
        cls,
        process: NoiseProcess,
        steps: int,
        *,
        rho: float = 7.0,
        append_zero: bool = True,
        start: float | None = None,
    ) -> Schedule:
        """EDM's grid: ``(sigma / alpha)^(1/rho)`` on a line (Karras et al. 2022, Eq. 5), then 0.

        Args:
            process: Any process; on a ``VE`` from 0.002 to 80 this is EDM's default.
            steps: Number of transitions, at least 1.
            rho: How strongly the times crowd near the data, > 0.
            append_zero: End with a step from ``t_min`` to 0, as EDM does.
            start: The first time; ``t_max`` if None.
        """
        options = {"rho": rho, "append_zero": append_zero, **_given(start=start)}
        return cls._between(process, steps, ("karras", options), rho)

    @classmethod
    @checked
    def log_snr(
        cls,
        process: NoiseProcess,
        steps: int,
        *,
        append_zero: bool = False,
        start: float | None = None,
    ) -> Schedule:
        """Log-SNRs on a line from ``start`` (``t_max``) to ``t_min``; the grid of DPM-Solver."""
        options = {"append_zero": append_zero, **_given(start=start)}
        return cls._between(process, steps, ("log_snr", options))

    @classmethod
    @checked
    def leading(
        cls,
        process: NoiseProcess,
        steps: int,
        *,
        append_zero: bool = True,
        steps_offset: int = 0,
    ) -> Schedule:
        """Every ``k``-th noising from the first on, ``k = N // steps``; DDIM's "uniform".

        Args:
            process: A ``DiscreteVP`` of ``N`` noisings.
            steps: Number of transitions, at least 1.
            append_zero: Pick ``steps`` noisings and end with a step to 0; else pick one more.
            steps_offset: Added to each index, at least 0; some image models use 1.

        Raises:
            ValueError: The process is not discrete, has too few noisings, or ``steps_offset`` leads
                beyond the last.
        """
        return cls._subset("leading", process, steps, append_zero, steps_offset=steps_offset)

    @classmethod
    @checked
    def uniform_torch(
        cls, process: NoiseProcess, steps: int, *, append_zero: bool = True
    ) -> Schedule:
        """Floors of a line from 0 to ``N``, end excluded, as in D-ODE; see ``leading``."""
        return cls._subset("uniform_torch", process, steps, append_zero)

    @classmethod
    @checked
    def quad(cls, process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Schedule:
        """Floored squares of a line from 0 to ``sqrt(0.8 N)``, DDIM's "quad"; see ``leading``."""
        return cls._subset("quad", process, steps, append_zero)

    @classmethod
    @checked
    def linspace(cls, process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Schedule:
        """A rounded line from the last noising to the first, both included; see ``leading``."""
        return cls._subset("linspace", process, steps, append_zero)

    @classmethod
    @checked
    def trailing(cls, process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Schedule:
        """Every ``N / steps``-th noising from the last on, rounded; see ``leading``."""
        return cls._subset("trailing", process, steps, append_zero)

    @classmethod
    @checked
    def fast_dpm(
        cls,
        process: NoiseProcess,
        steps: int,
        *,
        kind: str = "var",
        spacing: str = "quadratic",
    ) -> Schedule:
        """FastDPM's times (Kong & Ping 2021; MATH.md 1.10), then 0; for the "fast-dpm" solver.

        Args:
            process: A ``DiscreteVP``; for ``var`` one whose betas rise on a line.
            steps: Number of transitions, 2 to its number of noisings.
            kind: ``var`` chooses noise levels and asks the network at the continuous times that
                have them; ``step`` picks whole noisings.
            spacing: How the levels, or the noisings, grow: ``linear`` or ``quadratic``, SFT-PG's
                choice. Quadratic grids start with less noise than the process ends with: ``var``
                with 10 of DDPM's 1000 steps at time 617.7, ``step`` at 0.8 of the chain.

        Raises:
            ValueError: The process is not such a one, or another argument is unknown or out of
                range.
        """
        if not isinstance(process, DiscreteVP):
            raise ValueError(f"fast_dpm shortens the chain of a DiscreteVP; got {process!r}")
        times = fast_times(process, _check_steps(steps), kind, spacing)
        times = torch.cat([times, times.new_zeros(1)])
        return cls(process, times, recipe=("fast_dpm", {"kind": kind, "spacing": spacing}))

    @classmethod
    def _between(
        cls, process: NoiseProcess, steps: int, recipe: Recipe, rho: float = 7.0
    ) -> Schedule:
        """Space the recipe's variable evenly between its values at the start and ``t_min``."""
        name, options = recipe
        start = options.get("start", process.t_max)
        levels = _check_steps(steps) + (0 if options["append_zero"] else 1)
        forth, back = variable(process, _SPACINGS[name], rho)
        ends = forth(torch.tensor([start, process.t_min], dtype=torch.float64))
        ramp = torch.linspace(0, 1, levels, dtype=torch.float64)
        times = back(torch.lerp(ends[0], ends[1], ramp))
        # The ends are known without rounding.
        times[-1] = process.t_min
        times[0] = start
        if options["append_zero"]:
            times = torch.cat([times, times.new_zeros(1)])
        return cls(process, times, recipe=recipe)

    @classmethod
    def _subset(
        cls, name: str, process: NoiseProcess, steps: int, append_zero: bool, **options: int
    ) -> Schedule:
        """Pick noisings of a discrete process."""
        if not isinstance(process, DiscreteVP):
            raise ValueError(f"{name} picks noisings of a DiscreteVP; got {process!r}")
        count = _check_steps(steps) + (0 if append_zero else 1)
        times = subset_times(name, len(process.betas), count, **options)
        if append_zero:
            times = torch.cat([times, times.new_zeros(1)])
        return cls(process, times, recipe=(name, {"append_zero": append_zero, **options}))

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description that ``Schedule.from_config`` reads back exactly."""
        config = {"process": self.process.to_config(), "times": self.times.tolist()}
        if self.recipe is not None:
            name, options = self.recipe
            config["recipe"] = [name, dict(options)]
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Rebuild the schedule that ``to_config`` described.

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
        """Read a file of ``save``.

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


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "uniform": Schedule.uniform,
    "quadratic": Schedule.quadratic,
    "karras": Schedule.karras,
    "log_snr": Schedule.log_snr,
    "leading": Schedule.leading,
    "ddim-uniform": Schedule.leading,
    "uniform_torch": Schedule.uniform_torch,
    "quad": Schedule.quad,
    "linspace": Schedule.linspace,
    "trailing": Schedule.trailing,
    "fast_dpm": Schedule.fast_dpm,
}


def make_schedule(name: str, process: NoiseProcess, steps: int, **options: Any) -> Schedule:
    """Build a schedule by name, or from a list of times such as ``"1000, 300, 50, 0"``.

    Args:
        name: A key of ``SCHEDULES``, or the times themselves, separated by commas.
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
    return SCHEDULES[name](process, steps, **options)


def schedule_options(name: str) -> list[str]:
    """Names of the options of a named schedule."""
    return list(signature(SCHEDULES[name]).parameters)[2:]


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


def _check_steps(steps: int) -> int:
    if index(steps) < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return steps


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None; a recipe names no others."""
    return {name: value for name, value in options.items() if value is not None}


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
