"""Studies of agents that train the network, and of few-step samplers of one network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .contenders import Contender, Grid
from .engine import Study
from .stages import SMALL_UNET, Clone, Learn, Sample, Stage, fine_tune
from .world import Scoring

DDPM = Sample("ancestral")
# A denoiser that all contenders share, and one for every seed, as in the main job.
SHARED, OWN = Clone(seed=0), Clone()
SCORING = Scoring(own_noise=False)
COLUMNS = ("sliced_wasserstein", "sliced_wasserstein_fresh", "seconds")
# The critic and the other settings that SFT-V has by default, for SFT-PG.
LOGISTIC: dict[str, Any] = {
    "objective": "logistic",
    "regularizer": "r1",
    "coefficient": None,
    "critic_betas": (0.5, 0.99),
    "critic_rounds": 20,
}
ANALYTIC = (Learn("variance", {"kind": "gamma"}), Sample("analytic-dpm"))
FINE: dict[str, Any] = {"bandwidths": (6.0, 25.0)}
SHARP: dict[str, Any] = {"solver_options": {"last_std": 0.0025}}

# Networks of the toys: twice as wide, or with PyTorch's first layer, which blurs what is thin.
WIDE = replace(SHARED, body="mlp", body_options={"hidden": 256})
SMOOTH = replace(SHARED, body="mlp", body_options={"input_gain": 1.0})
RESIDUAL = replace(SHARED, body="residual-mlp")
PLAIN_V: dict[str, Any] = {"scaled_baseline": False, "even": False}
OF_512: dict[str, Any] = {"batch_size": 512, "rounds": 240}
# What one run changes of the presets: the network, the agent, its settings.
INGREDIENTS: dict[str, tuple[Clone, str, dict[str, Any]]] = {
    "SFT-PG (B)": (SHARED, "sft-pg", {}),
    "V = f + a residual": (SHARED, "sft-pg", {"residual_baseline": True}),
    "GAE lambda = 1": (SHARED, "sft-pg", {"gae_lambda": 1.0}),
    "all states for V": (SHARED, "sft-pg", {"baseline_states": 10}),
    "PPO ratio clip 0.2": (SHARED, "sft-pg", {"clip_range": 0.2}),
    "even batches": (SHARED, "sft-pg", {"even": True}),
    "advantages not normalised": (SHARED, "sft-pg", {"normalize_advantage": False}),
    "SFT-V": (SHARED, "sft-v", {}),
    "SFT-V, V unscaled": (SHARED, "sft-v", {"scaled_baseline": False}),
    "SFT-V, uneven batches": (SHARED, "sft-v", {"even": False}),
    "SFT-V, neither": (SHARED, "sft-v", PLAIN_V),
    "SFT-V, neither, beta_2 .999": (SHARED, "sft-v", {**PLAIN_V, "critic_betas": (0.5, 0.999)}),
    "SFT-V, falling rates of f, V": (SHARED, "sft-v", {"critic_lr_schedule": "linear"}),
    "SFT-V, batches of 512": (SHARED, "sft-v", OF_512),
    "SFT-V, neither, of 512": (SHARED, "sft-v", {**PLAIN_V, **OF_512}),
    "SFT-V, f normalised spectrally": (SHARED, "sft-v", {"regularizer": "spectral-norm"}),
    "SFT-V, f twice as wide": (SHARED, "sft-v", {"critic_width": 256}),
    "SFT-V, twice the real samples": (SHARED, "sft-v", {"critic_passes": 2}),
    "SFT-V, denoiser twice as wide": (WIDE, "sft-v", {}),
    "SFT-V, usual first layer": (SMOOTH, "sft-v", {}),
    "SFT-V, residual denoiser": (RESIDUAL, "sft-v", {}),
    "SFT-V, four times the cloning": (replace(SHARED, rounds=8000), "sft-v", {}),
    "SFT-V, no average of theta": (SHARED, "sft-v", {"ema": 0.0}),
    "SFT-V, average over 100 rounds": (SHARED, "sft-v", {"ema": 0.99}),
    "SFT-V, constant rate of theta": (SHARED, "sft-v", {"lr_schedule": "constant"}),
}


def _study(title: str, *contenders: Contender, env: str = "SwissRoll", **more: Any) -> Study:
    """Return a study of agents in one environment."""
    columns = more.pop("columns", COLUMNS)
    return Study(title, Grid((env,), contenders, scoring=SCORING, **more), columns)


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
# Where images are fine-tuned from, by the noise that the last step leaves: less than a grey level,
# or six, with which the settings of all but SFT's default preset were chosen.
FINE_GRAIN = Sample("ancestral", {"variance": "small", "last_std": 0.005}, "uniform")
COARSE_GRAIN = Sample("ancestral", {"variance": "small", "last_std": 0.05}, "uniform")
# A solver that adds none, to the first noising, where the pixels are clean enough.
NO_GRAIN = Sample("unipc-2", {}, "uniform", {"end": 1.0})
YARDSTICK = "DDPM, every noising"


def _sampler(label: str, *stages: Stage, calls: tuple[int, ...] | None = None) -> Contender:
    return Contender(label, (Clone("linear-1000"), *stages), calls=calls)


def _variance(kind: str) -> Learn:
    return Learn("variance", {"kind": kind})


def _mnist(label: str, n_generator: int, **settings: Any) -> Contender:
    clone = Clone("linear-1000/10", seed=0, **SMALL_UNET)
    return _tuned(label, clone, evaluations=2, n_generator=n_generator, **settings)


def _images(env: str, title: str) -> Study:
    """Return the study of the three gradients on small images, from one long DDPM."""
    clone = Clone("linear-1000", seed=0, **SMALL_UNET)
    learners = {
        "SFT": (FINE_GRAIN, fine_tune("sft", 0)),
        "SFT, from UniPC-2": (NO_GRAIN, fine_tune("sft", 0)),
        "SFT, small critic": (COARSE_GRAIN, fine_tune("sft", 0, "small-critic")),
        "SFT-V": (COARSE_GRAIN, fine_tune("sft-v", 0)),
        "SFT-PG": (COARSE_GRAIN, fine_tune("sft-pg", 0)),
    }
    contenders = [Contender(label, (clone, *stages)) for label, stages in learners.items()]
    grid = Grid((env,), tuple(contenders), (10, 5), (0, 1, 2), Scoring(2000, own_noise=False))
    metrics = ("frechet_distance", "precision", "recall", "c2st")
    columns = (f"{metric}[{env.lower()}-classifier]" for metric in metrics)
    return Study(title, grid, ("sliced_wasserstein_fresh", *columns, "seconds"))


STUDIES = {
    "main": _study(
        "The main job, from nothing, five seeds",
        _tuned("SFT-PG (B)", OWN),
        _tuned("SFT-V", OWN, "sft-v"),
        seeds=(0, 1, 2, 3, 4),
    ),
    "long": _study(
        "The long preset, from nothing",
        _tuned("SFT-PG (B), long", OWN, preset="long"),
        seeds=(0, 1),
    ),
    "gradients": _study(
        "Pathwise or policy gradient, gradient penalty or baseline (Fan & Lee 2023, 6.2.2)",
        _tuned("SFT (GP)", SHARED, "sft"),
        _tuned("SFT-PG (GP)", SHARED, regularizer="gradient-penalty", coefficient=0.1),
        SFT_PG_B,
    ),
    "steps": _study(
        "How few steps (Fan & Lee 2023, Table 1)",
        SFT_PG_B,
        _tuned("SFT-PG (B), long", SHARED, preset="long"),
        _tuned("SFT-V", SHARED, "sft-v"),
        Contender("DDPM", (OWN, DDPM), calls=(10, 100, 1000)),
        calls=(3, 5, 8, 10),
    ),
    "ingredients": _study(
        "What each of our additions to SFT-PG (B) and SFT-V earns, one at a time",
        *(_tuned(name, clone, agent, **each) for name, (clone, agent, each) in INGREDIENTS.items()),
        seeds=(0, 1, 2),
    ),
    "seeing": _study(
        "From SFT-PG (B) to samples that a classifier cannot tell from data, step by step",
        SFT_PG_B,
        _tuned("SFT-PG (B), last std of the data", SHARED, **SHARP),
        _tuned("SFT-PG, logistic critic", SHARED, **SHARP, **LOGISTIC),
        _tuned("SFT-PG, logistic critic, fine frequencies", SHARED, **SHARP, **LOGISTIC, **FINE),
        _tuned(
            "SFT, logistic critic, fine frequencies", SHARED, "sft", **SHARP, **LOGISTIC, **FINE
        ),
        _tuned("SFT-V, critic (B)", SHARED, "sft-v", objective="ipm", regularizer="baseline"),
        _tuned("SFT-V, coarse frequencies", SHARED, "sft-v", bandwidths=(6.0,)),
        Contender("SFT-V from Analytic-DPM's deviations", (SHARED, *ANALYTIC, fine_tune("sft-v"))),
        _tuned("SFT-V, learned deviations", SHARED, "sft-v", learn_std=True),
        _tuned("SFT-V", SHARED, "sft-v"),
        seeds=(0, 1, 2),
    ),
    "digits": _study(
        "Real 8x8 digits in ten steps",
        SFT_PG_B,
        env="Digits",
        columns=("sliced_wasserstein", "sliced_wasserstein_fresh", "mmd", "seconds"),
    ),
    "mnist": _study(
        "MNIST: a DDPM of ten steps, then SFT-PG (B) (Fan & Lee 2023, Table 2)",
        _mnist("1 generator step", 1),
        # The gradient's norm is about 0.01: never clipped, now and then, always.
        _mnist("5 generator steps, gamma 1", 5, max_grad_norm=1.0),
        _mnist("5 generator steps, gamma 0.01", 5, max_grad_norm=0.01),
        _mnist("5 generator steps, gamma 0.003", 5, max_grad_norm=0.003),
        env="MNIST",
        columns=(),
    ),
    "images": _images("MNIST", "Fine-tuning on MNIST, which gradient and which critic"),
    "images-fashion": _images("FashionMNIST", "Fine-tuning on Fashion-MNIST"),
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
                    "SFT-PG (B)", Sample("fast-dpm", {"last_std": 0.05}, **VAR), fine_tune("sft-pg")
                ),
            ),
            calls=(10, 5),
            seeds=(0, 1, 2),
            scoring=Scoring(before=False),
        ),
        yardstick=YARDSTICK,
    ),
}
