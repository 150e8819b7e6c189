"""The studies of solvers and their distillation that `fewstep benchmark` runs: declared.

A study is a grid of cells, environment x base solver x network calls x seed. In each cell the base
solver and its distilled versions (the treatments) sample from the same noise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

MIXTURE = "Mixture"


@dataclass(frozen=True)
class Variant:
    """A base solver in one parameterisation.

    Attributes:
        label: its name in the table.
        solver: key of `SOLVERS`.
        options: of the solver.
        edm: on a VE process with Karras's grid instead of a VP one with a uniform grid.
        schedule: name of another grid.
    """

    label: str
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    edm: bool = False
    schedule: str | None = None


@dataclass(frozen=True)
class SolverStudy:
    """A comparison of base solvers with distilled ones.

    Attributes:
        title: what it asks.
        variants: the base solvers.
        treatments: label -> settings of `DODE`.
        environments: where; "Mixture" has an exact denoiser, the others train one.
        budgets: network calls a sample.
        seeds: of the denoiser's training, the fit and the held-out noise.
    """

    title: str
    variants: tuple[Variant, ...]
    treatments: dict[str, dict[str, Any]] = field(default_factory=lambda: {"distilled": {}})
    environments: tuple[str, ...] = (MIXTURE, "SwissRoll", "Digits")
    budgets: tuple[int, ...] = (5, 10, 15)
    seeds: tuple[int, ...] = (0, 1, 2)


DDIM = Variant("DDIM", "ddim")
EDM_EULER = Variant("DDIM (EDM)", "euler", edm=True)
EDM_HEUN = Variant("EDM Heun", "heun", edm=True)
VARIANTS = (
    DDIM,
    Variant("iPNDM-4", "ipndm"),
    Variant("DEIS-3", "deis"),
    Variant("DPM-Solver-2", "dpm-solver-2"),
    Variant("DPM-Solver-3", "dpm-solver-3"),
    Variant("DDIM (data)", "euler"),
    Variant("DPM-Solver++ 2M", "dpm-solver++-2m"),
    Variant("DPM-Solver++ 2S", "dpm-solver++-2s"),
    Variant("DPM-Solver++ 3S", "dpm-solver++-3s"),
    EDM_EULER,
    EDM_HEUN,
)

SOLVER_STUDIES: dict[str, SolverStudy] = {
    "dode": SolverStudy("D-ODE solvers against their base solvers (paper C)", VARIANTS),
    "dode-align": SolverStudy(
        "Teacher and student compared at the same time, or by index as the official code does",
        (dataclasses.replace(DDIM, schedule="uniform_torch"), EDM_EULER, EDM_HEUN),
        {"time": {}, "index": {"align": "index", "teacher": "ddim"}},
    ),
    "dode-forms": SolverStudy(
        "What a step may mix in (paper C, Table 2 and section 13)",
        (DDIM, EDM_EULER),
        {
            "difference": {},
            "two": {"form": "two"},
            "sep": {"form": "sep"},
            "all": {"form": "all"},
            "general": {"form": "general"},
            "fixed": {"form": "fixed"},
            "lookahead": {"form": "lookahead"},
        },
    ),
    "dode-all": SolverStudy(
        "One parameter a call as in the paper, or free weights on all outputs so far",
        VARIANTS,
        {"difference": {}, "all": {"form": "all"}},
        budgets=(10,),
    ),
    "dode-refine": SolverStudy(
        "The plain fit of the paper, ours, and the same refined end to end",
        (
            DDIM,
            Variant("iPNDM-4", "ipndm"),
            Variant("DPM-Solver++ 2M", "dpm-solver++-2m"),
            EDM_HEUN,
        ),
        {
            "100 samples, no ridge": {"batches": 1, "ridge": 0.0},
            "greedy": {},
            "end-to-end": {"refine": "end-to-end", "refine_steps": 10},
        },
        budgets=(10,),
    ),
}
