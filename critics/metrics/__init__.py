"""Metrics: judges of sets of samples, which train nothing and reward nothing."""

from .distances import SlicedWasserstein, floor, mmd, sliced_wasserstein, wasserstein
from .fidelity import FeatureDistances, fid, kid, precision_recall

__all__ = [
    "FeatureDistances",
    "SlicedWasserstein",
    "fid",
    "floor",
    "kid",
    "mmd",
    "precision_recall",
    "sliced_wasserstein",
    "wasserstein",
]
