"""Budgets and hyper-parameters by environment, agent and preset: the tuned numbers we ship.

Each entry overrides the agent's own defaults. An environment without an entry gets plain ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..agents import DODE, BehaviorCloning, ScheduleLearning
from ..envs.names import unknown_name

Values = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A budget: rounds of the agent, its hyper-parameters, and those of behaviour cloning.

    `process` names the noise process, if it is not the environment's own.
    """

    rounds: int
    agent: Values = field(default_factory=dict)
    cloning: Values = field(default_factory=dict)
    process: str | None = None


# Behaviour cloning of each environment, with its rounds.
_TOY: Values = {"rounds": 2000, "batch_size": 1024, "learning_rate": 5e-3}
CLONING: dict[str, Values] = {
    "SwissRoll": _TOY,
    "Moons": _TOY,
    "GaussianCluster": {**_TOY, "rounds": 1000},
    "Digits": {"rounds": 1800, "batch_size": 256, "learning_rate": 2e-3, "ema": 0.995},
}

# Fine-tuning: rounds and hyper-parameters by environment, agent and preset name.
_TOY_SFT_PG: Values = {"coefficient": 1.0, "learning_rate": 2e-4, "ema": 0.97}
_TOY_SFT: Values = {"coefficient": 0.1, "learning_rate": 2e-4, "ema": 0.97}
_DIGITS_SFT_PG: Values = {
    "coefficient": 1.0,
    "learning_rate": 1e-4,
    "log_density": "mean",
    "ema": 0.97,
    # Paper A's last standard deviation, 0.001, would drown the other steps in the gradient; 0.05 is
    # less than half a grey level of these digits.
    "solver_options": {"variance": "small", "last_std": 0.05},
}
FINE_TUNING: dict[tuple[str, str, str], tuple[int, Values]] = {
    ("SwissRoll", "sft-pg", "default"): (400, _TOY_SFT_PG),
    ("SwissRoll", "sft-pg", "long"): (2000, {**_TOY_SFT_PG, "ema": 0.99}),
    ("SwissRoll", "sft", "default"): (400, _TOY_SFT),
    ("Moons", "sft-pg", "default"): (400, _TOY_SFT_PG),
    ("Moons", "sft", "default"): (400, _TOY_SFT),
    ("GaussianCluster", "sft-pg", "default"): (100, _TOY_SFT_PG),
    ("GaussianCluster", "sft", "default"): (100, _TOY_SFT),
    ("Digits", "sft-pg", "default"): (150, _DIGITS_SFT_PG),
}


# An ODE solver needs a chain that ends in noise and has times between its steps; the toys' own
# process, one noising a step, is neither.
PROCESSES: dict[tuple[str, str], str] = {
    (env, DODE.name): "sigmoid-1000" for env in ("SwissRoll", "Moons", "GaussianCluster")
} | {
    # Noise levels are EDM's idea, and its network is smooth in them.
    (env, ScheduleLearning.name): "ve"
    for env in ("SwissRoll", "Moons", "GaussianCluster", "Digits")
}


def preset(env: str, agent: str, name: str = "default") -> Preset:
    """Look up a preset; the default of an untuned pair is a plain one.

    Raises:
        ValueError: a preset name that this environment and agent do not have.
    """
    cloning = CLONING.get(env, {"rounds": 2000})
    known = {"default"} | {key[2] for key in FINE_TUNING if key[:2] == (env, agent)}
    if name not in known:
        raise unknown_name(f"preset of {agent} on {env}", name, known)
    if agent == BehaviorCloning.name:
        hyperparameters = {key: value for key, value in cloning.items() if key != "rounds"}
        return Preset(cloning["rounds"], hyperparameters, cloning)
    rounds, hyperparameters = FINE_TUNING.get((env, agent, name), (400, {}))
    return Preset(rounds, hyperparameters, cloning, PROCESSES.get((env, agent)))
