"""A denoiser that is for other samples than the environment's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fewstep.agents import CheckpointError, Denoiser
from fewstep.agents.denoisers.networks import MLP, SmallUNet
from fewstep.agents.solvers import default_schedule
from fewstep.envs import DiscreteVP, Target, make_process
from fewstep.runs.settings.environment import build_environment, check_fits

PROCESS = DiscreteVP.linear(10)


def world(name, *shape):
    return SimpleNamespace(shape=shape, target=Target.from_samples(torch.zeros(3, *shape), name))


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("ImageFolder", SmallUNet((3, 16, 16)), r"\(3, 8, 8\); give --image-size 16\.$"),
        ("ImageFolder", SmallUNet((3, 16, 32)), r"\(3, 16, 32\), here they have \(3, 8, 8\)\.$"),
        ("ImageFolder", SmallUNet((1, 16, 16)), r"\(1, 16, 16\), here they have \(3, 8, 8\)\.$"),
        ("CIFAR10", SmallUNet((3, 16, 16)), r"\(3, 16, 16\), here they have \(3, 8, 8\)\.$"),
        ("ImageFolder", MLP((2,), 10), r"\(2,\), here they have \(3, 8, 8\)\.$"),
    ],
)
def test_the_message_names_the_file_and_the_flag(name, body, sentence):
    with pytest.raises(CheckpointError, match=f"^runs/mine was .*{sentence}"):
        check_fits(Denoiser(body, PROCESS), world(name, 3, 8, 8), "runs/mine")
    check_fits(Denoiser(body, PROCESS), world(name, *body.config["shape"]), "runs/mine")
    check_fits(Denoiser(torch.nn.Identity(), PROCESS), world(name, 3, 8, 8), "runs/mine")


@pytest.mark.parametrize("process", ["cosine-1000", "linear-1000/10", "ve-1-80", "ve"])
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver-3", "dpm-solver++-2m"])
def test_a_command_s_default_times_are_the_library_s(process, solver):
    process = make_process(process)
    mdp = build_environment(
        "SwissRoll",
        steps=7,
        schedule=None,
        schedule_options=None,
        process=process,
        solver=solver,
        device="cpu",
        data_dir=None,
    )
    assert mdp.schedule == default_schedule(solver, process, 7)
