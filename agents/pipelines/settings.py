"""Settings of learning a scheduler for a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...common.settings import Settings, bounded
from ..solver_learning.distillation.forms import Form
from ..solvers import Options

Learn = Literal["weights", "times", "both"]


@dataclass(frozen=True)
class DistilSettings(Settings):
    """What is learned, for which sampler, and from how much."""

    steps: int = bounded(8, least=3)
    """Steps of the sampler; network calls, too, unless the solver takes two a step."""
    guidance: float | None = bounded(None, least=0)
    """Strength of the guidance that it is learned for; what the pipeline takes if omitted."""
    learn: Learn = "both"
    """times learns which noise levels are visited, weights what each step makes of the network's
    answers so far; both does the one and then the other."""
    solver: str = "dpm-solver++-2m"
    """Solver that it starts from, any deterministic one."""
    solver_options: Options | None = None
    """Options of the solver, as KEY VALUE pairs."""
    schedule: str | None = None
    """Times to start from: a schedule's name, a list, or own, those of the pipeline's scheduler. If
    omitted the solver's default, or where times are learned karras, whose ends stay."""
    form: Form = "difference"
    """What a step may mix in, see D-ODE."""
    teacher: str = "dpm-solver++-3m"
    """The fine solver whose results are the goal."""
    scale: int = bounded(10, least=1)
    """The teacher's steps for each step of the sampler; 5 to 30."""
    samples: int = bounded(32, least=4)
    """Noises to learn from; 16 to 200. As many more choose between levels, and a quarter more
    between weights."""
    rounds: int = bounded(40, least=1)
    """Updates of the times; 20 to 150."""
    held_out_samples: int = bounded(16, least=2)
    """Noises, under held-out prompts, of the reported errors and of the pictures."""
    check_teacher: bool = False
    """Measure the teacher against a finer one, too; that costs more than all the learning from a
    few samples."""
    micro_batch: int = bounded(4, least=1)
    """Most samples that a network call holds, halves of guided ones among them."""
    seed: int = bounded(0, least=0, most=2**32 - 2)
    """Seed of all noise."""
