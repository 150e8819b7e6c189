"""Critics: who says how good a sample is. They know tensors only, and nothing of diffusion.

A critic is a function ``f(sample (N, *shape)) -> (N,)``, high on data and low on fakes: the reward
of the environments. `MMDCritic` is ready at once; `IPMCritic` learns, with networks from
`make_critic` and `make_baseline`. `metrics` holds the distances between sets of samples that a run
reports.
"""

from . import metrics
from .ipm import IPMCritic
from .mmd import MMDCritic
from .networks import ConvCritic, MLPBaseline, MLPCritic, make_baseline, make_critic
from .reward import RewardCritic

__all__ = [
    "ConvCritic",
    "IPMCritic",
    "MLPBaseline",
    "MLPCritic",
    "MMDCritic",
    "RewardCritic",
    "make_baseline",
    "make_critic",
    "metrics",
]
