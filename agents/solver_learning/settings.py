"""Settings of the solver agents: D-ODE's, and schedule learning's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ...common.names import unknown_name
from ...common.settings import Settings, bounded
from ..settings import AgentSettings
from ..solvers import Options
from .distillation.forms import Form
from .distillation.teacher import Align
from .scheduling.levels import EVEN, Space
from .scheduling.paper.surrogate import Input, Reading, Residual
from .scheduling.starts import DMN, ENVIRONMENT, Programme

Refine = Literal["none", "end-to-end"]
LevelTarget = Literal["teacher", "data"]
Gradient = Literal["exact", "eq14", "none"]
TuningWeights = Literal["rollout", "lambda", "original"]
STARTS: tuple[str, ...] = (*get_args(Programme), *EVEN, DMN, ENVIRONMENT)


@dataclass(frozen=True)
class DODESettings(AgentSettings):
    """Settings of `DODE`."""

    solver: str = "ddim"
    """The base solver, any deterministic one."""
    form: Form = "difference"
    """What a step may mix in: difference is the paper's; two, sep, all, general, fixed and
    lookahead are its alternatives."""
    teacher: str = "dpm-solver-3m"
    """The teacher's solver. The paper takes the student's own or ddim. One of high order is far
    closer to the solution for the same calls if the network is smooth in time; where it is rough,
    ddim can be closer."""
    teacher_options: Options | None = None
    """Options of the teacher's solver."""
    scale: int = bounded(10, least=1)
    """The teacher's steps for each call of the student; 5 to 30."""
    teacher_times: tuple[float, ...] | None = None
    """Times that the teacher visits, in place of scale, the nearest moved onto the student's; for
    students whose times are very uneven."""
    align: Align = "time"
    """time compares states at the same noise level; index compares them as the official code does,
    for reproduction."""
    integer_times: bool = False
    """Round the teacher's times to whole noisings, for networks that know no others."""
    batch_size: int = bounded(100, least=1)
    """Noises a batch; 50 to 1000."""
    batches: int | None = bounded(None, least=1)
    """How many batches the fit sums over, exactly as if they were one; None takes 1 for samples of
    a thousand numbers and up to 10 for smaller ones, which tell less. A quarter more, for the
    refinement as many more, is held out to choose the table, and another quarter to report its
    error."""
    ridge: float = bounded(1e-4, least=0)
    """Pulls the parameters to 0, as a share of each step's squared error: |lambda| stays below
    1 / (2 sqrt(ridge)). Where two outputs are nearly the same (D-EDM's first steps) plain least
    squares, 0, finds values of hundreds that fit the batch and nothing else; 0 to 1e-2."""
    refine: Refine = "none"
    """end-to-end goes on from the fit by L-BFGS on all weights, against the error of the finished
    sample."""
    refine_steps: int = bounded(20, least=1)
    """Rounds of the refinement, of up to ten L-BFGS steps each; 5 to 50."""
    check_teacher: bool = True
    """Warn if the teacher is no better than the base solver, which costs up to four times the
    teacher's calls on one batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align == "index" and self.teacher_times is not None:
            raise ValueError(
                "align='index' takes its teacher's times from the student's schedule: give no "
                "teacher_times, or take align='time'."
            )


@dataclass(frozen=True)
class PaperSettings(Settings):
    """What only reproduces the readings of Huang (2024)."""

    residual: Residual = "rollout"
    """Of gradient eq14: rollout, one-shot or convex; the latter two need target data."""
    network_input: Input = "moving"
    """Of gradient eq14: moving, rollout or noised; the latter needs target data."""
    weight_term: bool = False
    """Of gradient eq14: add the change of Euler's weights."""
    gamma: float = bounded(1.0, least=0)
    """Weight of the rollout's error beside L_diff."""
    diffusion_weight: float | None = bounded(None, least=0)
    """Weight of L_diff, which needs data; None takes 1 for target data and 0 for teacher, which it
    does not help."""
    collapse: float = bounded(0.7, least=0)
    """With target data stage one ends, and goes back, when the samples' variance falls below this
    share of what it was; 0 never does."""
    last_weight: float = bounded(1.0, least=0)
    """Of tuning.weights lambda: weight of the smallest level, of which there is no lambda."""


@dataclass(frozen=True)
class TuningSettings(Settings):
    """Stage two: the denoiser, tuned on the learned levels."""

    rounds: int = bounded(300, least=0)
    """Updates of the denoiser a stage; 0 leaves it as it is."""
    batch_size: int = bounded(256, least=1)
    """Real samples, or rollouts, an update."""
    learning_rate: float = bounded(3e-4, above=0)
    """Of Adam on the denoiser; 1e-5 to 1e-3."""
    weights: TuningWeights | None = None
    """What stage two minimises: rollout, the distance of finished samples from the teacher's,
    through the whole chain; on real samples at the schedule's levels lambda, the paper's L_diff, or
    original, the loss of pretraining. None takes rollout for target teacher and lambda for data."""
    max_grad_norm: float | None = bounded(1.0, above=0)
    """The denoiser's gradient is clipped here; None does not clip."""
    ema: float = bounded(0.99, least=0, below=1)
    """Decay of the average of the denoiser's weights; the averaged weights sample."""


@dataclass(frozen=True)
class ScheduleSettings(AgentSettings):
    """Settings of `ScheduleLearning`."""

    solver: str = "euler"
    """The solver whose schedule is learned, any deterministic one; euler is the paper's."""
    start: str = "trajectory-dp"
    """Where the levels start: what a dynamic programme finds, unless the environment's own schedule
    errs less, trajectory-dp for the least errors of jumps between a teacher's states, which spares
    the gradient many a poor local optimum, diffusion-dp for the least L_diff of the paper, gits for
    the least deviation of jumps from the trajectories' chords, or ays for the least bound of Align
    Your Steps; dmn, the times at which a multistep solver magnifies errors least; karras, the
    paper's, or another name of a schedule, between the environment's ends; or environment, its
    own."""
    space: Space = "rho"
    """The scale on which levels are parameters: rho (level^(1/7), Karras's), log or sigma (the
    paper's, badly scaled)."""
    target: LevelTarget = "teacher"
    """What a rollout should end at: teacher, where a fine solver ends from the same noise; data,
    the paper's: the sample whose noising it started from. The optimum of the latter is a sampler
    that returns the mean of the data; training stops on the way there, see collapse."""
    gradient: Gradient = "exact"
    """exact, in memory independent of the number of steps; eq14, the paper's estimate, for Euler's
    steps only; none stops at start."""
    teacher: str = "heun"
    """The teacher's solver."""
    teacher_options: Options | None = None
    """Options of the teacher's solver."""
    scale: int = bounded(10, least=1)
    """The teacher's steps for each step of the sampler; 5 to 30."""
    integer_times: bool = False
    """For networks that know whole noisings only: round the times of the teacher and of the dynamic
    programmes' grid; needs gradient none."""
    check_teacher: bool = True
    """Warn if the teacher is no better than the sampler at the start."""
    schedule_rounds: int = bounded(150, least=0)
    """Updates of the levels a stage; 50 to 500."""
    schedule_learning_rate: float | None = bounded(None, above=0)
    """Of Adam on the levels' parameters, warmed up and then falling on a cosine; None takes 0.3 for
    the exact gradient and 0.1 for eq14, whose large steps do not descend."""
    batch_size: int = bounded(500, least=2)
    """Rollouts an update; 100 to 1000."""
    batches: int = bounded(2, least=1)
    """How many such batches are taken by turns; as many more are held out to choose what is
    returned, and one more to report its error."""
    alternations: int = bounded(1, least=1)
    """How often the two stages are done at most."""
    tolerance: float = bounded(0.05, least=0)
    """They end before if stage one moved no level by this share."""
    tuning: TuningSettings = field(default_factory=TuningSettings)
    paper: PaperSettings = field(default_factory=PaperSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise unknown_name("start", self.start, STARTS)
        if not (self.schedule_rounds or self.gradient == "none" or self.tuning.rounds):
            raise ValueError("There is nothing to do: schedule_rounds and tuning.rounds are 0.")
        if self.tuning_weights == "rollout" and self.target != "teacher":
            raise ValueError("tuning.weights='rollout' needs target='teacher'.")
        if self.integer_times and (self.gradient != "none" or self.start in (*EVEN, DMN)):
            raise ValueError(
                "integer_times leaves nothing to differentiate: take gradient='none', and start "
                "from a dynamic programme or the environment's schedule."
            )
        if self.gradient == "eq14":
            self._check_eq14()

    def _check_eq14(self) -> None:
        if self.solver not in ("euler", "ddim"):
            raise ValueError(
                f"gradient='eq14' is derived for Euler's steps: take solver='euler' or 'ddim' "
                f"instead of '{self.solver}', or gradient='exact'."
            )
        if self.reading.needs_data and self.target != "data":
            raise ValueError(
                f"residual='{self.paper.residual}' with network_input='{self.paper.network_input}' "
                "compares with real samples: it needs target='data'."
            )

    @property
    def tuning_weights(self) -> TuningWeights:
        """What stage two minimises."""
        default: Any = "rollout" if self.target == "teacher" else "lambda"
        return self.tuning.weights or default

    @property
    def level_rounds(self) -> int:
        """Updates of the levels a stage; a schedule that stays where it starts is one round."""
        return 1 if self.gradient == "none" else self.schedule_rounds

    @property
    def level_rate(self) -> float:
        """Adam's learning rate on the levels' parameters."""
        return self.schedule_learning_rate or (0.1 if self.gradient == "eq14" else 0.3)

    @property
    def diffusion_share(self) -> float:
        """Weight of the paper's L_diff in stage one."""
        if self.paper.diffusion_weight is not None:
            return self.paper.diffusion_weight
        return 1.0 if self.target == "data" else 0.0

    @property
    def reading(self) -> Reading:
        """How Eq. 14 is read."""
        return Reading(self.paper.residual, self.paper.network_input, self.paper.weight_term)

    def check_without_data(self) -> None:
        """Raise ValueError for what needs real samples, in an environment that has none."""
        weights = self.tuning_weights
        users = {
            f"tuning.weights='{weights}'": weights != "rollout" and self.tuning.rounds,
            "target='data'": self.target == "data",
            "diffusion_weight": self.paper.diffusion_weight,
            "start='diffusion-dp'": self.start == "diffusion-dp",
        }
        for what, used in users.items():
            if used:
                raise ValueError(f"{what} needs real samples, and there are none here.")
