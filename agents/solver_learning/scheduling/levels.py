"""Noise levels as free parameters: any numbers give a valid schedule (MATH.md 3.4).

The noise level of a time is EDM's, `sigma / alpha`, for every process. Between a least and a
greatest level the others are a softmax's running sums on the scale of an increasing map f,

    f(level_t) = f(level_min) + (f(level_max) - f(level_min)) sum_{j < t} w_j,  w = softmax(v, 1)

(Huang 2024, Eq. 13, made consistent; there levels count upwards, here in sampling order).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ....common.names import unknown_name
from ....envs.processes import NoiseProcess
from ....envs.schedules import Schedule
from ....envs.schedules.ends import LEAST_LOG_SNR
from ....envs.schedules.spacings import Spacing, variable

Space = Literal["sigma", "log", "rho"]

# The map f of each space and its inverse; EDM's grid is even in level^(1/7).
_EXPONENT = 7.0
_SPACES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sigma": (lambda level: level, lambda value: value),
    "log": (torch.log, torch.exp),
    "rho": (lambda level: level ** (1 / _EXPONENT), lambda value: value**_EXPONENT),
}

# The grids to start from, and what each is even in.
EVEN: dict[str, Spacing] = {
    "karras": "karras",
    "log_snr": "log_snr",
    "uniform": "time",
    "quadratic": "sqrt_time",
}


@dataclass(frozen=True)
class LevelMap:
    """The map from free parameters to noise levels.

    Args:
        least: the smallest noise level, > 0; fixed.
        greatest: the largest; fixed.
        space: the scale f: "sigma" (the level itself, as in the paper), "log", or "rho"
            (level^(1/7), on which Karras's grid is even and the parameters are well scaled).

    Raises:
        ValueError: not 0 < least < greatest < inf, or an unknown space.
    """

    least: float
    greatest: float
    space: Space = "rho"

    def __post_init__(self) -> None:
        if self.space not in get_args(Space):
            raise unknown_name("space", self.space, get_args(Space))
        if not 0 < self.least < self.greatest < math.inf:
            raise ValueError(
                "The smallest noise level must lie between 0 and the largest; got "
                f"sigma_min = {self.least:g} and sigma_max = {self.greatest:g}."
            )

    def levels(self, parameters: Tensor) -> Tensor:
        """Map parameters (T - 2,) to T descending levels, float64, differentiable."""
        forth, back = _SPACES[self.space]
        least, greatest = parameters.new_tensor([self.least, self.greatest])
        shares = torch.softmax(torch.cat([parameters, parameters.new_ones(1)]), 0)
        low, high = forth(least), forth(greatest)
        inner = back(low + (high - low) * shares.cumsum(0)[:-1])
        return torch.cat([greatest[None], inner.flip(0), least[None]])

    def parameters(self, levels: Tensor) -> Tensor:
        """Invert `levels`: map T descending levels, T >= 3, to parameters (T - 2,).

        Raises:
            ValueError: fewer than three levels, other ends, or levels that do not descend.
        """
        check_levels(levels)
        ends = levels.new_tensor([self.greatest, self.least])
        if not torch.allclose(levels[[0, -1]], ends, rtol=1e-9, atol=0):
            raise ValueError(
                f"The levels run from {float(levels[0]):g} to {float(levels[-1]):g}, expected "
                f"{self.greatest:g} to {self.least:g}."
            )
        shares = _SPACES[self.space][0](levels).flip(0).diff()
        return 1 + shares[:-1].log() - shares[-1].log()


def check_levels(levels: Tensor) -> None:
    """Raise ValueError unless there are at least three finite, positive, descending levels."""
    if levels.ndim != 1 or len(levels) < 3:
        raise ValueError(
            "Schedule learning needs at least 3 noise levels, of which the first and the last stay "
            f"fixed; got {levels.numel()}. Take more steps."
        )
    if not bool((levels.isfinite() & (levels > 0)).all() and (levels.diff() < 0).all()):
        raise ValueError(f"Noise levels must be positive and strictly descend; got {levels}.")


def noise_levels(schedule: Schedule) -> Tensor:
    """Return the positive noise levels sigma / alpha of a schedule, descending; a final 0 apart."""
    return level_of_time(schedule.process, schedule.times[schedule.times > 0])


def level_of_time(process: NoiseProcess, t: Tensor) -> Tensor:
    """Return the noise levels sigma / alpha of times > 0."""
    return (-process.log_snr(t)).exp()


def time_of_level(process: NoiseProcess, level: Tensor) -> Tensor:
    """Return the times of noise levels; differentiable."""
    return process.time_of_log_snr(-level.log())


def with_signal(schedule: Schedule) -> Schedule:
    """Return the schedule, from the log-SNR -5.1 on if no signal is left at its first time.

    Raises:
        ValueError: the second time is noisier than that.
    """
    process, times = schedule.process, schedule.times
    if process.levels(float(times[0]))[0] > 0:
        return schedule
    times[0] = process.time_of_log_snr(LEAST_LOG_SNR)
    if times[0] <= times[1]:
        raise ValueError(
            f"Noise levels have no end at the first time of {schedule!r}, where no signal is left, "
            f"and its second time is beyond the log-SNR {LEAST_LOG_SNR}: start it later."
        )
    return Schedule(process, times)


def schedule_at(levels: Tensor, like: Schedule) -> Schedule:
    """Return a schedule at other inner levels (T,); its ends are those of `like`, exactly."""
    return Schedule(like.process, times_at(levels, like))


def times_at(levels: Tensor, like: Schedule) -> Tensor:
    """Return the times (..., K + 1) of schedules at other inner levels (..., T)."""
    inner = time_of_level(like.process, levels.detach().cpu().double()[..., 1:-1])
    positive = like.times[like.times > 0]
    ending = like.times[len(positive) :]
    parts = (positive[:1], positive[-1:], ending)
    first, last, after = (part.expand(*inner.shape[:-1], -1) for part in parts)
    return torch.cat([first, inner, last, after], -1)


def even_schedule(like: Schedule, name: str) -> Schedule:
    """Return a named grid of as many steps between the ends of another schedule.

    Raises:
        ValueError: a name that `EVEN` does not have.
    """
    if name not in EVEN:
        raise unknown_name("start", name, EVEN)
    forth, back = variable(like.process, EVEN[name])
    positive = like.times[like.times > 0]
    ramp = torch.linspace(0, 1, len(positive), dtype=torch.float64)
    first, last = forth(positive[[0, -1]])
    inner = back(torch.lerp(first, last, ramp))[1:-1]
    times = torch.cat([positive[:1], inner, positive[-1:], like.times[len(positive) :]])
    return Schedule(like.process, times, recipe=(name, {}))


def step_weights(levels: Tensor) -> Tensor:
    """Return how much each network output weighs in Euler's finished sample, (T - 1,).

    Divided by the noise level, Euler's steps telescope (Huang 2024, Eq. 8; MATH.md 3.2):

        x_{T-1} = (l_{T-1} / l_0) x_0 + sum_{j < T-1} lambda_j D_j,
        lambda_j = l_{T-1} / l_{j+1} - l_{T-1} / l_j

    Args:
        levels: (T,) descending; the weights add up to 1 - l_{T-1} / l_0.
    """
    return levels[-1] * (1 / levels).diff()
