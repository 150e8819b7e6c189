"""Agents: who acts in the environment, and how each learns.

Behaviour cloning trains a denoiser on data; SFT-PG and SFT fine-tune the sampler it makes against a
critic; D-ODE distils a solver's weights; schedule learning moves the times it visits; variance
learning measures how much noise its steps want. A `Tableau` is a sampler as a table of numbers,
which `solvers` build.
"""

from .base import Agent
from .checkpoint import CheckpointError
from .cloning import BehaviorCloning
from .denoiser import Denoiser
from .dode import DODE
from .policies import DenoiserPolicy, SolverPolicy
from .schedule_learning import ScheduleLearning
from .sft import SFT
from .sft_pg import SFTPG
from .tableau import Tableau
from .training import TrainingDivergedError
from .unet import UNet2D
from .variance import VarianceLearning

AGENTS: dict[str, type[Agent]] = {
    agent.name: agent
    for agent in (BehaviorCloning, SFT, SFTPG, DODE, ScheduleLearning, VarianceLearning)
}

__all__ = [
    "AGENTS",
    "DODE",
    "SFT",
    "SFTPG",
    "Agent",
    "BehaviorCloning",
    "CheckpointError",
    "Denoiser",
    "DenoiserPolicy",
    "ScheduleLearning",
    "SolverPolicy",
    "Tableau",
    "TrainingDivergedError",
    "UNet2D",
    "VarianceLearning",
]
