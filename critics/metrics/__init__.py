"""Metrics: judges of sets of samples, which train nothing and reward nothing."""

from .distances import SlicedWasserstein, floor, mmd, sliced_wasserstein, wasserstein
from .fidelity import FeatureDistances, fid, kid, precision_recall
from .manifold import Manifold
from .two_sample import c2st

__all__ = [
    "FeatureDistances",
    "Manifold",
    "SlicedWasserstein",
    "c2st",
    "fid",
    "floor",
    "kid",
    "mmd",
    "precision_recall",
    "sliced_wasserstein",
    "wasserstein",
]
