"""Where sampling starts and ends: which first and last times of a grid give right samples.

Sampling starts from noise alone, `N(0, process.prior_std(t)^2)` at the grid's first time `t`,
and every solver returns what it has at the last. Three things can go wrong there:

- the first time is so late that the true states there are not noise alone (`LateStartWarning`);
- it is so early that nothing of the sample is left, and a solver of higher order whose unknown is
  the log-SNR or `sigma / alpha` makes a first step of any length (`EmptyStartWarning`);
- the last time still has visible noise (`UnfinishedWarning`).

`default_first_time` and `is_clean` are the ends of the default grids, which avoid the last two.
"""

from __future__ import annotations

import math
import warnings

from ..processes import NoiseProcess

# As diffusers recommends for cosine betas (`lambda_min_clipped`). DDPM's linear chain ends at
# -5.06 and is left as it is.
LEAST_LOG_SNR = -5.1

# Two grey levels of 255, for data in [-1, 1]. DDPM's linear chain of 1000 has 0.01 at its first
# noising, EDM's process 0.002.
NEGLIGIBLE_NOISE = 2 * 2 / 255

# Of the signal's share in the first state. DDIM's grids of five or more steps on the linear and the
# cosine chain of 1000 leave at most 0.31, time 400 of the linear chain 0.44.
MOST_MISSING_SHARE = 1 / 3


class SamplingWarning(UserWarning):
    """The samples will be wrong in a way that the grid of times decides."""


class LateStartWarning(SamplingWarning):
    """Sampling starts at a time whose true states are not noise alone."""


class EmptyStartWarning(SamplingWarning):
    """A solver of higher order in log-SNR or sigma / alpha starts where no signal is left."""


class UnfinishedWarning(SamplingWarning):
    """Sampling ends at a time whose states still hold visible noise."""


def signal_share(process: NoiseProcess, t: float) -> float:
    """The share of the signal in a state, `alpha / sqrt(alpha^2 + sigma^2)`, 0 to 1.

    On a variance-preserving process it is `alpha` itself.
    """
    alpha, sigma = process.levels(t)
    return alpha / math.hypot(alpha, sigma)


def is_clean(process: NoiseProcess, t: float) -> bool:
    """Whether the noise left at a time, `sigma / alpha`, is negligible for data of unit size."""
    alpha, sigma = process.levels(t)
    return sigma <= NEGLIGIBLE_NOISE * alpha


def is_empty(process: NoiseProcess, t: float) -> bool:
    """Whether `log(alpha)`, at small alpha the log-SNR, is below -5.1: next to no signal is left.

    Never so on a variance-exploding process, whose alpha is 1, and not where alpha is exactly 0:
    there solvers take the limit, a first step of first order in the predicted clean sample.
    """
    alpha, _ = process.levels(t)
    # A start at the bound itself, as the default grids have it, is none below it by rounding.
    return 0 < alpha < 0.99 * math.exp(LEAST_LOG_SNR)


def default_first_time(process: NoiseProcess) -> float:
    """The noisiest time that is not empty: `t_max`, or that of the log-SNR -5.1."""
    if not is_empty(process, process.t_max):
        return process.t_max
    return float(process.time_of_log_snr(LEAST_LOG_SNR))


def warn_of_ends(process: NoiseProcess, first: float, last: float) -> None:
    """Warn if a sampler that visits times from `first` to `last` gives wrong samples.

    Its start is late if the share of the signal, which noise alone lacks, is larger by more than a
    third than at `t_max`, where the process itself takes the signal for gone. On DDPM's linear
    chain of 1000 that is below time 467: a Gaussian of standard deviation 0.5 loses about 17 % of
    its mean there. The toys' short chains, which hardly noise at all, end far from noise by
    intention; a start at their own end is never late.
    """
    share, least = signal_share(process, first), signal_share(process, process.t_max)
    if share - least > MOST_MISSING_SHARE:
        warnings.warn(
            f"Sampling starts from pure noise at time {first:g} of {process!r}, where a true state "
            f"still holds {share:.2f} of the clean sample: the samples will be biased towards 0 "
            f"and too wide or too narrow. Start nearer to t_max = {process.t_max:g}.",
            LateStartWarning,
            stacklevel=3,
        )
    if not is_clean(process, last):
        alpha, sigma = process.levels(last)
        warnings.warn(
            f"Sampling ends at time {last:g} of {process!r}, with noise of standard deviation "
            f"{sigma / alpha:.2g} left in the samples: end the times with a step to 0.",
            UnfinishedWarning,
            stacklevel=3,
        )


def warn_of_empty_start(solver: str, process: NoiseProcess, first: float) -> None:
    """Warn if a solver that divides by the signal starts where there is next to none."""
    if is_empty(process, first):
        warnings.warn(
            f"{solver} starts at time {first:g} of {process!r}, where the log-SNR is "
            f"{float(process.log_snr(first)):.3g}: its first step is so long that a few steps give "
            f"samples of any size. Start where it is {LEAST_LOG_SNR}, at time "
            f"{default_first_time(process):.6g}, as the default grids do.",
            EmptyStartWarning,
            stacklevel=3,
        )
