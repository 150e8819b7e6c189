"""How far samplers end from a fine solver, on held-out noise under held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...envs import Schedule
from ..denoisers.denoiser import Denoiser
from ..samplers.sampling import evaluations_of
from ..samplers.tableau import Tableau
from ..selection import coordinate_errors
from ..solver_learning.distillation.teacher import make_teacher
from .own import own_samples
from .prompts import Prompts
from .settings import DistilSettings

OWN, BEFORE, AFTER, TEACHER = "own scheduler", "before", "after", "teacher"


@dataclass
class Judgement:
    """What samplers made of the same noise.

    Attributes:
        samples: name -> finished samples (M, *shape), on the CPU; the teacher's are the goal.
        calls: name -> network evaluations of a sample, two for each guided answer.
        errors: name -> (M,) mean squared error per coordinate to the teacher's finished samples.
        by_step: name -> times and mean squared errors to the fine solver's states there.
    """

    samples: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    by_step: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return for each sampler its evaluations, error, standard error and relative error."""
        spread = float(self.samples[TEACHER].double().var())
        return {
            name: {
                "evaluations": self.calls[name],
                "error": float(errors.mean()),
                "standard_error": float(errors.std()) / math.sqrt(len(errors)),
                "relative_error": float(errors.mean()) / spread if spread > 0 else None,
            }
            for name, errors in self.errors.items()
        }


@torch.no_grad()
def judge(
    denoiser: Denoiser,
    given: Schedule,
    tables: Mapping[str, Tableau],
    prompts: Prompts | None,
    settings: DistilSettings,
) -> Judgement:
    """Compare tables, and the pipeline's own scheduler, with a fine solver.

    The fine solver takes the teacher's steps on the times that learning started from. All start
    from the same noise, under prompts that nothing was learned from.

    Args:
        denoiser: of the pipeline; it waits for prompts.
        given: the times that learning started from.
        tables: name -> table; the first one is the base solver's.
        prompts: those of the denoiser.
        settings: how many noises, and which teacher.
    """
    device = next(denoiser.parameters()).device
    count = settings.held_out_samples
    assert denoiser.shape is not None
    # Noise that no stage has seen: they draw from generators of their own seeds.
    generator = torch.Generator(device).manual_seed(settings.seed + 2**31)
    noise = torch.randn(count, *denoiser.shape, generator=generator, device=device)
    if prompts is not None:
        first, held_out = len(prompts.learned), len(prompts.held_out)
        numbers = first + torch.arange(count, device=device) % held_out
        denoiser = denoiser.under(numbers)
    found = Judgement()
    base = next(iter(tables.values()))
    teacher = make_teacher(base, given, settings.teacher, scale=settings.scale)
    start = noise * given.process.prior_std(float(given.times[0]))
    calls = evaluations_of(teacher.tableau, denoiser)
    _note(found, TEACHER, teacher.tableau.sample(denoiser, start), calls)
    for name, table in tables.items():
        fine = make_teacher(
            table, _schedule(table), settings.teacher, times=teacher.tableau.times.tolist()
        )
        begin = noise * table.process.prior_std(float(table.times[0]))
        goals = fine.states(denoiser, begin, "cpu")
        states = [state.cpu() for state in table.states(denoiser, begin)]
        ways = [
            float(coordinate_errors(s, g).mean()) for s, g in zip(states[1:], goals, strict=True)
        ]
        found.by_step[name] = table.times[1:].tolist(), ways
        _note(found, name, states[-1], evaluations_of(table, denoiser))
    samples, calls = own_samples(denoiser, noise, settings.steps, generator)
    per_call = max(denoiser.evaluations(float(t)) for t in given.times[:-1])
    _note(found, OWN, samples, calls * per_call)
    return found


def _note(found: Judgement, name: str, samples: Tensor, calls: int) -> None:
    found.samples[name], found.calls[name] = samples.cpu(), calls
    if name != TEACHER:
        found.errors[name] = coordinate_errors(found.samples[name], found.samples[TEACHER])


def _schedule(table: Tableau) -> Schedule:
    """Return the times that a table visits, each once."""
    return Schedule(table.process, sorted(set(table.times.tolist()), reverse=True))
