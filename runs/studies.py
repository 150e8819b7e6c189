"""The studies that `fewstep benchmark` runs: declared, not scripted.

A study is a grid of cells, environment x steps x contender x seed. Each cell is one run
(`train.Run`) in a folder of its own; within a study every contender starts from the same
pretrained denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One way to a few-step sampler.

    Attributes:
        label: its name in the table and the plot.
        agent: key of `AGENTS`; "behavior-cloning" stands for the pretrained sampler itself.
        preset: where rounds and hyper-parameters come from.
        settings: hyper-parameters that differ from the preset's.
        rounds: rounds of training, if not the preset's.
        evaluations: of the live metric; few, where a sample costs many network calls.
        steps: sampling steps, if not the study's.
    """

    label: str
    agent: str
    preset: str = "default"
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int | None = None
    evaluations: int = 20
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Study:
    """A comparison on equal terms.

    Attributes:
        title: what it asks.
        environments: where.
        contenders: who.
        steps: sampling steps K.
        seeds: training seeds.
        metrics: those that the table shows; all if empty.
        process: noise process of the shared denoiser, if not the environment's.
        body: its network, if not the environment's; see `fewstep train --help`.
        body_options: options of that network.
        clone_per_seed: clone a denoiser for every seed, as the main job does, instead of sharing
            one.
    """

    title: str
    environments: tuple[str, ...]
    contenders: tuple[Contender, ...]
    steps: tuple[int, ...] = (10,)
    seeds: tuple[int, ...] = (0,)
    metrics: tuple[str, ...] = ("sliced_wasserstein", "sliced_wasserstein_fresh")
    clone_per_seed: bool = False
    process: str | None = None
    body: str | None = None
    body_options: dict[str, Any] | None = None


SFT_PG_B = Contender("SFT-PG (B)", "sft-pg")

STUDIES: dict[str, Study] = {
    "main": Study(
        title="The main job, from nothing, five seeds",
        environments=("SwissRoll",),
        contenders=(SFT_PG_B,),
        seeds=(0, 1, 2, 3, 4),
        clone_per_seed=True,
    ),
    "long": Study(
        title="The long preset, from nothing",
        environments=("SwissRoll",),
        contenders=(Contender("SFT-PG (B), long", "sft-pg", preset="long"),),
        seeds=(0, 1),
        clone_per_seed=True,
    ),
    "gradients": Study(
        title="Pathwise gradient or policy gradient, gradient penalty or baseline (paper A, 6.2.2)",
        environments=("SwissRoll",),
        contenders=(
            Contender("SFT (GP)", "sft"),
            Contender(
                "SFT-PG (GP)",
                "sft-pg",
                settings={"regularizer": "gradient-penalty", "coefficient": 0.1},
            ),
            SFT_PG_B,
        ),
    ),
    "steps": Study(
        title="How few steps (paper A, Table 1)",
        environments=("SwissRoll",),
        contenders=(
            SFT_PG_B,
            Contender("DDPM", "behavior-cloning", evaluations=2, steps=(10, 100, 1000)),
        ),
        steps=(3, 5, 8, 10),
    ),
    "ingredients": Study(
        title="What our additions to SFT-PG (B) earn",
        environments=("SwissRoll",),
        contenders=(
            SFT_PG_B,
            Contender("V alone", "sft-pg", settings={"residual_baseline": False}),
            Contender("GAE lambda = 1", "sft-pg", settings={"gae_lambda": 1.0}),
            Contender("all states for V", "sft-pg", settings={"baseline_states": 10}),
            Contender("PPO ratio clip 0.2", "sft-pg", settings={"clip_range": 0.2}),
        ),
    ),
    "digits": Study(
        title="Real 8x8 digits in ten steps",
        environments=("Digits",),
        contenders=(SFT_PG_B,),
        metrics=("sliced_wasserstein", "sliced_wasserstein_fresh", "mmd"),
    ),
    "mnist": Study(
        title="MNIST: a DDPM of ten steps, then SFT-PG (B) (paper A, Table 2)",
        environments=("MNIST",),
        contenders=(
            Contender("1 generator step", "sft-pg", settings={"n_generator": 1}, evaluations=2),
            # The gradient's norm is about 0.01: never clipped, now and then, always.
            *(
                Contender(
                    f"5 generator steps, gamma {gamma:g}",
                    "sft-pg",
                    settings={"n_generator": 5, "max_grad_norm": gamma},
                    evaluations=2,
                )
                for gamma in (1.0, 0.01, 0.003)
            ),
        ),
        metrics=(),
        process="linear-1000/10",
        body="small-unet",
        body_options={"width": 16, "levels": 3},
    ),
}
