"""DMN's grid: log-SNRs at which a multistep solver magnifies a network's errors least.

Xue et al. (2024), "Accelerating Diffusion Sampling with Optimized Time Steps". With
`l_0 < ... < l_N` the log-SNRs, the multistep solver of order 3 on predicted clean samples ends at
(MATH.md 3.10)

    x_N / sigma_N = x_0 / sigma_0 + sum_s sum_k J_sk D_k,   J_sk = int_{l_s}^{l_{s+1}} e^l L_k dl,

with `L_k` the Lagrange polynomials through the outputs that step `s` reads. If the network errs by
`err_k = sigma_k^2 / alpha_k` (of a variance-preserving process), the end errs by as much as these
weights say. No network is asked: the noise schedule alone decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The first so many steps, and the last one, count by themselves: their errors do not cancel with
# those of other steps (as in the official code).
_ALONE = 3

# Where two log-SNRs come this near to each other a Lagrange polynomial has no digits left.
_LEAST_GAP = 1e-9

# L-BFGS descends the bound with its kinks rounded off over these shares of it, one after the other.
_ROUNDED, _ITERATIONS = (0.1, 0.01, 1e-3, 0.0), 100


def optimal_log_snrs(start: Tensor) -> Tensor:
    """Move the inner log-SNRs to a local minimum of `error_bound`.

    Args:
        start: `(N + 1,)` ascending finite log-SNRs, float64; the first and the last stay.

    Returns:
        `(N + 1,)` ascending, float64; never worse than `start` by that bound.
    """
    if len(start) < 3:
        return start.clone()
    first, whole = start[0], start[-1] - start[0]
    shares = start.diff() / whole
    free = torch.nn.Parameter(shares.log())

    def place(values: Tensor) -> Tensor:
        inner = first + whole * torch.softmax(values, 0).cumsum(0)[:-1]
        return torch.cat([start[:1], inner, start[-1:]])

    unit = float(error_bound(start))
    best, least = start.clone(), 1.0
    for rounded in _ROUNDED:
        lbfgs = torch.optim.LBFGS(
            [free],
            max_iter=_ITERATIONS,
            tolerance_grad=1e-10,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure(lbfgs: torch.optim.LBFGS = lbfgs, width: float = rounded * unit) -> Tensor:
            lbfgs.zero_grad()
            with torch.enable_grad():
                bound = error_bound(place(free), width) / unit
                bound.backward()
            return bound.detach()

        lbfgs.step(closure)
        found = place(free.detach())
        bound = float(error_bound(found)) / unit
        # The line search may have tried times that are none.
        if not (math.isfinite(bound) and bool((found.diff() > _LEAST_GAP).all())):
            break
        if bound < least:
            best, least = found, bound
    return best


def error_bound(log_snrs: Tensor, width: float = 0.0) -> Tensor:
    """Return the bound of the end's error, 0-d; differentiable but for kinks.

    Args:
        log_snrs: `(N + 1,)` ascending, float64, with `N >= 1`.
        width: Over which kinks are rounded off, in units of the bound.
    """
    steps = len(log_snrs) - 1
    # In units of e^l at the end, which may be large.
    scaled = log_snrs - log_snrs[-1]
    weights = multistep_weights(scaled)
    square = torch.exp(-2 * log_snrs[:-1])
    errors = square / torch.sqrt(1 + square)
    parts = weights * errors
    alone = torch.arange(steps) < _ALONE
    alone[-1] = True
    # A root of 0 has no gradient.
    norms = (parts[alone].square().sum(1) + torch.finfo(torch.float64).tiny).sqrt()
    totals = parts[~alone].sum(0)
    if width:
        return norms.sum() + (totals.square() + (width / steps) ** 2).sqrt().sum()
    return norms.sum() + totals.abs().sum()


def multistep_weights(log_snrs: Tensor) -> Tensor:
    """Return the integrals `J`, `(N, N)`: what step `s` takes of the output `k`; differentiable.

    The order is 1, 2, 3, ..., 3, 2, 1.

    Args:
        log_snrs: `(N + 1,)` ascending, float64.
    """
    steps = len(log_snrs) - 1
    gaps, start = log_snrs.diff(), log_snrs[:-1].exp()
    # int_0^h u^p e^u du for p = 0, 1, 2.
    zeroth = torch.expm1(gaps)
    moments = [zeroth, gaps.exp() * gaps - zeroth]
    moments.append(gaps.exp() * gaps.square() - 2 * moments[1])
    m0, m1, m2 = (start * moment for moment in moments)
    orders = torch.full((steps,), 3)
    orders[[1, -2] if steps > 1 else [0]] = 2
    orders[[0, -1]] = 1
    weights = log_snrs.new_zeros(steps, steps)
    s = (orders == 1).nonzero()[:, 0]
    weights = weights.index_put((s, s), m0[s])
    s = (orders == 2).nonzero()[:, 0]
    before = gaps[s - 1]
    weights = weights.index_put((s, s - 1), -m1[s] / before)
    weights = weights.index_put((s, s), m0[s] + m1[s] / before)
    s = (orders == 3).nonzero()[:, 0]
    # The nodes lie at 0, -a and -b from the start of the step.
    a = gaps[s - 1]
    b = a + gaps[s - 2]
    weights = weights.index_put((s, s - 2), (m2[s] + a * m1[s]) / (b * (b - a)))
    weights = weights.index_put((s, s - 1), -(m2[s] + b * m1[s]) / (a * (b - a)))
    return weights.index_put((s, s), m0[s] + (m2[s] + (a + b) * m1[s]) / (a * b))
