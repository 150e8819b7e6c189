"""Classifier two-sample test: how often a classifier tells samples from real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.arguments import as_tensor, checked
from ..checks import check_finite, check_samples
from .distances import Samples

# Neighbours that vote, and the seed that splits a set into what is learned and what is asked.
VOTERS, _SEED = 15, 2_017


@checked
def c2st(x: Samples, y: Samples, neighbours: int | None = None) -> float:
    """Return the held-out accuracy of a nearest-neighbour classifier between two sets, 0 to 1.

    Lopez-Paz & Oquab (2017). Half of either set votes on the other half; 0.5 says that nobody can
    tell them apart, 1 that everybody can. It sees what a distance between whole distributions
    hardly does: a few per cent of samples where no real one lies, a manifold that is too thick.

    The samples are compared as vectors: of images give features (see `extract` in `fidelity`). From
    a larger set as many are drawn as the smaller one has.

    Args:
        x: samples (N, *shape).
        y: samples (M, *shape).
        neighbours: how many vote, odd and at most half of the smaller set; None: 15, or fewer where
            that set is tiny.

    Raises:
        TypeError: a value of another type.
        ValueError: bad samples, shapes that differ, fewer than two samples a side, or a number of
            voters that is not possible.
    """
    sides = [as_tensor(name, side).cpu() for name, side in (("x", x), ("y", y))]
    for name, side, shape in zip("xy", sides, (None, tuple(sides[0].shape[1:])), strict=True):
        check_samples(name, side, shape)
        check_finite(name, side)
    half = min(map(len, sides)) // 2
    if half == 0:
        raise ValueError(f"c2st needs two samples a side, got {len(sides[0])} and {len(sides[1])}.")
    if neighbours is None:
        neighbours = min(VOTERS, half - 1 + half % 2)
    if not 1 <= neighbours <= half or neighbours % 2 == 0:
        raise ValueError(f"neighbours must be odd and 1 to {half}, got {neighbours}.")
    # scikit-learn takes a second to import, so only those who need it pay.
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(_SEED)
    shuffled = [_choose(side.flatten(1).double(), 2 * half, generator) for side in sides]
    learned = torch.cat([side[:half] for side in shuffled])
    asked = torch.cat([side[half:] for side in shuffled])
    labels = torch.arange(2).repeat_interleave(half)
    classifier = KNeighborsClassifier(neighbours).fit(learned.numpy(), labels.numpy())
    return float(classifier.score(asked.numpy(), labels.numpy()))


def _choose(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return points[torch.randperm(len(points), generator=generator)[:count]]
