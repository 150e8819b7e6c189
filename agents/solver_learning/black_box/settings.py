"""Settings of RDPO: around which tables it draws, how many, and how it moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ....common.settings import Settings, bounded
from ...settings import AgentSettings
from ..joint.settings import LearnSettings

Method = Literal["policy-gradient", "cross-entropy"]


@dataclass(frozen=True)
class SpreadSettings(Settings):
    """How far from the mean tables are drawn at first, one standard deviation each."""

    times: float = bounded(0.3, above=0)
    """Of the levels' parameters, whose softmax shares out the scale: a step's share changes by this
    part of itself."""
    coefficients: float = bounded(0.03, above=0)
    """Of p and W, in units of the base solver's largest one in the row."""
    shifts: float = bounded(0.05, above=0)
    """Of xi, the logarithm of the level that the network is told over the state's."""


@dataclass(frozen=True)
class PolicyGradientSettings(Settings):
    """The step that follows the rewards of a round, of method policy-gradient."""

    learning_rate: float = bounded(0.5, above=0)
    """Of Adam on the mean, in standard deviations of the start; it falls on a cosine."""
    std_rate: float = bounded(0.1, least=0)
    """Of Adam on the logarithms of the standard deviations; 0 leaves them as they are."""
    betas: tuple[float, float] = bounded((0.8, 0.95), least=0, below=1)
    """Adam's decays of the first and second moments."""
    limit: float = bounded(4.0, above=0)
    """Advantages are cut at so many times their mean size: samples of a table that runs away would
    drown all others."""
    epochs: int = bounded(1, least=1)
    """Steps on each round's tables; with more than 1, clip_range bounds how far they go."""
    clip_range: float = bounded(0.2, above=0)
    """PPO's clip of the ratio of densities at 1 +- clip_range."""
    kl: float = bounded(0.0, least=0)
    """Weight of the divergence from the distribution of the start, in units of the advantages'
    mean size."""


@dataclass(frozen=True)
class CrossEntropySettings(Settings):
    """The step of method cross-entropy."""

    elite: float = bounded(0.25, above=0, most=1)
    """The share of a round's tables, those of most reward, whose mean and standard deviation are
    taken over; at least two tables."""
    step: float = bounded(0.7, above=0, most=1)
    """How far mean and standard deviation go there from where they are."""


@dataclass(frozen=True)
class RDPOSettings(AgentSettings):
    """Settings of `RDPO`."""

    solver: str = "dpm-solver++-3m"
    """The base solver, any but those that clamp predictions or read a second head."""
    table: str | None = None
    """File of a finished table, such as the tableau.json of a run of solver learning, to start from
    instead of the solver's own; the solver is the one that it was learned from. Its times replace
    the environment's."""
    method: Method = "policy-gradient"
    """policy-gradient: each episode has a table of its own, and its reward moves the mean by the
    score function; cross-entropy: each table plays all of a round's episodes, and the best ones say
    where the next are drawn."""
    rounds: int = bounded(200, least=1)
    """Rounds; 50 to 1000."""
    batch_size: int = bounded(256, least=2)
    """Noises a round, under each of which as many tables act as `tables` says."""
    tables: int | None = bounded(None, least=2)
    """Tables under the same noise, compared with one another; for policy-gradient 4 or another even
    number above, half of which mirror the others. None takes 4, for cross-entropy 16 and a quarter
    of the noises."""
    held_out: int = bounded(1000, least=2)
    """Noises to choose by what is returned, and as many others to report its reward on."""
    check_interval: int = bounded(10, least=1)
    """Rounds between two looks at the noises to choose by."""
    learn: LearnSettings = field(default_factory=LearnSettings)
    spread: SpreadSettings = field(default_factory=SpreadSettings)
    gradient: PolicyGradientSettings = field(default_factory=PolicyGradientSettings)
    elites: CrossEntropySettings = field(default_factory=CrossEntropySettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "policy-gradient" and (self.compared % 2 or self.compared < 4):
            raise ValueError(
                "tables must be even and at least 4 for method='policy-gradient', where half of "
                f"them mirror the others; got {self.tables}."
            )

    @property
    def compared(self) -> int:
        """How many tables are compared under the same noise."""
        if self.tables is not None:
            return self.tables
        return 4 if self.method == "policy-gradient" else 16

    @property
    def noises(self) -> int:
        """How many noises a round has."""
        if self.tables is None and self.method == "cross-entropy":
            return max(self.batch_size // 4, 2)
        return self.batch_size
