"""The exponential integrator behind the DPM-Solver family (MATH.md 1.1, 1.4, 1.6).

In log-SNR the probability-flow ODE is linear plus the network's output. With the output expanded
at s as m + G_1 tau + G_2 tau^2 / 2 ..., the step from s to t, h = log_snr_t - log_snr_s, is

    x_t = a x_s + c_1 m + c_2 G_1 + c_3 G_2,          c_k = -g E_k(+-h)

where noise prediction has a = alpha_t / alpha_s, g = sigma_t and +h, and data prediction
a = sigma_t / sigma_s, g = alpha_t and -h (so that E_k(-h) is, up to its sign, P_k of MATH.md 1.6).
The G's are scaled by h: G_1 is a difference of outputs divided by its distance in units of h.

With eta > 0 this is the reverse SDE of that much noise, in data prediction (MATH.md 1.14):
a = (sigma_t / sigma_s) e^(-eta h), c_k = -alpha_t E_k(-(1 + eta) h), and fresh noise of standard
deviation sigma_t sqrt(1 - e^(-2 eta h)).

Where no signal is left at s, h is infinite: the step has a limit, of first order (MATH.md 1.16).
"""

from __future__ import annotations

import math

from ..samplers.tableau import Output
from .many import Many
from .rows import Node

# Below this the closed forms from E_2 on lose digits and the series has them all.
_SMALL = 1.0


def exponential(k: int, a: float) -> float:
    """Return E_k(a): E_1 = e^a - 1, E_k = E_{k-1} / a - 1 / (k - 1)! (MATH.md 1.4)."""
    if isinstance(a, Many):
        return a.each(lambda one: exponential(k, one))
    if k == 1:
        return math.expm1(a)
    if abs(a) < _SMALL:
        # E_k(a) = sum_{n >= 1} a^n / (n + k - 1)!; the twentieth term is below rounding.
        return math.fsum(a**n / math.factorial(n + k - 1) for n in range(1, 21))
    return exponential(k - 1, a) / a - 1 / math.factorial(k - 1)


def scale(s: Node, t: Node, output: Output, eta: float = 0.0) -> float:
    """Return a, the factor on the state; 0 where noise prediction has none, see `coefficient`."""
    if output == "epsilon":
        return t.alpha / s.alpha if s.alpha else 0.0
    return t.sigma / s.sigma * (t.rho / s.rho) ** eta


def noise(s: Node, t: Node, eta: float) -> float:
    """Return the standard deviation of the fresh noise, in data prediction."""
    if eta == 0 or t.sigma == 0:
        return 0.0
    return t.sigma * math.sqrt(-math.expm1(-2 * eta * (t.log_snr - s.log_snr)))


def coefficient(k: int, s: Node, t: Node, output: Output, eta: float = 0.0) -> float:
    """Return c_k; c_1 also where h is infinite, for t at time 0 or s without any signal.

    From there noise prediction has no step: 0 stands for the row that `Rows.tableau` puts instead.
    """
    assert eta == 0 or output == "sample", "only data prediction has noise"
    if s.alpha == 0 and output == "epsilon":
        return 0.0
    h = (1 + eta) * (t.log_snr - s.log_snr)
    if abs(h) == math.inf:
        assert k == 1, "an infinite step is of first order"
        return -s.sigma * t.alpha / s.alpha if output == "epsilon" else t.alpha
    return -t.sigma * exponential(k, h) if output == "epsilon" else -t.alpha * exponential(k, -h)
