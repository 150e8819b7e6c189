"""The studies of few-step DDPM samplers: declared, not scripted.

In a study every sampler draws from one denoiser trained with many noisings, as in paper A's
Table 3: fast samplers as they are, a distilled solver, and SFT-PG, which fine-tunes the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FastSampler:
    """One way to sample from the shared denoiser.

    Attributes:
        label: its name in the table and the plot.
        solver: key of `SOLVERS`.
        options: of the solver.
        schedule: name of the schedule.
        schedule_options: its options.
        variance: the kind of `VarianceLearning` that it needs first: "gamma", "sn" or "npr".
        agent: what is learned on top: "dode" or "sft-pg"; None samples as it is.
        settings: hyper-parameters of the agent that differ from the preset's.
        steps: numbers of steps, if not the study's.
    """

    label: str
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "uniform"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    variance: str | None = None
    agent: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SamplerStudy:
    """A comparison of samplers of one denoiser.

    Attributes:
        title: what it asks.
        environment: where.
        process: noise process of the denoiser.
        samplers: who.
        budgets: network calls a sample.
        seeds: training seeds.
        yardstick: label of the sampler that the others are to beat.
    """

    title: str
    environment: str
    process: str
    samplers: tuple[FastSampler, ...]
    budgets: tuple[int, ...] = (10, 5)
    seeds: tuple[int, ...] = (0, 1, 2)
    yardstick: str = "DDPM, every noising"


# Evenly spaced with both ends, as Analytic-DPM's and FastDPM's papers have it: 1000, ..., 1, 0.
_EVEN: dict[str, Any] = {"schedule": "linspace"}
_VAR: dict[str, Any] = {"schedule": "fast_dpm", "schedule_options": {"spacing": "quadratic"}}
_STEP: dict[str, Any] = {
    "schedule": "fast_dpm",
    "schedule_options": {"kind": "step", "spacing": "quadratic"},
}
_T_MIN: dict[str, Any] = {"schedule_options": {"end": 1.0}}

SAMPLER_STUDIES: dict[str, SamplerStudy] = {
    "samplers": SamplerStudy(
        title="Few-step samplers of one DDPM on the digits (the shape of paper A's Table 3)",
        environment="Digits",
        process="linear-1000",
        samplers=(
            FastSampler("DDPM, every noising", "ancestral", steps=(1000,)),
            FastSampler("DDPM, sub-sampled", "ancestral", **_EVEN),
            FastSampler("DDPM, sub-sampled, clipped", "ancestral", {"clip": True}, **_EVEN),
            FastSampler("FastDPM (STEP)", "fast-dpm", **_STEP),
            FastSampler("FastDPM (VAR)", "fast-dpm", **_VAR),
            FastSampler("Analytic-DPM", "analytic-dpm", variance="gamma", **_EVEN),
            FastSampler("NPR-DDPM", "npr-ddpm", variance="npr", **_EVEN),
            FastSampler("SN-DDPM", "sn-ddpm", variance="sn", **_EVEN),
            FastSampler("DDIM", "ddim", **_EVEN),
            FastSampler("DPM-Solver-3", "dpm-solver-3", **_T_MIN),
            FastSampler("DPM-Solver++ (2M)", "dpm-solver++-2m", **_T_MIN),
            FastSampler("D-DDIM", "ddim", agent="dode", **_EVEN),
            FastSampler("SFT-PG (B)", "fast-dpm", {"last_std": 0.05}, agent="sft-pg", **_VAR),
        ),
    ),
}
