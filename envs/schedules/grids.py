"""The usual grids of times, by name (MATH.md 0.5): a new one is a function here, and one line.

A grid is a function `(process, steps, **options)` that returns `steps + 1` decreasing times.
`uniform` spaces its times evenly down to 0; `quadratic`, `karras`, `log_snr` and `dmn` go down to
`process.t_min`, for the log-SNR is infinite at 0; the subsets (`leading`, `quad`, ...) pick whole
noisings of a `DiscreteVP`. With `append_zero` they reach 0 by one last step.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index

import torch
from torch import Tensor

from ...common.arguments import checked
from ..processes import NoiseProcess
from .dmn import optimal_log_snrs
from .fast_dpm import fast_times
from .spacings import Spacing, finite_start, subset_times, variable

Grid = Callable[..., Tensor]


@checked
def uniform(
    process: NoiseProcess,
    steps: int,
    *,
    end: float = 0.0,
    start: float | None = None,
    append_zero: bool = False,
) -> Tensor:
    """Times on a line from `start` to `end` (0 or `process.t_min`, say).

    On a `DiscreteVP` of `steps` betas this visits each integer exactly.

    Args:
        process: Any process.
        steps: Number of transitions, at least 1.
        end: Where the line ends, in `[0, start)`.
        start: Where it starts; `t_max` if None.
        append_zero: Spend the last step on going from `end`, above 0, to 0.
    """
    inner = _check_steps(steps) - bool(append_zero)
    first = process.t_max if start is None else start
    # Multiply before dividing: an integer grid then has no rounding at all.
    ramp = torch.arange(inner, -1, -1, dtype=torch.float64)
    alone = torch.tensor([first], dtype=torch.float64)
    times = end + (first - end) * ramp / inner if inner else alone
    # By rounding it could lie beyond the process, or beside a time without signal.
    times[0] = first
    return _with_zero(times) if append_zero else times


@checked
def quadratic(
    process: NoiseProcess,
    steps: int,
    *,
    append_zero: bool = True,
    start: float | None = None,
) -> Tensor:
    """Square roots of the times on a line from `start` (`t_max`) to `t_min`, then 0."""
    return _even(process, steps, "sqrt_time", append_zero, start)


@checked
def karras(
    process: NoiseProcess,
    steps: int,
    *,
    rho: float = 7.0,
    append_zero: bool = True,
    start: float | None = None,
) -> Tensor:
    """EDM's grid: `(sigma / alpha)^(1/rho)` on a line (Karras et al. 2022, Eq. 5), then 0.

    Args:
        process: Any process; on a `VE` from 0.002 to 80 this is EDM's default.
        steps: Number of transitions, at least 1.
        rho: How strongly the times crowd near the data, > 0.
        append_zero: End with a step from `t_min` to 0, as EDM does.
        start: The first time; `t_max` if None.
    """
    return _even(process, steps, "karras", append_zero, start, rho)


@checked
def log_snr(
    process: NoiseProcess,
    steps: int,
    *,
    append_zero: bool = False,
    start: float | None = None,
) -> Tensor:
    """Log-SNRs on a line from `start` (`t_max`) to `t_min`; the grid of DPM-Solver."""
    return _even(process, steps, "log_snr", append_zero, start)


@checked
def dmn(
    process: NoiseProcess,
    steps: int,
    *,
    initial: str = "log_snr",
    append_zero: bool = True,
    start: float | None = None,
) -> Tensor:
    """Times at which a multistep solver magnifies the network's errors least, then 0 (see `dmn`).

    Xue et al. (2024): they follow from the log-SNRs of both ends alone.

    Args:
        process: Any process.
        steps: Number of transitions, at least 1.
        initial: What the search for a local minimum starts from, even in `log_snr` (which the
            paper takes for pixels), `time` (for latents), `sqrt_time` or `karras`.
        append_zero: End with a step from `t_min` to 0.
        start: The first time; `t_max` if None.
    """
    times = _even(process, steps, initial, append_zero, start)
    inner = times[:-1] if append_zero else times
    ends = inner[[0, -1]].clone()
    values = process.log_snr(inner)
    values[0] = finite_start(process, values, process.log_snr)
    inner[1:-1] = process.time_of_log_snr(optimal_log_snrs(values)[1:-1])
    inner[[0, -1]] = ends
    return times


@checked
def leading(
    process: NoiseProcess,
    steps: int,
    *,
    append_zero: bool = True,
    steps_offset: int = 0,
) -> Tensor:
    """Every `k`-th noising from the first on, `k = N // steps`; DDIM's "uniform".

    Args:
        process: A `DiscreteVP` of `N` noisings.
        steps: Number of transitions, at least 1.
        append_zero: Pick `steps` noisings and end with a step to 0; else pick one more.
        steps_offset: Added to each index, at least 0; some image models use 1.

    Raises:
        ValueError: The process is not discrete, has too few noisings, or `steps_offset` leads
            beyond the last.
    """
    return _subset("leading", process, steps, append_zero, steps_offset=steps_offset)


@checked
def uniform_torch(process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Tensor:
    """Floors of a line from 0 to `N`, end excluded, as in D-ODE; see `leading`."""
    return _subset("uniform_torch", process, steps, append_zero)


@checked
def quad(process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Tensor:
    """Floored squares of a line from 0 to `sqrt(0.8 N)`, DDIM's "quad"; see `leading`."""
    return _subset("quad", process, steps, append_zero)


@checked
def linspace(process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Tensor:
    """A rounded line from the last noising to the first, both included; see `leading`."""
    return _subset("linspace", process, steps, append_zero)


@checked
def trailing(process: NoiseProcess, steps: int, *, append_zero: bool = True) -> Tensor:
    """Every `N / steps`-th noising from the last on, rounded; see `leading`."""
    return _subset("trailing", process, steps, append_zero)


@checked
def fast_dpm(
    process: NoiseProcess,
    steps: int,
    *,
    kind: str = "var",
    spacing: str = "quadratic",
) -> Tensor:
    """FastDPM's times (Kong & Ping 2021; MATH.md 1.10), then 0; for the "fast-dpm" solver.

    Args:
        process: A `DiscreteVP`; for `var` one whose betas rise on a line.
        steps: Number of transitions, 2 to its number of noisings.
        kind: `var` chooses noise levels and asks the network at the continuous times that have
            them; `step` picks whole noisings.
        spacing: How the levels, or the noisings, grow: `linear` or `quadratic`, SFT-PG's choice.
            Quadratic grids start with less noise than the process ends with: `var` with 10 of
            DDPM's 1000 steps at time 617.7, `step` at 0.8 of the chain.

    Raises:
        ValueError: The process is not such a one, or another argument is unknown or out of range.
    """
    return _with_zero(fast_times(process, _check_steps(steps), kind, spacing))


SCHEDULES: dict[str, Grid] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "karras": karras,
    "log_snr": log_snr,
    "dmn": dmn,
    "leading": leading,
    "ddim-uniform": leading,
    "uniform_torch": uniform_torch,
    "quad": quad,
    "linspace": linspace,
    "trailing": trailing,
    "fast_dpm": fast_dpm,
}

# The variable that the times of a grid are even in, where it is not the time itself.
SPACINGS: dict[str, Spacing] = {
    "quadratic": "sqrt_time",
    "karras": "karras",
    "log_snr": "log_snr",
    "dmn": "log_snr",
}


def _even(
    process: NoiseProcess,
    steps: int,
    spacing: str,
    append_zero: bool,
    start: float | None,
    rho: float = 7.0,
) -> Tensor:
    """Space a variable evenly between its values at the start and at `t_min`."""
    first = process.t_max if start is None else start
    levels = _check_steps(steps) + (0 if append_zero else 1)
    forth, back = variable(process, spacing, rho)
    ends = forth(torch.tensor([first, process.t_min], dtype=torch.float64))
    ends[0] = finite_start(process, ends, forth)
    ramp = torch.linspace(0, 1, levels, dtype=torch.float64)
    times = back(torch.lerp(ends[0], ends[1], ramp))
    # The ends are known without rounding.
    times[-1] = process.t_min
    times[0] = first
    return _with_zero(times) if append_zero else times


def _subset(
    name: str, process: NoiseProcess, steps: int, append_zero: bool, **options: int
) -> Tensor:
    """Pick noisings of a chain."""
    if process.betas is None:
        raise ValueError(f"{name} picks noisings of a DiscreteVP; got {process!r}")
    count = _check_steps(steps) + (0 if append_zero else 1)
    times = subset_times(name, len(process.betas), count, **options)
    return _with_zero(times) if append_zero else times


def _with_zero(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])


def _check_steps(steps: int) -> int:
    if index(steps) < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return steps
