"""No argument of a constructor takes what its type hint excludes, whichever way it comes."""

import builtins
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import fewstep.agents
import fewstep.common
import fewstep.critics
import fewstep.envs
from fewstep.agents import AGENTS, SFTPG, CheckpointError, Denoiser, DenoiserPolicy
from fewstep.agents.denoisers.networks import MLP, ResidualMLP, SmallUNet
from fewstep.agents.denoisers.variance_head import VarianceHead
from fewstep.agents.solvers import SOLVERS
from fewstep.common.checkpoint import load_checkpoint, save_checkpoint
from fewstep.critics import ClassifierFeatures, FeatureExtractor, IPMCritic, MMDCritic
from fewstep.critics.metrics.evaluation import Real
from fewstep.envs import (
    DiffusionEnv,
    DiffusionMDP,
    DiffusionVectorEnv,
    NoiseProcess,
    Schedule,
    Target,
)
from fewstep.envs.registration import make_mdp
from fewstep.envs.schedules import SCHEDULES
from fewstep.envs.targets.known import make_target
from fewstep.runs.settings.train import Settings, parse

# The first arguments need not make sense: types are checked before anything is done with them.
GROUPS = {
    f"{agent} {group}": kind
    for agent, build in AGENTS.items()
    for group, kind in {"settings": build.Settings, **build.Settings.groups()}.items()
}
PLACES = {
    **GROUPS,
    "Denoiser": Denoiser,
    "MLP": MLP,
    "ResidualMLP": ResidualMLP,
    "SmallUNet": SmallUNet,
    "VarianceHead": VarianceHead,
    "DenoiserPolicy": DenoiserPolicy,
    "IPMCritic": IPMCritic,
    "MMDCritic": MMDCritic,
    "DiffusionEnv": DiffusionEnv,
    "DiffusionVectorEnv": DiffusionVectorEnv,
    "make_mdp": make_mdp,
    "make_target": make_target,
    **{f"solver {name}": solver.build for name, solver in SOLVERS.items()},
    **{f"schedule {name}": build for name, build in SCHEDULES.items()},
}


def parts(hint):
    return get_args(hint) if get_origin(hint) in (typing.Union, UnionType) else (hint,)


def wrong_value(hint):
    """Return a value of another kind than the hint's, None for hints that say too little."""
    kinds = {get_origin(part) or part for part in parts(hint)} - {NoneType}
    if kinds <= {bool, Literal}:
        return "bogus"
    if kinds == {int}:
        return 2.5
    if kinds == {float} or kinds == {tuple}:
        return "bogus"
    if kinds == {str}:
        return 3
    # Any object of another class, where the hint names classes alone.
    plain = all(get_origin(part) is None and inspect.isclass(part) for part in parts(hint))
    return Stranger() if plain and Any not in kinds else None


class Stranger:
    """What no argument takes."""


def fitting_value(hint, examples=None):
    """Return a value that a hint allows, of which nothing else needs to be true."""
    samples = {int: 1, float: 1.0, str: "", bool: True, tuple: (1.0, 1.0), NoneType: None}
    samples |= {Sequence: (1, 8, 8), torch.Tensor: torch.ones(4, 1, 8, 8), **(examples or {})}
    kind = get_origin(parts(hint)[0]) or parts(hint)[0]
    return samples[kind] if kind in samples else Mock(spec=kind) if inspect.isclass(kind) else None


def hints_of(build):
    if build in GROUPS.values():  # a dataclass's constructor does not resolve its hints
        return typing.get_type_hints(build)
    return typing.get_type_hints(
        inspect.unwrap(build.__init__ if inspect.isclass(build) else build)
    )


def typed_arguments():
    for place, build in PLACES.items():
        hints = hints_of(build)
        for name in inspect.signature(build).parameters:
            if name in hints and wrong_value(hints[name]) is not None:
                yield pytest.param(build, name, wrong_value(hints[name]), id=f"{place}-{name}")


def filled(build, given):
    """Return keyword arguments in which all that have no default are something."""
    parameters = inspect.signature(build).parameters.values()
    needed = {
        p.name: None
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return {**needed, **given}


@pytest.mark.parametrize(("build", "name", "value"), list(typed_arguments()))
def test_a_value_of_another_kind_is_refused(build, name, value):
    hints = hints_of(build)
    # What is missing gets a value that its hint allows, so that only `name` can be at fault.
    arguments = {key: fitting_value(hints.get(key)) for key in filled(build, {})}
    with pytest.raises((TypeError, ValueError), match=rf"{name} (must be|'?bogus)|unknown {name}"):
        build(**{**arguments, name: value})


def named_arguments():
    """Strings that are names of something, in the agents' settings."""
    for agent, build in AGENTS.items():
        for kind in (build.Settings, *build.Settings.groups().values()):
            for name, hint in typing.get_type_hints(kind).items():
                if str in parts(hint):
                    yield pytest.param(build, name, id=f"{agent}-{name}")


@pytest.mark.parametrize(("build", "name"), list(named_arguments()))
def test_an_unknown_name_is_refused(build, name, make_mdp, make_denoiser):
    # Or a file that is not there.
    with pytest.raises((ValueError, FileNotFoundError), match="bogus"):
        build(make_mdp(), make_denoiser(), **{name: "bogus"})


def test_numpy_s_numbers_and_lists_are_taken_for_python_s(make_mdp, make_denoiser, tmp_path):
    agent = SFTPG(
        make_mdp(),
        make_denoiser(),
        batch_size=np.int64(8),
        learning_rate=np.float32(0.5),
        learn_std=np.bool_(True),
        betas=[0.5, 0.9],
        max_grad_norm=1,
    )
    settings = agent.settings
    assert settings.batch_size == 8
    assert type(settings.batch_size) is int
    assert settings.policy.learn_std is True
    assert settings.optimizer.betas == (0.5, 0.9)
    agent.save(tmp_path / "agent")  # JSON knows no NumPy
    saved = load_checkpoint(tmp_path / "agent")["settings"]
    assert saved["optimizer"]["learning_rate"] == 0.5


BAD = [
    ("policy", {"log_density": "bogus"}, "unknown log_density 'bogus'"),
    (
        "policy",
        {"normalize_advantage": "no"},
        "normalize_advantage must be True or False, got 'no'",
    ),
    ("batch_size", 8.5, "batch_size must be a whole number, got 8.5"),
    ("optimizer", {"learning_rate": "fast"}, "learning_rate must be a number"),
    ("optimizer", {"learning_rat": 1.0}, "did you mean 'learning_rate'"),
    ("optimizer", None, "optimizer must be OptimizerSettings or a mapping, got None"),
    ("learning_rate", 1.0, "unknown setting 'learning_rate'"),
]


@pytest.mark.parametrize(("name", "value", "complaint"), BAD)
def test_settings_of_a_checkpoint_are_as_strictly_checked(
    name, value, complaint, make_mdp, make_denoiser, tmp_path
):
    path = tmp_path / "agent"
    SFTPG(make_mdp(), make_denoiser(), batch_size=8).save(path)
    tree = load_checkpoint(path)
    tree["settings"][name] = value
    save_checkpoint(path, tree)
    with pytest.raises(CheckpointError, match=f"{path}.*{complaint}"):
        SFTPG.load(path, make_mdp())


def config(tmp_path, change) -> Path:
    tree = json.loads(parse(["--agent=sft-pg"]).to_json())
    change(tree)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(("name", "value", "complaint"), BAD)
def test_settings_of_a_config_are_as_strictly_checked(name, value, complaint, tmp_path):
    path = config(tmp_path, lambda tree: tree["agent"].update({name: value}))
    with pytest.raises(ValueError, match=f"{path}.*{complaint}"):
        Settings.from_json(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tree: tree.update(run=[]), "run, agent and cloning must be objects"),
        (lambda tree: tree.update(run={}), "env"),
        (
            lambda tree: tree["run"].update(log_interval=7.0007),
            "log_interval must be a whole number",
        ),
        (
            lambda tree: tree["run"].update(log_interval=-5),
            "log_interval must be at least 1, got -5",
        ),
        (lambda tree: tree["run"].update(seed=True), "seed must be a whole number, got True"),
        (lambda tree: tree["run"].update(download="no"), "download must be True or False"),
        (lambda tree: tree["run"].update(log_dir=3), "log_dir must be a path"),
        (lambda tree: tree["run"].update(agent="sft-pq"), "did you mean 'sft-pg'"),
        (lambda tree: tree["cloning"].update(rounds=1e9), "rounds must be a whole number"),
    ],
)
def test_a_config_that_a_flag_could_not_say_is_refused(change, complaint, tmp_path):
    path = config(tmp_path, change)
    with pytest.raises(ValueError, match=complaint) as caught:
        Settings.from_json(path)
    assert str(path) in str(caught.value)


def test_a_config_says_what_the_flags_said(tmp_path):
    flags = ["--agent=sft-pg", "--optimizer.betas", "0.4", "0.9", "--steps=3", "--log-dir=x"]
    settings = parse([*flags, "--policy.clip-range=0.2"])
    assert settings.agent.optimizer.betas == (0.4, 0.9)
    assert settings.agent.policy.clip_range == 0.2
    path = tmp_path / "config.json"
    path.write_text(settings.to_json())
    assert Settings.from_json(path) == settings


def test_a_schedule_without_a_flag_is_no_schedule_with_the_flag_no(process):
    with pytest.raises(TypeError, match="append_zero must be True or False, got 'no'"):
        Schedule.karras(process, 3, append_zero="no")
    assert torch.equal(Schedule.karras(process, 3).times, Schedule.karras(process, 3, rho=7).times)


# -- everything that the packages export -----------------------------------------------------------

# What the package makes, and nobody else: a table's line, and what functions return.
MADE_BY_US = {"Solver", "Tableau", "Report", "PlainGrid", "OpenedPipeline"}
# Arguments that only count beside another, of an id and of captions of the training samples; and
# what an episode that has begun keeps, for which a new process is made in every rollout.
UNREAD = {
    ("SB3VecEnv", "num_envs"),
    ("Target", "held_out_captions"),
    ("Inpainting", "known"),
}


def exported():
    """Return the functions and classes in the `__all__` of every package of the library, by name.

    The command line is left out: its flags are fields of the settings that are checked above.
    """
    found = {}
    for folder in (fewstep.common, fewstep.envs, fewstep.critics, fewstep.agents):
        modules = pkgutil.walk_packages(folder.__path__, f"{folder.__name__}.")
        names = [folder.__name__, *(module.name for module in modules if module.ispkg)]
        for package in map(importlib.import_module, names):
            for name in getattr(package, "__all__", ()):
                found[name] = getattr(package, name)
    return {
        name: value
        for name, value in found.items()
        if inspect.isroutine(value)
        or (
            inspect.isclass(value)
            and not inspect.isabstract(value)
            and not getattr(value, "_is_protocol", False)
            and not issubclass(value, Exception)
        )
    }


class Known(dict):
    """Names of a module; what it imports for type checkers alone is anything."""

    def __missing__(self, name):
        return getattr(builtins, name, Any)


def named_arguments_of(build):
    """Yield the name and the hint of every argument that has one which says something."""
    fields = inspect.isclass(build) and dataclasses.is_dataclass(build)
    owner = inspect.unwrap(build.__init__ if inspect.isclass(build) and not fields else build)
    known = Known()
    for each in reversed(build.__mro__ if fields else [owner]):
        known |= vars(sys.modules[each.__module__])
    hints = typing.get_type_hints(owner, localns=known)
    for name, parameter in inspect.signature(build).parameters.items():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield name, hints.get(name, Any)


def test_everything_exported_says_what_it_takes(make_mdp, make_denoiser):
    mdp, denoiser = make_mdp(), make_denoiser()
    examples = {
        DiffusionVectorEnv: mdp,
        DiffusionMDP: mdp,
        Target: mdp.target,
        NoiseProcess: mdp.process,
        Schedule: mdp.schedule,
        Real: mdp.target,
        Denoiser: denoiser,
        FeatureExtractor: ClassifierFeatures("tiny", (1, 8, 8), 2),
        Any: torch.ones(4, 2),
    }
    places = {name: build for name, build in exported().items() if name not in MADE_BY_US}
    bad = []
    for place, build in places.items():
        hints = dict(named_arguments_of(build))
        needed = {key: fitting_value(hints[key], examples) for key in filled(build, {})}
        for name, hint in hints.items():
            if Any in parts(hint) or (place, name) in UNREAD:
                continue
            told = "nothing"
            try:
                build(**{**needed, name: Stranger()})
            except (TypeError, ValueError) as error:
                told = str(error)
            except Exception as error:
                told = repr(error)
            said = name.replace("held_out_", "held.out.")
            if not re.fullmatch(rf"{said}( of \w*)? must be .* got .*Stranger.*", told):
                bad.append(f"{place}({name}): {told}")
    assert bad == []
    assert len(places) > 90
