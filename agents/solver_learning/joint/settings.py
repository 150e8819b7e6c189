"""Settings of solver learning: what is learned, what is minimised, and how it is descended."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from ....common.settings import Settings, bounded
from ...policy_gradient.settings import CriticSettings
from ...settings import AgentSettings
from ...solvers import Options
from ..scheduling.levels import Space

Form = Literal["steps", "noise"]
Coefficients = Literal["added", "free", "shares"]
Distance = Literal["l2", "huber", "mmd", "kid"]
Compared = Literal["samples", "features"]
Optimizer = Literal["lbfgs", "adam"]
Start = Literal["given", "distilled", "programme", "gits", "ays", "dmn", "search"]

# Starts that have times of their own.
MOVING = ("programme", "gits", "ays", "dmn", "search")

# Distances between distributions, which compare with data instead of the teacher.
OF_DATA = ("mmd", "kid")


@dataclass(frozen=True)
class LearnSettings(Settings):
    """What is learned; at least one of the four."""

    times: bool = True
    """The noise levels of the states, but for the first and the last one."""
    factors: bool = True
    """p, the factor of the state in each step."""
    weights: bool = True
    """W, the weights of all outputs so far in each step."""
    shifts: bool = True
    """xi, by how much the level that the network is told differs from the state's, in its
    logarithm; the first call is told its own."""
    form: Form = "steps"
    """steps goes on from the base solver's own states; noise writes every state in terms of the
    initial noise and the outputs, as BNS does."""
    coefficients: Coefficients = "added"
    """added: p and W are the base solver's at the times as they are, plus what is learned (GS);
    free: those at the given times, plus what is learned (BNS); shares: the sum of the base
    solver's weights at the times as they are, times numbers that are free, at first each output's
    share of it (S4S, DyWeight)."""
    space: Space = "rho"
    """The scale on which levels are parameters, as in schedule learning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.times or self.factors or self.weights or self.shifts):
            raise ValueError(
                "Nothing is left to learn: switch on one of learn.times, learn.factors, "
                "learn.weights and learn.shifts."
            )
        if self.coefficients != "added" and not self.weights:
            raise ValueError(
                f"learn.coefficients='{self.coefficients}' is about weights that are learned: it "
                "needs learn.weights."
            )


@dataclass(frozen=True)
class LossSettings(Settings):
    """What is minimised, at the end of the chain only."""

    distance: Distance = "l2"
    """l2 and huber compare each finished sample with the teacher's from the same noise: its mean
    square of a coordinate, or sqrt(that + huber_width^2) - huber_width. mmd (energy kernel) and kid
    (the kernel (a.b / d + 1)^3) compare the distribution of the finished samples with real ones,
    without a bias from pairs of equal samples; under conditions that of samples together with
    them."""
    compared: Compared = "samples"
    """What is compared: the samples, or what a feature extractor makes of them."""
    huber_width: float = bounded(0.03, above=0)
    """Below this root mean square the pseudo-Huber distance is quadratic, above it linear."""
    real_samples: int = bounded(1000, least=2)
    """Of mmd and kid: real samples to learn from, and as many others to choose by."""
    adversarial: float = bounded(0.0, least=0)
    """Weight of a learned critic's mean value of the finished samples, which is to rise: it tells
    them from the teacher's (GAS). 0 has none."""
    ball: float = bounded(0.0, least=0)
    """Radius of the ball around each unit noise in which a noise that fits better may stand for it
    (LD3's soft teacher forcing), as a share of its expected length; 0 has none."""
    ball_rate: float = bounded(1.0, above=0)
    """Step of the noise in its ball."""


@dataclass(frozen=True)
class DescentSettings(Settings):
    """How it is descended."""

    optimizer: Optimizer = "lbfgs"
    """lbfgs takes up to ten quasi-Newton steps with a line search a round, on all batches; adam one
    step on one batch."""
    rounds: int = bounded(20, least=1)
    """Rounds; 10 to 50 of lbfgs, 200 to 10,000 of adam."""
    times_rate: float = bounded(0.03, above=0)
    """Of adam on the levels' parameters, warmed up and then falling on a cosine."""
    coefficients_rate: float = bounded(3e-3, above=0)
    """Of adam on p and W, in units of the base solver's largest one in the row."""
    shifts_rate: float = bounded(3e-3, above=0)
    """Of adam on xi."""
    alternate: int = bounded(0, least=0)
    """Rounds on the times and shifts, then as many on p and W, by turns; 0 learns all together."""
    ema: float = bounded(0.0, least=0, below=1)
    """Decay of adam's average of what is learned, which samples; shorter at first, when there is
    little to average. 0 takes what is learned as it is."""
    check_interval: int = bounded(10, least=1)
    """Rounds of adam between two looks at held-out noise; lbfgs looks every round."""


def _critic() -> CriticSettings:
    return CriticSettings(
        objective="logistic", regularizer="r1", learning_rate=1e-4, betas=(0.5, 0.99)
    )


@dataclass(frozen=True)
class SolverLearningSettings(AgentSettings):
    """Settings of `SolverLearning`."""

    solver: str = "dpm-solver++-3m"
    """The base solver, any deterministic one."""
    start: Start | None = None
    """given: the base solver on the environment's schedule; distilled: with the weights of D-ODE's
    closed form, all outputs free; programme: also the times of a dynamic programme (trajectory-dp
    of schedule learning), or instead those of gits, ays or dmn; search: those of programme, and a
    dozen grids, even on several scales. All that move the times have distilled weights, too, where
    weights are learned. None takes the last that what is learned allows. Whatever it is, the
    descent starts from the best of them, or the given solver."""
    teacher: str = "heun"
    """The teacher's solver."""
    teacher_options: Options | None = None
    """Options of the teacher's solver."""
    scale: int = bounded(20, least=1)
    """The teacher's steps for each call of the student; 10 to 50. With 10 on even times the teacher
    erred as much as the learned solver on the digits."""
    check_teacher: bool = True
    """Warn if the teacher is no better than the base solver."""
    batch_size: int = bounded(250, least=2)
    """Noises a batch."""
    batches: int = bounded(4, least=1)
    """How many batches are learned on; as many more are held out to choose by, and one more to
    report."""
    learn: LearnSettings = field(default_factory=LearnSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    descent: DescentSettings = field(default_factory=DescentSettings)
    critic: CriticSettings = field(default_factory=_critic)

    def __post_init__(self) -> None:
        super().__post_init__()
        learn, loss, descent = self.learn, self.loss, self.descent
        if self.starting == "distilled" and not learn.weights:
            raise ValueError(
                f"start='{self.starting}' is a change of the weights: it needs learn.weights; take "
                "start='given' or 'search'."
            )
        if self.starting in MOVING and not learn.times:
            raise ValueError(f"start='{self.starting}' moves the times: it needs learn.times.")
        if loss.ball and loss.distance in OF_DATA:
            raise ValueError(
                f"loss.ball forces a teacher's samples softly; loss.distance='{loss.distance}' has "
                "no use for it."
            )
        if loss.adversarial and self.batches < 2:
            raise ValueError(
                "loss.adversarial compares with the teacher's samples from the noise of another "
                f"batch: batches must be at least 2, got {self.batches}."
            )
        moving = {"loss.adversarial": loss.adversarial, "loss.ball": loss.ball}
        for name, used in moving.items():
            if used and descent.optimizer == "lbfgs":
                raise ValueError(
                    f"descent.optimizer='lbfgs' descends a loss that stays the same: {name} needs "
                    "'adam'."
                )
        if descent.optimizer == "lbfgs":
            defaults = DescentSettings()
            for name in ("times_rate", "coefficients_rate", "shifts_rate"):
                if getattr(descent, name) != getattr(defaults, name):
                    warnings.warn(
                        f"descent.{name} is adam's: descent.optimizer='lbfgs' does not read it.",
                        stacklevel=4,
                    )
        if descent.ema and descent.optimizer == "lbfgs":
            raise ValueError("descent.ema averages the steps of descent.optimizer='adam'.")
        if descent.alternate and not (
            (learn.times or learn.shifts) and (learn.factors or learn.weights)
        ):
            raise ValueError(
                "descent.alternate takes turns between times and weights: it needs both, one of "
                "learn.times and learn.shifts, and one of learn.factors and learn.weights."
            )

    @property
    def starting(self) -> Start:
        """Where the descent starts."""
        if self.start is not None:
            return self.start
        if self.learn.times:
            return "search"
        return "distilled" if self.learn.weights else "given"

    def check_without_data(self) -> None:
        """Raise ValueError for what needs real samples, in an environment that has none."""
        if self.loss.distance in OF_DATA:
            raise ValueError(
                f"loss.distance='{self.loss.distance}' needs real samples, and there are none here."
            )
