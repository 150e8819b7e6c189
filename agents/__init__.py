"""Agents: who acts in the environment, and how each learns.

Behaviour cloning trains a denoiser on data; SFT-PG and SFT fine-tune the sampler it makes against a
critic; D-ODE distils a solver's weights; schedule learning moves the times it visits; variance
learning measures how much noise its steps want. A `Tableau` is a sampler as a table of numbers,
which `solvers` build.
"""

from typing import TYPE_CHECKING, Any

from .base import Agent
from .checkpoint import CheckpointError
from .cloning import BehaviorCloning
from .denoiser import Denoiser
from .dode import DODE
from .schedule_learning import ScheduleLearning
from .sft import SFT
from .sft_pg import SFTPG
from .solver_policy import SolverPolicy
from .tableau import Tableau
from .training import TrainingDivergedError
from .unet import UNet2D
from .variance import VarianceLearning

if TYPE_CHECKING:
    from .policies import DenoiserPolicy
else:

    def __getattr__(name: str) -> Any:
        """Load the policy of Stable-Baselines3, which takes long, when it is first asked for."""
        if name != "DenoiserPolicy":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .policies import DenoiserPolicy

        return DenoiserPolicy


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
