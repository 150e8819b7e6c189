"""Studies of agents that train the network, and of few-step samplers of one network."""

from __future__ import annotations

from typing import Any

from .contenders import Contender, Grid
from .engine import Study
from .stages import Clone, Learn, Sample, Stage, fine_tune
from .world import Scoring

DDPM = Sample("ancestral")
# A denoiser that all contenders share, and one for every seed, as in the main job.
SHARED, OWN = Clone(seed=0), Clone()
SCORING = Scoring(own_noise=False)
COLUMNS = ("sliced_wasserstein", "sliced_wasserstein_fresh", "seconds")


def _tuned(label: str, clone: Clone, agent: str = "sft-pg", **settings: Any) -> Contender:
    return Contender(label, (clone, DDPM, fine_tune(agent, **settings)))


SFT_PG_B = _tuned("SFT-PG (B)", SHARED)

# Evenly spaced with both ends, as Analytic-DPM's and FastDPM's papers have it: 1000, ..., 1, 0.
EVEN: dict[str, Any] = {"schedule": "linspace"}
VAR: dict[str, Any] = {"schedule": "fast_dpm", "schedule_options": {"spacing": "quadratic"}}
STEP: dict[str, Any] = {
    "schedule": "fast_dpm",
    "schedule_options": {"kind": "step", "spacing": "quadratic"},
}
T_MIN: dict[str, Any] = {"schedule": "uniform", "schedule_options": {"end": 1.0}}
TEN_NOISINGS = Clone("linear-1000/10", seed=0, body="small-unet")
YARDSTICK = "DDPM, every noising"


def _sampler(label: str, *stages: Stage, calls: tuple[int, ...] | None = None) -> Contender:
    return Contender(label, (Clone("linear-1000"), *stages), calls=calls)


def _variance(kind: str) -> Learn:
    return Learn("variance", {"kind": kind})


STUDIES = {
    "main": Study(
        "The main job, from nothing, five seeds",
        Grid(
            ("SwissRoll",),
            (_tuned("SFT-PG (B)", OWN),),
            seeds=(0, 1, 2, 3, 4),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "long": Study(
        "The long preset, from nothing",
        Grid(
            ("SwissRoll",),
            (_tuned("SFT-PG (B), long", OWN, preset="long"),),
            seeds=(0, 1),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "gradients": Study(
        "Pathwise gradient or policy gradient, gradient penalty or baseline (Fan & Lee 2023, 6.2.2)",
        Grid(
            ("SwissRoll",),
            (
                _tuned("SFT (GP)", SHARED, "sft"),
                _tuned("SFT-PG (GP)", SHARED, regularizer="gradient-penalty", coefficient=0.1),
                SFT_PG_B,
            ),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "steps": Study(
        "How few steps (Fan & Lee 2023, Table 1)",
        Grid(
            ("SwissRoll",),
            (SFT_PG_B, Contender("DDPM", (OWN, DDPM), calls=(10, 100, 1000))),
            calls=(3, 5, 8, 10),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "ingredients": Study(
        "What our additions to SFT-PG (B) earn",
        Grid(
            ("SwissRoll",),
            (
                SFT_PG_B,
                _tuned("V alone", SHARED, residual_baseline=False),
                _tuned("GAE lambda = 1", SHARED, gae_lambda=1.0),
                _tuned("all states for V", SHARED, baseline_states=10),
                _tuned("PPO ratio clip 0.2", SHARED, clip_range=0.2),
            ),
            scoring=SCORING,
        ),
        COLUMNS,
    ),
    "digits": Study(
        "Real 8x8 digits in ten steps",
        Grid(("Digits",), (SFT_PG_B,), scoring=SCORING),
        ("sliced_wasserstein", "sliced_wasserstein_fresh", "mmd", "seconds"),
    ),
    "mnist": Study(
        "MNIST: a DDPM of ten steps, then SFT-PG (B) (Fan & Lee 2023, Table 2)",
        Grid(
            ("MNIST",),
            (
                _tuned("1 generator step", TEN_NOISINGS, n_generator=1, evaluations=2),
                # The gradient's norm is about 0.01: never clipped, now and then, always.
                *(
                    _tuned(
                        f"5 generator steps, gamma {gamma:g}",
                        TEN_NOISINGS,
                        n_generator=5,
                        max_grad_norm=gamma,
                        evaluations=2,
                    )
                    for gamma in (1.0, 0.01, 0.003)
                ),
            ),
            scoring=SCORING,
        ),
    ),
    "samplers": Study(
        "Few-step samplers of one DDPM on the digits (the shape of Fan & Lee 2023, Table 3)",
        Grid(
            ("Digits",),
            (
                _sampler(YARDSTICK, DDPM, calls=(1000,)),
                _sampler("DDPM, sub-sampled", Sample("ancestral", **EVEN)),
                _sampler("DDPM, sub-sampled, clipped", Sample("ancestral", {"clip": True}, **EVEN)),
                _sampler("FastDPM (STEP)", Sample("fast-dpm", **STEP)),
                _sampler("FastDPM (VAR)", Sample("fast-dpm", **VAR)),
                _sampler("Analytic-DPM", _variance("gamma"), Sample("analytic-dpm", **EVEN)),
                _sampler("NPR-DDPM", _variance("npr"), Sample("npr-ddpm", **EVEN)),
                _sampler("SN-DDPM", _variance("sn"), Sample("sn-ddpm", **EVEN)),
                _sampler("DDIM", Sample("ddim", **EVEN)),
                _sampler("DPM-Solver-3", Sample("dpm-solver-3", **T_MIN)),
                _sampler("DPM-Solver++ (2M)", Sample("dpm-solver++-2m", **T_MIN)),
                _sampler("D-DDIM", Sample("ddim", **EVEN), Learn("dode")),
                _sampler(
                    "SFT-PG (B)",
                    Sample("fast-dpm", {"last_std": 0.05}, **VAR),
                    fine_tune("sft-pg"),
                ),
            ),
            calls=(10, 5),
            seeds=(0, 1, 2),
            scoring=Scoring(before=False),
        ),
        yardstick=YARDSTICK,
    ),
}
