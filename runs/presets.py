"""Budgets and hyper-parameters by environment, agent and preset: the tuned numbers we ship.

Each entry overrides the agent's own defaults. How they were found is in README, section Results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..envs.names import unknown_name


@dataclass(frozen=True)
class Preset:
    """A budget: rounds of the agent, its hyper-parameters, and those of behaviour cloning."""

    rounds: int
    agent: dict[str, Any] = field(default_factory=dict)
    cloning: dict[str, Any] = field(default_factory=dict)


_TOY_CLONING: dict[str, Any] = {"rounds": 2000, "batch_size": 1024, "learning_rate": 5e-3}
_TOY_SFT_PG: dict[str, Any] = {
    "coefficient": 1.0,
    "learning_rate": 2e-4,
    "ema": 0.97,
}

PRESETS: dict[tuple[str, str, str], Preset] = {
    ("SwissRoll", "sft-pg", "default"): Preset(400, _TOY_SFT_PG, _TOY_CLONING),
    ("SwissRoll", "sft-pg", "long"): Preset(
        2500,
        {**_TOY_SFT_PG, "ema": 0.99},
        {**_TOY_CLONING, "rounds": 4000},
    ),
    ("SwissRoll", "sft", "default"): Preset(400, {"ema": 0.97}, _TOY_CLONING),
}
# Where no entry is more particular.
ANY_AGENT = Preset(rounds=500, cloning={"rounds": 2000})


def preset(env: str, agent: str, name: str) -> Preset:
    """Look up a preset; the default of an untuned pair is a plain one.

    Raises:
        ValueError: a preset name that this environment and agent do not have.
    """
    if (env, agent, name) in PRESETS:
        return PRESETS[env, agent, name]
    if name == "default":
        return ANY_AGENT
    known = {"default"} | {key[2] for key in PRESETS if key[:2] == (env, agent)}
    raise unknown_name(f"preset of {agent} on {env}", name, known)
