"""The toys: distributions that need no files.

The functions import scikit-learn themselves, because its import takes a second.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...critics.metrics.manifold import Manifold
from .target import TRAINING_SEED, Target


def _swiss_roll(n: int, seed: int) -> np.ndarray:
    """The toy of Fan & Lee (2023), S.8: coordinates 0 and 2 of the 3-D roll, divided by 20."""
    from sklearn.datasets import make_swiss_roll

    points, _ = make_swiss_roll(n, noise=0.05, random_state=seed)
    return points[:, [0, 2]] / 20


def _roll_curve(course: np.ndarray) -> np.ndarray:
    angle = 1.5 * np.pi * (1 + 2 * course)
    return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 20


def _moons(n: int, seed: int) -> np.ndarray:
    """Two half circles, moved to the origin and divided by 1.5: about `[-1, 1] x [-0.5, 0.5]`."""
    from sklearn.datasets import make_moons

    points, _ = make_moons(n, noise=0.05, random_state=seed)
    return (points - (0.5, 0.25)) / 1.5


def _moons_curve(course: np.ndarray) -> np.ndarray:
    angle = np.pi * (2 * course % 1)
    inner = (course >= 0.5)[:, None]
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (np.where(inner, (1, 0.5) - circle, circle) - (0.5, 0.25)) / 1.5


def _gaussian_cluster(n: int, seed: int) -> np.ndarray:
    """A single narrow cluster, `N((0.5, 0.5), 0.01^2 I)`."""
    return np.random.default_rng(seed).normal(0.5, 0.01, (n, 2))


def _digits() -> Target:
    """scikit-learn's 1,797 digits, 8 x 8 in [-1, 1]; 1,297 to train on and 500 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images[:, None] / 8 - 1
    order = np.random.default_rng(TRAINING_SEED).permutation(len(images))
    return Target(
        "Digits",
        images[order[:-500]],
        held_out=images[order[-500:]],
        labels=digits.target[order[:-500]],
        held_out_labels=digits.target[order[-500:]],
    )


TOYS: dict[str, Callable[[], Target]] = {
    "SwissRoll": lambda: Target.from_sampler(
        _swiss_roll, "SwissRoll", manifold=Manifold(_roll_curve, 0.05 / 20)
    ),
    # Its noise is so wide that 12 standard deviations would reach from one moon into the other.
    "Moons": lambda: Target.from_sampler(
        _moons, "Moons", manifold=Manifold(_moons_curve, 0.05 / 1.5, far=4.0)
    ),
    "GaussianCluster": lambda: Target.from_sampler(_gaussian_cluster, "GaussianCluster"),
    "Digits": _digits,
}
