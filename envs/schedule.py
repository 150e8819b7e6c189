"""The clock of the environment: which times a sampler visits.

A ``Schedule`` of ``K`` steps is a noise process and ``K + 1`` strictly decreasing times, from the
noisiest to (nearly) clean: state ``j`` has time ``times[j]``, step ``j`` leads to ``times[j + 1]``.
The constructors are the usual grids (MATH.md 0.5). All but ``uniform`` space their times down to
``process.t_min``, for the log-SNR is infinite at 0, and with ``append_zero`` reach 0 by one last
step. A plain list of times is a schedule too: ``Schedule(process, [10, 4, 1, 0])``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .names import unknown_name
from .process import NoiseProcess


class Schedule:
    """A noise process and the decreasing times at which a sampler meets it.

    Args:
        process: The noise process that gives the times their meaning.
        times: ``(K + 1,)`` strictly decreasing times in ``[0, process.t_max]``, with ``K >= 1``.

    Attributes:
        process: The same.
        times: The same, as a float64 tensor on the CPU. Treat it as read-only.

    Raises:
        ValueError: The times are too few, not finite, not strictly decreasing or out of range.
    """

    def __init__(self, process: NoiseProcess, times: Tensor | Sequence[float]) -> None:
        self.process = process
        self.times = torch.as_tensor(times, dtype=torch.float64).detach().cpu().clone()
        if self.times.ndim != 1 or len(self.times) < 2:
            raise ValueError(
                f"a schedule needs a vector of at least two times; got {tuple(self.times.shape)}"
            )
        if not bool(self.times.isfinite().all()):
            raise ValueError("the times of a schedule must be finite")
        rises = (self.times.diff() >= 0).nonzero()
        if len(rises):
            j = int(rises[0])
            raise ValueError(
                "the times of a schedule must strictly decrease; "
                f"times[{j}:{j + 2}] = {self.times[j : j + 2].tolist()}"
            )
        if self.times[-1] < 0 or self.times[0] > process.t_max:
            raise ValueError(
                f"the times of a schedule must lie in [0, {process.t_max:g}]; "
                f"got {float(self.times[-1]):g} to {float(self.times[0]):g}"
            )

    @property
    def steps(self) -> int:
        """``K``, the number of transitions."""
        return len(self.times) - 1

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """``alpha`` and ``sigma`` at the times, ``(K + 1,)`` float64 each, for the solvers."""
        return self.process.alpha(self.times).numpy(), self.process.sigma(self.times).numpy()

    def step_of(self, timestep: float) -> int:
        """The step whose state has this time, up to float32 rounding.

        Raises:
            ValueError: No step starts at that time.
        """
        distance = (self.times[:-1] - timestep).abs()
        step = int(distance.argmin())
        if float(distance[step]) > 1e-5 * max(1.0, self.process.t_max):
            raise ValueError(f"no step of {self!r} starts at time {timestep:g}")
        return step

    @classmethod
    def uniform(cls, process: NoiseProcess, steps: int, *, end: float = 0.0) -> Schedule:
        """Times on a line from ``t_max`` to ``end`` (0 or ``process.t_min``, say).

        On a ``DiscreteVP`` of ``steps`` betas this visits each integer exactly.
        """
        # Multiply before dividing: an integer grid then has no rounding at all.
        ramp = torch.arange(_check_steps(steps), -1, -1, dtype=torch.float64)
        return cls(process, end + (process.t_max - end) * ramp / steps)

    @classmethod
    def quadratic(cls, process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Schedule:
        """Square roots of the times on a line from ``t_max`` to ``t_min``, then 0."""
        ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64).sqrt()
        return cls._between(process, steps, append_zero, ends, torch.square)

    @classmethod
    def karras(
        cls, process: NoiseProcess, steps: int, *, rho: float = 7.0, append_zero: bool = True
    ) -> Schedule:
        """EDM's grid: ``(sigma / alpha)^(1/rho)`` on a line (Karras et al. 2022, Eq. 5), then 0.

        Args:
            process: Any process; on a ``VE`` from 0.002 to 80 this is EDM's default.
            steps: Number of transitions, at least 1.
            rho: How strongly the times crowd near the data, > 0.
            append_zero: End with a step from ``t_min`` to 0, as EDM does.
        """
        if not rho > 0:
            raise ValueError(f"rho must be positive; got {rho}")
        ends = (-_end_log_snrs(process) / rho).exp()
        return cls._between(
            process, steps, append_zero, ends, lambda r: process.time_of_log_snr(-rho * r.log())
        )

    @classmethod
    def log_snr(cls, process: NoiseProcess, steps: int, *, append_zero: bool = False) -> Schedule:
        """Log-SNRs on a line from ``t_max`` to ``t_min``; the grid of DPM-Solver."""
        return cls._between(
            process, steps, append_zero, _end_log_snrs(process), process.time_of_log_snr
        )

    @classmethod
    def _between(
        cls,
        process: NoiseProcess,
        steps: int,
        append_zero: bool,
        ends: Tensor,
        time_of: Callable[[Tensor], Tensor],
    ) -> Schedule:
        """Space a coordinate evenly between its values at ``t_max`` and ``t_min``."""
        levels = _check_steps(steps) + (0 if append_zero else 1)
        ramp = torch.linspace(0, 1, levels, dtype=torch.float64)
        times = time_of(torch.lerp(ends[0], ends[1], ramp))
        # The ends are known without rounding.
        times[-1] = process.t_min
        times[0] = process.t_max
        return cls(process, torch.cat([times, times.new_zeros(1)]) if append_zero else times)

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description that ``Schedule.from_config`` reads back exactly."""
        return {"process": self.process.to_config(), "times": self.times.tolist()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Rebuild the schedule that ``to_config`` described."""
        return cls(NoiseProcess.from_config(config["process"]), config["times"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return torch.equal(self.times, other.times) and self.process == other.process

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        first, last = float(self.times[0]), float(self.times[-1])
        return f"Schedule({self.process!r}, steps={self.steps}, {first:g} to {last:g})"


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "uniform": Schedule.uniform,
    "quadratic": Schedule.quadratic,
    "karras": Schedule.karras,
    "log_snr": Schedule.log_snr,
}


def make_schedule(name: str, process: NoiseProcess, steps: int, **options: Any) -> Schedule:
    """Build a schedule by name: ``uniform``, ``quadratic``, ``karras`` or ``log_snr``.

    Raises:
        ValueError: The name is unknown or the constructor refuses its arguments.
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return SCHEDULES[name](process, steps, **options)


def _check_steps(steps: int) -> int:
    if index(steps) < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return steps


def _end_log_snrs(process: NoiseProcess) -> Tensor:
    return process.log_snr(torch.tensor([process.t_max, process.t_min], dtype=torch.float64))
