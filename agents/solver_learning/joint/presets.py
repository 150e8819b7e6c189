"""The published solver learners as settings of ours, and the times alone: what each switches on.

They are presets of `fewstep train --agent solver --preset NAME`, and of
`SolverLearning.for_environment(env, denoiser, preset=NAME)`. What they say is which numbers are
free, in which form, and against which distance; where a paper compares in the features of LPIPS or
Inception, `loss.compared="features"` does so with the features that there are. The start, batches
and rounds are ours, for minutes on a CPU; `start="given"` is the papers'.
"""

from __future__ import annotations

from typing import Any

_ADAM: dict[str, Any] = {"optimizer": "adam", "rounds": 400}
_GS: dict[str, Any] = {
    "solver": "dpm-solver++-3m",
    **_ADAM,
    "times_rate": 0.1,
    "coefficients_rate": 0.01,
    "shifts_rate": 0.01,
    "ema": 0.999,
}
# LD3's ball; S4S descends the same soft loss.
_BALL: dict[str, Any] = {"ball": 0.05}
_S4S: dict[str, Any] = {
    **_ADAM,
    **_BALL,
    "solver": "dpm-solver++-3m",
    "learn_factors": False,
    "coefficients": "shares",
}

SOLVER_PRESETS: dict[str, dict[str, Any]] = {
    # Generalised solver: everything, added to DPM-Solver++ 3M at the learned times.
    "gs": _GS,
    # Its adversarial version, with our critic in the place of the paper's; both distances are
    # in units of the samples, where a weight of 0.1 has the paper's meaning.
    "gas": {**_GS, "distance": "huber", "adversarial": 0.1},
    # Tong et al. 2025: the times, and those that the network is told.
    "ld3": {
        **_ADAM,
        **_BALL,
        "solver": "unipc-2",
        "learn_factors": False,
        "learn_weights": False,
    },
    # Shaul et al. 2024: every state from the initial noise, all numbers and times free.
    "bns": {
        **_ADAM,
        "solver": "euler",
        "learn_shifts": False,
        "form": "noise",
        "coefficients": "free",
    },
    # Frankel et al. 2025: shares of each exponential step, and the times that the network is told.
    "s4s": {**_S4S, "learn_times": False},
    # S4S-Alt: by turns with the times themselves.
    "s4s-alt": {**_S4S, "alternate": 20},
    # Watson et al. 2022: all numbers of a sampler, by the kernel distance to data, of images with
    # labels in features (see `fewstep.agents.presets`); without noise.
    "ddss": {
        **_ADAM,
        "solver": "ddim",
        "learn_shifts": False,
        "coefficients": "free",
        "distance": "kid",
    },
    # Free sums of iPNDM's weights, and the times that the network is told.
    "dyweight": {
        **_ADAM,
        "solver": "ipndm",
        "learn_times": False,
        "learn_factors": False,
        "coefficients": "shares",
    },
    # Huang 2024, schedule learning's stage one: the times of Euler's steps. As `ScheduleLearning`
    # does it by default: towards the teacher's samples, from the programme's times.
    "stage-one": {
        "optimizer": "adam",
        "rounds": 150,
        "times_rate": 0.3,
        "solver": "euler",
        "start": "programme",
        "learn_factors": False,
        "learn_weights": False,
        "learn_shifts": False,
    },
    # Ours: the schedule alone, of any solver, by L-BFGS from the best of all starts.
    "times": {"learn_factors": False, "learn_weights": False, "learn_shifts": False},
}
