"""How the times of a schedule are spaced: the variables of the grids, and subsets of noisings.

A continuous grid is even in one variable (MATH.md 0.5): the time, its square root, the log-SNR, or
`rho^(1/p)` with `rho = sigma / alpha` (Karras et al. 2022). `variable` maps times to it and
back; `Schedule` builds grids with it and `refine_times` makes them finer. A discrete grid picks
whole noisings of a `DiscreteVP`; `SUBSETS` holds the usual picks, by 0-based index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import checked
from ...common.names import unknown_name
from ..processes import NoiseProcess
from .ends import LEAST_LOG_SNR

Spacing = Literal["time", "sqrt_time", "log_snr", "karras"]
Map = Callable[[Tensor], Tensor]


def variable(process: NoiseProcess, spacing: str, rho: float = 7.0) -> tuple[Map, Map]:
    """Look up the variable in which a grid is even.

    Args:
        process: The noise process that gives the times their meaning.
        spacing: `time`, `sqrt_time`, `log_snr` or `karras`.
        rho: Exponent `p` of `karras`, > 0; the others ignore it.

    Returns:
        The map from float64 times to the variable, and its inverse.

    Raises:
        ValueError: `spacing` is unknown, or `rho` is not positive and finite.
    """
    if spacing not in get_args(Spacing):
        raise unknown_name("spacing", spacing, get_args(Spacing))
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite; got {rho}")
    if spacing == "time":
        return (lambda times: times), (lambda values: values)
    if spacing == "sqrt_time":
        return torch.sqrt, torch.square
    if spacing == "log_snr":
        return process.log_snr, process.time_of_log_snr
    return (
        lambda times: (-process.log_snr(times) / rho).exp(),
        lambda values: process.time_of_log_snr(-rho * values.log()),
    )


@checked
def refine_times(
    process: NoiseProcess,
    times: Tensor | Sequence[float],
    factor: int,
    spacing: str,
    integer: bool = False,
    *,
    rho: float = 7.0,
) -> Tensor:
    """Split each interval between neighbouring times into `factor` sub-steps.

    The sub-steps are even in the variable of `spacing`. An interval that ends at time 0 is split
    only if that is the time: the log-SNR is infinite there.

    Args:
        process: The noise process that gives the times their meaning.
        times: `(K + 1,)` strictly decreasing times in `[0, process.t_max]`, with `K >= 1`.
        factor: Sub-steps an interval, at least 1.
        spacing: See `variable`.
        integer: Round the new times to whole numbers, for networks that know no others; those that
            coincide with another time are dropped.
        rho: Exponent of `karras`.

    Returns:
        Strictly decreasing float64 times on the CPU, the given ones among them without rounding;
        `factor * K + 1` of them unless some were dropped or not split.

    Raises:
        ValueError: `factor` is below 1, or an argument is unknown or out of range.
    """
    if index(factor) < 1:
        raise ValueError(f"factor must be at least 1; got {factor}")
    forth, back = variable(process, spacing, rho)
    given = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
    # A last interval down to 0 stays whole unless the variable is finite and even there.
    split = given if spacing == "time" or given[-1] > 0 else given[:-1]
    values = forth(split)
    values[0] = finite_start(process, values, forth)
    ramp = torch.arange(1, factor, dtype=torch.float64)
    # Multiply before dividing: whole times then stay whole without rounding.
    new = back((values[:-1, None] * (factor - ramp) + values[1:, None] * ramp) / factor)
    new = new.round() if integer else new
    # Rounding may move a time onto, or past, the ends of its interval.
    new = new[(new < split[:-1, None]) & (new > split[1:, None])]
    return torch.cat([given, new]).unique().flip(0)


def finite_start(process: NoiseProcess, values: Tensor, forth: Map) -> Tensor:
    """The first of a line's values, or one to draw the line from where that is infinite.

    At a time without any signal the log-SNR has no end: the line starts at the log-SNR -5.1, or one
    below the line's second value where that is lower.

    Args:
        process: The noise process.
        values: The variable at the line's times, at least two.
        forth: The map from times to the variable.
    """
    if bool(values[0].isfinite()) or len(values) < 2:
        return values[0]
    start = process.time_of_log_snr(LEAST_LOG_SNR)
    beyond = forth(start)
    # The variable rises or falls with the time: compare in the direction of the line.
    if (beyond - values[1]) * values[0].sign() > 0:
        return beyond
    raise ValueError(
        f"no grid in the log-SNR can be drawn above the log-SNR {LEAST_LOG_SNR} from the last time "
        f"of {process!r}, where no signal is left: space these times in the time itself"
    )


def leading(noisings: int, count: int, steps_offset: int = 0) -> np.ndarray:
    """`0, k, 2k, ...` with `k = noisings // count`, plus an offset; DDIM's "uniform".

    Raises:
        ValueError: The offset is negative or leads beyond the last noising.
    """
    indices = np.arange(count) * (noisings // count) + index(steps_offset)
    if steps_offset < 0 or indices[-1] >= noisings:
        raise ValueError(
            f"steps_offset={steps_offset} moves the indices to {indices[0]} .. {indices[-1]}; "
            f"they must stay within 0 .. {noisings - 1}"
        )
    return indices


def uniform_torch(noisings: int, count: int) -> np.ndarray:
    """Floors of `count` numbers on a line from 0 to `noisings`, the end excluded (D-ODE)."""
    return np.arange(count) * noisings // count


def quad(noisings: int, count: int) -> np.ndarray:
    """Floored squares of numbers on a line from 0 to `sqrt(0.8 noisings)` (DDIM)."""
    return np.floor(np.linspace(0, math.sqrt(0.8 * noisings), count) ** 2).astype(np.int64)


def linspace(noisings: int, count: int) -> np.ndarray:
    """Numbers on a line from 0 to `noisings - 1`, rounded half to even."""
    return np.round(np.linspace(0, noisings - 1, count)).astype(np.int64)


def trailing(noisings: int, count: int) -> np.ndarray:
    """`round(noisings - i noisings / count) - 1`, half to even; the last noising is among them.

    The formula is exact; diffusers adds up a rounded stride and so differs from it at some halves,
    and for some counts returns one index too many.
    """
    return np.round(noisings - np.arange(count) * noisings / count).astype(np.int64)[::-1] - 1


# (noisings N, count S, **options) -> S indices in 0 .. N - 1, ascending (MATH.md 0.5).
SUBSETS: dict[str, Callable[..., np.ndarray]] = {
    "leading": leading,
    "uniform_torch": uniform_torch,
    "quad": quad,
    "linspace": linspace,
    "trailing": trailing,
}


def subset_times(name: str, noisings: int, count: int, **options: int) -> Tensor:
    """Pick `count` noisings of a chain: float64 times `index + 1`, descending.

    Args:
        name: A key of `SUBSETS`.
        noisings: Length `N` of the chain.
        count: How many to pick, at least 1.
        options: Of the subset: `steps_offset` of `leading`.

    Raises:
        ValueError: There are too few noisings, or the subset would pick one of them twice.
    """
    if count > noisings:
        raise ValueError(f"{name} cannot pick {count} times of {noisings} noisings; take fewer")
    indices = SUBSETS[name](noisings, count, **options)
    if (np.diff(indices) <= 0).any():
        raise ValueError(
            f"{name} picks a noising twice for {count} times of {noisings} noisings; take fewer"
        )
    return torch.from_numpy(indices[::-1] + 1.0)
