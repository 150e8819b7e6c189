"""The environments that agents are given: objects, or ids to make them from."""

from __future__ import annotations

from typing import Any

from ..common.reading import shown
from ..envs import ENVIRONMENTS, DiffusionMDP, DiffusionVectorEnv, Schedule
from ..envs.registration import known_environment, make_registered
from .solvers import default_schedule

Environment = DiffusionVectorEnv | DiffusionMDP | str


def made_environment(env: Environment, solver: str) -> DiffusionVectorEnv | DiffusionMDP:
    """Make an environment that is given by its id, on the solver's `default_schedule`."""
    if not isinstance(env, str):
        return env
    made: Any = make_registered(env, **_default_settings(env, solver)).unwrapped
    mdp_of(made)  # it is one of a diffusion, or an error
    return made


def name_of(env: Environment) -> str:
    """Return the name that presets go by: that of its target, or of ours in an id."""
    if not isinstance(env, str):
        return mdp_of(env).target.name
    return known_environment(env) or env


def mdp_of(env: DiffusionVectorEnv | DiffusionMDP) -> DiffusionMDP:
    """Return the decision process of an environment."""
    inner: Any = env if isinstance(env, DiffusionMDP) else getattr(env, "unwrapped", None)
    mdp = inner if isinstance(inner, DiffusionMDP) else getattr(inner, "mdp", None)
    if not isinstance(mdp, DiffusionMDP):
        raise TypeError(
            "env must be a DiffusionVectorEnv, its DiffusionMDP or the name of an environment, "
            f"got {type(env).__name__}."
        )
    return mdp


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


def told_apart(key: str, there: object, here: object) -> tuple[str, str]:
    """Return two values of an identity that differ as an error shows them: schedules in short."""
    if key == "schedule":
        found, wanted = _in_short(there), _in_short(here)
        if found != wanted:  # else they differ in a digit that this leaves out
            return found, wanted
    return shown(there), shown(here)


def _in_short(schedule: Any) -> str:
    try:
        found = Schedule.from_config(schedule)
    except (KeyError, TypeError, ValueError):
        return shown(schedule)
    times = ", ".join(f"{time:.4g}" for time in found.times.tolist())
    return shown(f"of {found.process!r} at {times}")


def _default_settings(env: str, solver: str) -> dict[str, Any]:
    """Return what an environment of ours is made with where only its id is given."""
    name = name_of(env)
    if name not in ENVIRONMENTS:
        return {}
    known = ENVIRONMENTS[name]
    process = known.process(known.steps)
    return {"schedule": default_schedule(solver, process, known.steps, known.schedule)}
