"""Settings of SFT-PG, SFT-V and SFT in groups: round, policy, its optimizer, critic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ...common.names import unknown_name
from ...common.settings import Settings, bounded
from ...critics.ipm import REGULARIZERS, Objective
from ...critics.networks import BANDWIDTHS, BaselineKind
from ..samplers.gaussian import Reduction
from ..settings import AgentSettings, ExecutionSettings, OptimizerSettings, RateSchedule

Buffer = Literal["float32", "float16", "cpu", "cpu-float16"]
CriticNetwork = Literal["own", "denoiser"]


@dataclass(frozen=True)
class CriticSettings(Settings):
    """The learned critic f, where no reward is given."""

    objective: Objective = "ipm"
    """ipm is the mean gap between real and fake samples; logistic makes f the log-density ratio,
    which punishes samples where no real one lies."""
    regularizer: str = "baseline"
    """baseline is SFT-PG (B), gradient-penalty SFT-PG (GP); also r1, weight-clip, spectral-norm,
    none."""
    coefficient: float | None = None
    """Weight of the regulariser; by default the critic's own."""
    network: CriticNetwork = "own"
    """f's network: own is a small one of its own (see `make_critic`); denoiser looks at noised
    samples with a copy of the denoiser, see `NoisedCritic`."""
    levels: tuple[float, float] = (0.05, 1.5)
    """Least and greatest noise, sigma / alpha, at which a denoiser as critic looks at samples."""
    width: int | None = bounded(None, least=1)
    """Hidden width of f, or the channels of its first stage; see `make_critic`."""
    bandwidths: tuple[float, ...] = BANDWIDTHS
    """Of the Fourier features of f and V for vectors, in radians a unit: the largest says how fine
    a detail they see. See `FourierFeatures`."""
    learning_rate: float = bounded(1e-3, least=0)
    """Of f."""
    betas: tuple[float, float] = bounded((0.9, 0.999), least=0, below=1)
    """Adam's decays of the first and second moments, for f and V."""
    lr_schedule: RateSchedule = "constant"
    """Of f and V."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regularizer not in REGULARIZERS:
            raise unknown_name("regularizer", self.regularizer, REGULARIZERS)
        low, high = self.levels
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"critic levels must be two noise levels sigma / alpha, 0 < low < high, got "
                f"{low:g} and {high:g}."
            )


@dataclass(frozen=True)
class CriticAndBaselineSettings(CriticSettings):
    """The learned critic f, and the value baseline V."""

    baseline_learning_rate: float = bounded(1e-3, least=0)
    """Of V."""
    residual_baseline: bool = True
    """V(x_t, t) = f(x_t) + a learned residual; False learns V alone, as published."""
    scaled_baseline: bool = False
    """What V's network says counts in standard deviations of f: a V that theta follows must not be
    noise where f is nearly 0. See `IPMCritic`."""
    baseline_states: int = bounded(3, least=1)
    """Of the K states of a trajectory, how many V is trained on in a critic step."""
    baseline_network: BaselineKind = "mlp"
    """Of V on images: mlp is Fan & Lee's (2023); conv has a gradient that a policy can follow."""


@dataclass(frozen=True)
class PolicySettings(Settings):
    """The policy and its gradient."""

    learn_std: bool = False
    """Train the K standard deviations as well."""
    clip_range: float | None = bounded(None, above=0)
    """PPO's clip of the importance ratio at 1 +- clip_range; None, as published, has no ratio."""
    log_density: Reduction = "sum"
    """Over dimensions: sum, or mean (Fan & Lee 2023 on images)."""
    gae_lambda: float = bounded(0.9, least=0, most=1)
    """1 is f(x_0) - V(x_t, t); below 1 mixes in the differences of V along the trajectory
    (generalised advantage estimation, Schulman et al. 2016, with V(x_0) = f(x_0))."""
    normalize_advantage: bool = True
    """Divide the advantages by their standard deviation over the buffer."""
    noise_power: float = bounded(0.0, least=0)
    """Weight each step's gradient by its standard deviation to this power, relative to the other
    steps'. 0 is the policy gradient, in which steps of little noise drown the others, as their
    scores are of size 1 / std; 1 makes all steps' scores alike; 2 is the natural gradient in each
    step's mean (our extension)."""


@dataclass(frozen=True)
class LookSettings(Settings):
    """What the averaged sampler is judged by on the way, unless a reward is given; see `Looks`."""

    size: int = bounded(1000, least=2)
    """How many samples, against four times as many real ones, choose; as many more confirm."""
    looks: int = bounded(10, least=0)
    """How often the averaged sampler is looked at; 0 returns the last one whatever it is, and so
    does a training in which theta moves for fewer rounds."""


@dataclass(frozen=True)
class RolloutExecutionSettings(ExecutionSettings):
    """How the networks are run, and where the trajectories lie."""

    buffer: Buffer = "float32"
    """Where trajectories are kept: beside the networks as float32 or float16, or on the cpu
    (cpu-float16). Half precision rounds each state by up to 2.4e-4 of its size, which a last
    standard deviation of 0.001 hardly notices."""


def _optimizer() -> OptimizerSettings:
    return OptimizerSettings(learning_rate=3e-4, betas=(0.5, 0.999), lr_schedule="linear", ema=0.95)


@dataclass(frozen=True)
class ShortcutSettings(AgentSettings):
    """A round of shortcut fine-tuning. The solver must be one-step, with noise in every step."""

    rounds: int = bounded(400, least=1)
    """Rounds of training."""
    batch_size: int = bounded(256, least=1)
    """Trajectories a critic step."""
    n_critic: int = bounded(5, least=1)
    """Batches of trajectories a round, on each of which the critic takes a step."""
    critic_passes: int = bounded(1, least=1)
    """Critic steps for each of these batches, against other real samples each time."""
    critic_replay: int = bounded(0, least=0)
    """Passes after the first take their fakes from the last so many batches, see `Replay`; 0 takes
    the round's own again."""
    n_generator: int = bounded(2, least=1)
    """Policy steps a round."""
    critic_rounds: int = bounded(0, least=0)
    """Rounds at the start in which the critic learns alone. What a raw critic prefers is chance,
    and with normalised advantages the policy would follow it."""
    warmup: int = bounded(20, least=0)
    """Rounds over which theta's learning rate rises to its own."""
    even: bool = False
    """Leave less to chance: spread the noise of each batch of trajectories evenly (`even_normal`),
    and take real samples in passes without replacement. Where samples are nearly right, what f sees
    of them is mostly the chance of a batch."""
    held_out: LookSettings = field(default_factory=LookSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_replay and self.critic_passes == 1:
            raise ValueError(
                "critic_replay is for the critic's passes after the first: take critic_passes of 2 "
                "or more with it."
            )


@dataclass(frozen=True)
class SFTPGSettings(ShortcutSettings):
    """Settings of `SFTPG`."""

    minibatch_size: int | None = bounded(None, least=1)
    """Transitions a policy step; by default 10 * batch_size, whatever K, so that memory does not
    grow with K, or the buffer's share where that is less."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    optimizer: OptimizerSettings = field(default_factory=_optimizer)
    critic: CriticAndBaselineSettings = field(default_factory=CriticAndBaselineSettings)
    execution: RolloutExecutionSettings = field(default_factory=RolloutExecutionSettings)


@dataclass(frozen=True)
class StdSettings(Settings):
    """The policy."""

    learn_std: bool = False
    """Train the K standard deviations as well."""


@dataclass(frozen=True)
class SFTVSettings(ShortcutSettings):
    """Settings of `SFTV`; with another micro_batch_size theta's steps draw other noise."""

    batch_size: int = bounded(512, least=1)
    """Trajectories a critic step, and a step of theta, which looks at their K states."""
    n_critic: int = bounded(4, least=1)
    """Critic steps a round."""
    policy: StdSettings = field(default_factory=StdSettings)
    optimizer: OptimizerSettings = field(
        # The gradient's norm is some 0.02; where V leaps, it is 1, and theta must not follow.
        default_factory=lambda: replace(_optimizer(), ema=0.97, max_grad_norm=0.1)
    )
    critic: CriticAndBaselineSettings = field(
        default_factory=lambda: CriticAndBaselineSettings(
            objective="logistic",
            regularizer="r1",
            bandwidths=(6.0, 25.0),
            betas=(0.5, 0.99),
            baseline_network="conv",
        )
    )
    execution: RolloutExecutionSettings = field(default_factory=RolloutExecutionSettings)


@dataclass(frozen=True)
class PathwisePolicySettings(StdSettings):
    """The policy and its gradient through the chain."""

    gradient_checkpointing: bool = False
    """Recompute each step's activations in the backward pass: memory for one network evaluation
    instead of K, for the price of one more forward pass."""
    non_saturating: bool = False
    """Climb log s(f), the log-probability that a logistic critic takes the sample for a real one,
    instead of f: samples that pass already are left alone (Goodfellow et al. 2014). A reward of
    one's own is climbed as it is."""
    gradient_steps: int | None = bounded(None, least=1)
    """How many last steps the gradient goes through, or all if there are fewer, each time from
    states of the round's trajectories; None is all K, from new ones. Fewer cost less time and
    memory, and teach the early steps nothing (DRaFT-K, Clark et al. 2024)."""


@dataclass(frozen=True)
class SFTSettings(ShortcutSettings):
    """Settings of `SFT`; micro_batch_size bounds only the critic's rollouts."""

    table: str | None = None
    """File of a finished table, such as the tableau.json of a run of solver learning, that samples
    instead of the solver; its times replace the environment's."""
    n_generator: int = bounded(1, least=1)
    """Steps of theta a round."""
    mismatched: float = bounded(0.0, least=0, below=1)
    """Share of the critic's fakes that are real samples under the conditions of others, in a
    conditional environment: a critic that is shown none hardly asks whether a sample is what was
    asked for."""
    policy: PathwisePolicySettings = field(default_factory=PathwisePolicySettings)
    optimizer: OptimizerSettings = field(default_factory=_optimizer)
    critic: CriticSettings = field(
        default_factory=lambda: CriticSettings(regularizer="gradient-penalty")
    )
    execution: RolloutExecutionSettings = field(default_factory=RolloutExecutionSettings)
