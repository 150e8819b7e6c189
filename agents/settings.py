"""Groups of settings that several agents share; each agent's own are beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.precision import Precision
from ..common.settings import Settings, bounded
from .solvers import Options

RateSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class AgentSettings(Settings):
    """What every agent is told."""

    solver: str = "ancestral"
    """Solver that samples; `fewstep agents` lists them."""
    solver_options: Options | None = None
    """Options of the solver, as KEY VALUE pairs; by default those for the kind of data."""


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Adam on the network in training, and the average of its weights."""

    learning_rate: float = bounded(1e-3, least=0)
    """Peak learning rate."""
    betas: tuple[float, float] = bounded((0.9, 0.999), least=0, below=1)
    """Adam's decays of the first and second moments."""
    lr_schedule: RateSchedule = "constant"
    """How the learning rate falls over the training."""
    max_grad_norm: float | None = bounded(1.0, above=0)
    """The gradient's norm is clipped here; None does not clip."""
    ema: float = bounded(0.0, least=0, below=1)
    """Decay a round of the averaged weights, which sample; 0 takes the weights themselves."""


@dataclass(frozen=True)
class ExecutionSettings(Settings):
    """How the network is run while it trains; none of it is the algorithm's."""

    precision: Precision = "float32"
    """float32, or bf16: networks compute in bfloat16 where that is safe (autocast); weights,
    densities and rewards stay float32."""
    channels_last: bool = False
    """Keep convolution weights in that memory format; faster on most GPUs."""
    compile: bool = False
    """Run the denoiser through torch.compile."""
    micro_batch_size: int | None = bounded(None, least=1)
    """Most samples that the denoiser sees at once; gradients are accumulated over the pieces. None
    takes a batch whole. The result is the same to rounding, the memory is not."""
