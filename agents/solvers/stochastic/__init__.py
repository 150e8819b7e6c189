"""Solvers that are Gaussian chains: fresh noise in every step, whose variance is their subject."""

from .analytic import analytic_dpm, per_pixel_dpm
from .ancestral import ancestral, euler_ancestral
from .consistency import consistency
from .fastdpm import fast_dpm
from .flow_sde import flow_sde
from .sa_solver import sa_solver

__all__ = [
    "analytic_dpm",
    "ancestral",
    "consistency",
    "euler_ancestral",
    "fast_dpm",
    "flow_sde",
    "per_pixel_dpm",
    "sa_solver",
]
