"""FastDPM's few noise levels, and the continuous times at which a long chain has them.

Kong & Ping 2021; MATH.md 1.10. A chain of `S` big noisings `eta_1 .. eta_S` is laid out so that
it ends where the chain of `N` small ones does. Each of its states then gets the time at which the
long chain has as much noise; for betas on a line the products `abar` are defined between whole
times by the log-gamma function. Everything is float64: in float32 the times are wrong by up to 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ...common.names import unknown_name
from ..processes import NoiseProcess
from .spacings import quad

Kind = Literal["var", "step"]
Growth = Literal["linear", "quadratic"]

# The largest noising that a search may end with (Kong & Ping's code).
_MOST_NOISE = 0.99

# Betas that were float32 once are on a line up to their last digits.
_ROUNDING = 1e-6

# From here on Stirling's series is exact; below, log-gamma is small enough not to cancel.
_LARGE = 100.0


def fast_times(process: NoiseProcess, steps: int, kind: str, spacing: str) -> Tensor:
    """Return the `steps` times of FastDPM's states, descending, without the 0 at the end.

    Args:
        process: The long chain, of `N` noisings.
        steps: `S`, 2 to `N`.
        kind: `var` or `step`, see `Schedule.fast_dpm`.
        spacing: `linear` or `quadratic`.

    Raises:
        ValueError: No chain of noisings, an unknown kind or spacing, a number of steps out of
            range, or `var` on betas that do not rise on a line.
    """
    if kind not in get_args(Kind):
        raise unknown_name("kind of fast_dpm", kind, get_args(Kind))
    if spacing not in get_args(Growth):
        raise unknown_name("spacing of fast_dpm", spacing, get_args(Growth))
    noisings = len(_betas(process))
    if not 2 <= steps <= noisings:
        raise ValueError(f"fast_dpm takes 2 to {noisings} steps on this process; got {steps}")
    if kind == "var":
        return _times_of(process, np.log1p(-noise_levels(process, steps, spacing)).cumsum())
    if spacing == "linear":
        indices = np.arange(steps) * (noisings - 1) // (steps - 1)
    else:
        indices = quad(noisings, steps)
    if (np.diff(indices) <= 0).any():
        raise ValueError(f"fast_dpm picks a noising twice for {steps} of {noisings}; take fewer")
    return torch.from_numpy(indices[::-1] + 1.0)


def noise_levels(process: NoiseProcess, steps: int, spacing: str) -> np.ndarray:
    """Return `eta_1 .. eta_S`, the noisings of the short chain, `(S,)` float64 in (0, 1).

    The largest is searched for so that the product of `1 - eta` is that of the long chain. A
    quadratic growth is bounded: with 20 steps or fewer of DDPM's 1000 the short chain ends with
    less noise than the long one.

    Raises:
        ValueError: The betas do not rise on a line.
    """
    first, _ = _line(process)
    target = float(torch.log1p(-_betas(process)).sum())
    ramp = np.arange(steps)
    if spacing == "linear":

        def levels(x: float) -> np.ndarray:
            return np.linspace(first, x, steps)

        low, high = first, _MOST_NOISE
    else:

        def levels(x: float) -> np.ndarray:
            return first * (1 + ramp * x) ** 2

        bound = (math.sqrt(_MOST_NOISE / first) - 1) / (steps - 1)
        low, high = 0.0, min(0.95 / (math.sqrt(first) * steps), bound)
    if np.log1p(-levels(high)).sum() >= target:
        return levels(high)
    root = _root(lambda x: np.log1p(-levels(float(x))).sum() - target, low, high)
    return levels(float(root))


def fast_levels(process: NoiseProcess, times: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return `alpha` and `sigma` at times `(K,)` in `[0, t_max]`, as FastDPM reads them.

    On a `DiscreteVP` whose betas rise on a line they are interpolated by the log-gamma function
    between whole times from 1 on, below which that has no meaning; elsewhere they are the
    process's own.
    """
    alpha, sigma = process.alpha(times).numpy(), process.sigma(times).numpy()
    if process.betas is not None and is_linear(process):
        between = ((times > 1) & (times != times.round())).numpy()
        log_abar = _log_product(process, times.numpy()[between] - 1)
        alpha[between] = np.exp(log_abar / 2)
        sigma[between] = np.sqrt(-np.expm1(log_abar))
    return alpha, sigma


def is_linear(process: NoiseProcess) -> bool:
    """Whether the betas rise on a line."""
    betas = _betas(process).numpy()
    line = np.linspace(betas[0], betas[-1], len(betas))
    return bool(betas[-1] > betas[0] and abs(betas - line).max() <= _ROUNDING * betas[-1])


def _times_of(process: NoiseProcess, log_products: np.ndarray) -> Tensor:
    """Return the descending times at which the long chain has these log abar, `(S,)`."""
    last = len(_betas(process)) - 1.0

    def excess(time: np.ndarray) -> np.ndarray:
        return _log_product(process, time) - log_products

    time = _root(excess, np.zeros_like(log_products), np.full_like(log_products, last))
    # Rounding must not make a network's whole time a fractional one: tau_1 is 0 by construction.
    near = time.round()
    time = np.where(abs(time - near) < 1e-6, near, time)
    return torch.from_numpy(time[::-1] + 1.0)


def _log_product(process: NoiseProcess, time: np.ndarray) -> np.ndarray:
    """Return log R(t) at 0-based times, the log-gamma interpolation of log abar.

    R(t) = Delta^(t+1) Gamma(c + 1) / Gamma(c - t) with Delta the rise from beta to beta and
    c = (1 - beta_0) / Delta. Written out by Stirling's series, the large terms cancel on paper.
    """
    first, rise = _line(process)
    top = (1 - first) / rise + 1
    count = np.asarray(time, dtype=np.float64) + 1
    rest = top - count
    if top - len(_betas(process)) < _LARGE:
        gamma = torch.lgamma(torch.tensor(top, dtype=torch.float64)).numpy()
        return count * math.log(rise) + gamma - torch.lgamma(torch.as_tensor(rest)).numpy()
    large_terms = count * math.log1p(rise - first) - (rest - 0.5) * np.log1p(-count / top) - count
    return large_terms + _stirling(top) - _stirling(rest)


def _stirling(y: float | np.ndarray) -> float | np.ndarray:
    """Return the end of Stirling's series of log-gamma, beyond (y - 1/2) log y - y."""
    return 1 / (12 * y) - 1 / (360 * y**3)


def _betas(process: NoiseProcess) -> Tensor:
    if process.betas is None:
        raise ValueError(f"fast_dpm shortens the chain of a DiscreteVP; got {process!r}")
    return process.betas


def _line(process: NoiseProcess) -> tuple[float, float]:
    """Return the first beta and the rise from one to the next."""
    if not is_linear(process):
        raise ValueError(
            f"fast_dpm with kind='var' needs betas that rise on a line (linear-1000, say), not "
            f"{process!r}; kind='step' takes any, and so does a uniform schedule"
        )
    betas = _betas(process)
    return float(betas[0]), float(betas[-1] - betas[0]) / (len(betas) - 1)


def _root(f: Callable[[np.ndarray], np.ndarray], low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Bisect decreasing functions down to the last digit; where there is no root, a bound."""
    below, above = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    for _ in range(80):
        middle = (below + above) / 2
        positive = f(middle) > 0
        below, above = np.where(positive, middle, below), np.where(positive, above, middle)
    return (below + above) / 2
