"""Settings of `VarianceLearning`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...common.settings import Settings, bounded
from ..settings import OptimizerSettings
from ..solvers import Options

Kind = Literal["gamma", "sn", "npr"]


@dataclass(frozen=True)
class HeadSettings(Settings):
    """The second head."""

    hidden: int = bounded(128, least=1)
    """Width of the layer between."""
    per_pixel: bool = True
    """False makes the variance one number a sample."""


@dataclass(frozen=True)
class VarianceSettings(Settings):
    """Settings of `VarianceLearning`."""

    kind: Kind = "gamma"
    """gamma (a chain of betas only), sn or npr."""
    rounds: int = bounded(400, least=1)
    """Rounds of training of a head; Gamma takes what samples_per_time asks for."""
    batch_size: int = bounded(256, least=1)
    """Samples a round."""
    samples_per_time: int = bounded(256, least=1)
    """Of Gamma: samples of each noising; 100 to 50,000, fewer for larger images."""
    solver: str | None = None
    """The solver that belongs to the kind, or None for it."""
    solver_options: Options | None = None
    """Options of the solver, as KEY VALUE pairs; by default those for the kind of data."""
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(lr_schedule="cosine", ema=0.99)
    )
    head: HeadSettings = field(default_factory=HeadSettings)
