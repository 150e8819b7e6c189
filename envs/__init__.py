"""Environments in which a diffusion sampler is a policy.

Importing this package registers `fewstep/SwissRoll-v0`, `fewstep/Moons-v0`,
`fewstep/GaussianCluster-v0` and `fewstep/Digits-v0` with Gymnasium, for `gym.make` and
`gym.make_vec`; and, for those who have the data files, `fewstep/MNIST-v0`,
`fewstep/FashionMNIST-v0`, `fewstep/CIFAR10-v0`, `fewstep/CelebA64-v0` and `fewstep/ImageFolder-v0`.
"""

from typing import TYPE_CHECKING, Any

from ..common.conditions import Captions, Classes, Embeddings
from .inpainting import Inpainting
from .mdp import DiffusionMDP
from .numpy_vector import NumpyVectorEnv
from .processes import (
    VE,
    ContinuousVP,
    CustomProcess,
    DiscreteVP,
    NoiseProcess,
    RectifiedFlow,
    make_process,
)
from .registration import ENVIRONMENTS, make_mdp, register_environments
from .schedules import Schedule, make_schedule
from .schedules.spacings import refine_times
from .single import DiffusionEnv
from .targets.known import make_target
from .targets.target import Target
from .vector import DiffusionVectorEnv

if TYPE_CHECKING:
    from .sb3 import SB3VecEnv
else:

    def __getattr__(name: str) -> Any:
        """Load the shell of Stable-Baselines3, which takes long, when it is first asked for."""
        if name != "SB3VecEnv":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .sb3 import SB3VecEnv

        return SB3VecEnv


register_environments()

__all__ = [
    "ENVIRONMENTS",
    "VE",
    "Captions",
    "Classes",
    "ContinuousVP",
    "CustomProcess",
    "DiffusionEnv",
    "DiffusionMDP",
    "DiffusionVectorEnv",
    "DiscreteVP",
    "Embeddings",
    "Inpainting",
    "NoiseProcess",
    "NumpyVectorEnv",
    "RectifiedFlow",
    "SB3VecEnv",
    "Schedule",
    "Target",
    "make_mdp",
    "make_process",
    "make_schedule",
    "make_target",
    "refine_times",
]
