"""Measurements of speed and memory: `fewstep benchmark overhead`, `profile`, `memory`, ..."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .gradient_noise import gradient_noise
from .guided import guided_sampling
from .memory import gradient_memory, memory
from .rollout import rollout_speed
from .sampling import sampling
from .training import fitting, overhead, profile


@dataclass(frozen=True)
class Measurement:
    """A measurement: its title and the function device -> (figures, Markdown table)."""

    title: str
    measure: Callable[[str], tuple[dict[str, Any], str]]


MEASUREMENTS: dict[str, Measurement] = {
    "overhead": Measurement("What stepping the vector environment adds to network calls", overhead),
    "profile": Measurement("Where an SFT-PG round spends its time", profile),
    "fitting": Measurement("What a D-ODE fit costs beside its teacher's calls", fitting),
    "rollout": Measurement("SFT-PG's rollout on a U-Net against a bare loop", rollout_speed),
    "sampling": Measurement("Our sampling loop, a bare loop and diffusers' schedulers", sampling),
    "gradient-noise": Measurement(
        "How noisy the gradients of SFT-PG, SFT-V and SFT are", gradient_noise
    ),
    "guided-sampling": Measurement("What guidance costs beside its network calls", guided_sampling),
    "memory": Measurement("Peak memory of a round at K = 10 and 100", memory),
    "gradient-memory": Measurement(
        "Peak memory of a schedule's gradient at K = 10 and 100", gradient_memory
    ),
}
