"""The environments that agents are given: objects, or ids to make them from."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from ..envs import ENVIRONMENTS, DiffusionMDP, DiffusionVectorEnv
from .solvers import default_schedule

Environment = DiffusionVectorEnv | DiffusionMDP | str


def made_environment(env: Environment, solver: str) -> DiffusionVectorEnv | DiffusionMDP:
    """Make an environment that is given by its id, on the solver's `default_schedule`."""
    if not isinstance(env, str):
        return env
    made = gym.make_vec(env, **_default_settings(env, solver)).unwrapped
    assert isinstance(made, DiffusionVectorEnv)
    return made


def name_of(env: Environment) -> str:
    """Return the name that presets go by: that of its target, or of ours in an id."""
    if not isinstance(env, str):
        return mdp_of(env).target.name
    return env.removeprefix("fewstep/").removesuffix("-v0")


def mdp_of(env: DiffusionVectorEnv | DiffusionMDP) -> DiffusionMDP:
    """Return the decision process of an environment."""
    return env if isinstance(env, DiffusionMDP) else env.unwrapped.mdp


def environment_identity(mdp: DiffusionMDP) -> dict[str, Any]:
    """Return what two environments must share for a checkpoint of one to fit the other."""
    schedule = mdp.schedule.to_config()
    schedule.pop("recipe", None)  # the same times by another name are the same schedule
    return {
        "target": mdp.target.name,
        "shape": list(mdp.shape),
        "schedule": schedule,
        "data": mdp.target.fingerprint,
    }


def _default_settings(env: str, solver: str) -> dict[str, Any]:
    """Return what an environment of ours is made with where only its id is given."""
    name = name_of(env)
    if name not in ENVIRONMENTS:
        return {}
    known = ENVIRONMENTS[name]
    process = known.process(known.steps)
    return {"schedule": default_schedule(solver, process, known.steps, known.schedule)}
