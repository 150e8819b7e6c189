"""Settings of the agents that distil a fine solver into the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...common.settings import Settings, bounded
from ..policy_gradient.settings import CriticSettings
from ..settings import AgentSettings, ExecutionSettings, OptimizerSettings
from ..solvers import Options

Distance = Literal["l1", "l2"]
States = Literal["teacher", "data"]
StepWeights = Literal["truncated-snr", "snr"]
JumpWeights = Literal["even", "gap"]


@dataclass(frozen=True)
class FineSolverSettings(Settings):
    """The fine solver of the network as it was given, by which all are judged."""

    solver: str = "dpm-solver++-3m"
    """A deterministic solver."""
    options: Options | None = None
    """Options of that solver."""
    scale: int = bounded(8, least=1)
    """Its steps for each step of the student, 4 to 20; SFD's paper takes 4, on times that are dense
    near the data. On times that are even, more are needed there."""
    integer_times: bool = False
    """Round its times to whole noisings, for networks that know no others."""
    check: bool = True
    """Warn if it is no better than the student at the start."""


@dataclass(frozen=True)
class HeldOutSettings(Settings):
    """The noise that the network is judged by, and is not trained on."""

    size: int = bounded(256, least=2)
    """How many noises choose; as many more report."""
    looks: int = bounded(10, least=1)
    """How often the network in training is compared with the best one so far."""


@dataclass(frozen=True)
class DistillationSettings(AgentSettings):
    """What the agents that distil a network share."""

    solver: str = "ddim"
    """The student's solver, any deterministic one."""
    rounds: int = bounded(400, least=1)
    """Rounds of training."""
    batch_size: int = bounded(128, least=1)
    """Trajectories a round, and samples a gradient step."""
    absorb_guidance: bool = False
    """Of a guided network: the student is asked with the condition alone, at half the network
    evaluations, and learns what the guided teacher does."""
    fine: FineSolverSettings = field(default_factory=FineSolverSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(5e-5, lr_schedule="cosine", ema=0.95)
    )
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)


@dataclass(frozen=True)
class SFDSettings(DistillationSettings):
    """Settings of `SFD`."""

    table: str | None = None
    """File of a finished table, such as the tableau.json of a run of solver learning, which the
    student samples with instead of the solver; its times are the student's."""
    distance: Distance = "l1"
    """What a step minimises between its state and the teacher's: l1 is the paper's, whose gradient
    is as large at every noise level; l2 is the squared distance."""


@dataclass(frozen=True)
class PDSettings(DistillationSettings):
    """Settings of `ProgressiveDistillation`."""

    rounds: int = bounded(150, least=1)
    """Rounds of each halving."""
    teacher_steps: int | None = bounded(None, least=2)
    """N, the steps of the first teacher: the student's times a power of two. None takes 16 times as
    many, four halvings."""
    states: States = "teacher"
    """Where the student is taught: teacher, on the teacher's way from noise, which needs no data;
    data, on noised data, as in the paper."""
    weights: StepWeights = "truncated-snr"
    """Of the squared error of the clean sample: truncated-snr, max(alpha^2 / sigma^2, 1), is the
    paper's; snr, alpha^2 / sigma^2, is the error of the predicted noise, milder for networks that
    predict it."""


@dataclass(frozen=True)
class CDSettings(DistillationSettings):
    """Settings of `ConsistencyDistillation`."""

    solver: str = "consistency"
    """The sampler of a consistency model."""
    states: States = "teacher"
    """Where the network is taught: teacher, on the fine solver's way from noise, which needs no
    data; data, on noised data, with one DDIM step of the teacher."""
    stages: int | None = bounded(None, least=1)
    """The jumps between the two times of a pair begin with 2^(stages - 1) steps of the fine solver,
    and are halved in each stage, to one. None begins with jumps to the end from everywhere, from
    which a network without a boundary condition of its own learns it; on data with half of that, as
    one step of the teacher to the end teaches nothing."""
    huber: float = bounded(5.4e-4, above=0)
    """c of the pseudo-Huber distance sqrt(d^2 + c^2) - c, d the root of the mean square."""
    weights: JumpWeights = "even"
    """Of the levels: even; or gap, the inverse of the difference of their noise levels."""


def _critic() -> CriticSettings:
    return CriticSettings(
        objective="logistic", regularizer="r1", learning_rate=1e-4, betas=(0.5, 0.99)
    )


@dataclass(frozen=True)
class DMDSettings(DistillationSettings):
    """Settings of `DMD`."""

    solver: str = "consistency"
    """The student's solver; its steps read their own state only."""
    absorb_guidance: bool = True
    """Of a guided network: only the teacher is guided, and the student is asked with the condition
    alone; False guides the student, too, at twice the network evaluations."""
    n_fake: int = bounded(5, least=1)
    """Steps a round of the network that denoises the student's samples, and of the critic."""
    fake_learning_rate: float | None = bounded(None, above=0)
    """Of that network; by default the student's."""
    adversarial: float = bounded(0.0, least=0)
    """Weight of a learned critic's softplus(-f(x)), which tells the student's samples from data; 0
    has none, and needs no data. DMD2 has 1e-3; the toys want more."""
    held_out: HeldOutSettings = field(default_factory=lambda: HeldOutSettings(size=1000))
    critic: CriticSettings = field(default_factory=_critic)
