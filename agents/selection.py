"""Which of several samplers an agent returns: the one that errs least on held-out noise.

What a learner finds on some noises may be worse on others than what it was given. So learners that
have a teacher compare, on noise that they did not learn on, and keep what they were given unless
something is better, and not by chance. What they then report is
measured on a third set of noises, because the least of several measured errors is too small.

Errors are mean squared differences per coordinate, the unit of everything that agents report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def coordinate_errors(samples: Tensor, goal: Tensor) -> Tensor:
    """Return each sample's mean squared difference per coordinate, (N,) float64 on the CPU.

    Args:
        samples: (N, *shape).
        goal: (N, *shape) what they should be.
    """
    return (samples.double() - goal.to(samples.device).double()).square().flatten(1).mean(1).cpu()


def is_better(errors: Tensor, than: Tensor, by_lead: bool = True) -> bool:
    """Tell whether errors are smaller in the mean, and not by chance.

    By more than one standard error of their mean difference, or for so many more than half of the
    noises that a fair coin would be two standard deviations off. The second counts where a few
    noises, that end in another mode, make up most of the error and all of the uncertainty.

    Args:
        errors: (N,) of the new sampler, one for each noise.
        than: (N,) of the old one, from the same noises.
        by_lead: whether the second counts; not for shares of a distance of distributions, of which
            single ones say nothing.

    Returns:
        False also where the new errors are not finite; True where only the old ones are not.
    """
    if not errors.isfinite().all():
        return False
    if not than.isfinite().all():
        return True
    gain = than - errors
    mean, count = float(gain.mean()), len(gain)
    if count < 2 or mean <= 0:
        return mean > 0
    lead = int((gain > 0).sum()) - int((gain < 0).sum()) if by_lead else 0
    return mean > float(gain.std()) / math.sqrt(count) or lead > 2 * math.sqrt(count)


def best_of(errors: Mapping[str, Tensor], by_lead: bool = True) -> str:
    """Return the name of the sampler to keep.

    Args:
        errors: name -> (N,) errors from the same noises; the first is what there was before.
        by_lead: see `is_better`.

    Returns:
        Of those that are better than the first (`is_better`) the one of least mean error, or the
        first.
    """
    first = next(iter(errors))
    better = [name for name in errors if is_better(errors[name], errors[first], by_lead)]
    return min(better, key=lambda name: float(errors[name].mean()), default=first)
