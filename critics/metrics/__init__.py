"""Metrics: judges of sets of samples, which train nothing and reward nothing."""

from .distances import SlicedWasserstein, floor, mmd, sliced_wasserstein, wasserstein

__all__ = ["SlicedWasserstein", "floor", "mmd", "sliced_wasserstein", "wasserstein"]
