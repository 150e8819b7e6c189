"""Environments in which a diffusion sampler is a policy.

Importing this package registers ``fewstep/SwissRoll-v0``, ``fewstep/Moons-v0``,
``fewstep/GaussianCluster-v0`` and ``fewstep/Digits-v0`` with Gymnasium, for ``gym.make`` and
``gym.make_vec``; and, for those who have the data files, ``fewstep/MNIST-v0``,
``fewstep/CIFAR10-v0``, ``fewstep/CelebA64-v0`` and ``fewstep/ImageFolder-v0``.
"""

from ..common.names import unknown_name
from .mdp import DiffusionMDP
from .numpy_vector import NumpyVectorEnv
from .processes.process import VE, DiscreteVP, NoiseProcess, make_process
from .registration import ENVIRONMENTS, make_mdp, register_environments
from .sb3 import SB3VecEnv
from .schedules.schedule import Schedule, make_schedule
from .schedules.spacings import refine_times
from .single import DiffusionEnv
from .targets.target import Target, make_target
from .vector import DiffusionVectorEnv

register_environments()

__all__ = [
    "ENVIRONMENTS",
    "VE",
    "DiffusionEnv",
    "DiffusionMDP",
    "DiffusionVectorEnv",
    "DiscreteVP",
    "NoiseProcess",
    "NumpyVectorEnv",
    "SB3VecEnv",
    "Schedule",
    "Target",
    "make_mdp",
    "make_process",
    "make_schedule",
    "make_target",
    "refine_times",
    "unknown_name",
]
