"""Metrics: judges of sets of samples, which train nothing and reward nothing."""

from .distances import SlicedWasserstein, floor, mmd, sliced_wasserstein, wasserstein
from .evaluation import Evaluation
from .fidelity import FeatureDistances, fid, kid, precision_recall
from .manifold import Manifold
from .report import Report, evaluate
from .two_sample import c2st

__all__ = [
    "Evaluation",
    "FeatureDistances",
    "Manifold",
    "Report",
    "SlicedWasserstein",
    "c2st",
    "evaluate",
    "fid",
    "floor",
    "kid",
    "mmd",
    "precision_recall",
    "sliced_wasserstein",
    "wasserstein",
]
