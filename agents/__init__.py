"""Agents: who acts in the environment, and how each learns.

Behaviour cloning trains a denoiser on data; SFT-PG, SFT-V and SFT fine-tune the sampler it makes
against a critic; D-ODE distils a solver's weights; schedule learning moves the times it visits;
solver learning learns weights and times together, RDPO from rewards alone; variance learning
measures how much noise its steps want; SFD, progressive and consistency distillation train the
network by its own fine solver, and DMD matches the distribution of its samples. A `Tableau` is a
sampler as a table of numbers, which `solvers` build.
"""

from typing import TYPE_CHECKING, Any

from ..common.checkpoint import CheckpointError
from ..common.optimisation import TrainingDivergedError
from .base import Agent
from .cloning import BehaviorCloning
from .denoisers.denoiser import Denoiser
from .denoisers.networks import UNet2D
from .network_distillation.consistency import ConsistencyDistillation
from .network_distillation.dmd import DMD
from .network_distillation.progressive import ProgressiveDistillation
from .network_distillation.sfd import SFD
from .policy_gradient.sft import SFT
from .policy_gradient.sft_pg import SFTPG
from .policy_gradient.sft_v import SFTV
from .samplers.solver_policy import SolverPolicy
from .samplers.tableau import Tableau
from .solver_learning.dode import DODE
from .solver_learning.rdpo import RDPO
from .solver_learning.schedule_learning import ScheduleLearning
from .solver_learning.solver_learning import SolverLearning
from .variance.learning import VarianceLearning

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
    for agent in (
        BehaviorCloning,
        SFT,
        SFTPG,
        SFTV,
        DODE,
        ScheduleLearning,
        SolverLearning,
        RDPO,
        VarianceLearning,
        SFD,
        ProgressiveDistillation,
        ConsistencyDistillation,
        DMD,
    )
}

__all__ = [
    "AGENTS",
    "DMD",
    "DODE",
    "RDPO",
    "SFD",
    "SFT",
    "SFTPG",
    "SFTV",
    "Agent",
    "BehaviorCloning",
    "CheckpointError",
    "ConsistencyDistillation",
    "Denoiser",
    "DenoiserPolicy",
    "ProgressiveDistillation",
    "ScheduleLearning",
    "SolverLearning",
    "SolverPolicy",
    "Tableau",
    "TrainingDivergedError",
    "UNet2D",
    "VarianceLearning",
]
