"""What has to follow a device, told by one that computes nothing: `meta` stands for a GPU.

What a GPU computes is asked in tests/test_gpu.py.
"""

import pickle

import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.denoisers.parameterisations import make_parameterisation
from fewstep.agents.policy_gradient.replay import Replay
from fewstep.agents.solver_learning.best import BestNetwork
from fewstep.common.optimisation import Averaged
from fewstep.envs import DiscreteVP, make_mdp, make_process

ELSEWHERE = torch.device("meta")


def test_earlier_samples_of_a_file_go_to_the_agent_s_device():
    replay = Replay(8)
    replay.add(torch.randn(4, 2), torch.arange(4))
    moved = Replay(8)
    moved.load_state(replay.state(), ELSEWHERE)
    assert moved.samples.device == moved.conditions.device == ELSEWHERE
    moved.add(torch.randn(4, 2, device=ELSEWHERE), torch.arange(4, device=ELSEWHERE))
    assert moved.samples.shape == (8, 2)


def test_the_best_weights_of_a_file_go_where_the_network_is():
    here, there = (Denoiser(nn.Linear(2, 2), make_process("flow"), "flow") for _ in range(2))
    best = BestNetwork(Averaged(here, 0.9))
    best.begin(torch.ones(3))
    other = BestNetwork(Averaged(there.to(ELSEWHERE), 0.9))
    other.load_state(best.state())
    assert {weight.device for weight in other.state()["best"].values()} == {ELSEWHERE}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_time_goes_to_the_sample_s_device(prediction, indexed):
    """A learned one, too, to which its gradient has to find back."""
    asked = make_parameterisation(prediction, make_process("linear-1000"))
    asked.indexed = indexed
    sample = torch.zeros(3, 2, device=ELSEWHERE)
    for time in (torch.full((3,), 5.0), torch.tensor(4.5, requires_grad=True)):
        assert asked._times(sample, time).device == ELSEWHERE


def test_conditions_that_were_given_go_along_with_the_weights():
    denoiser = new_denoiser(make_mdp("Digits", steps=3, conditional=True)).given([0, 1, 2])
    assert denoiser.to(ELSEWHERE).conditioning.condition.device == ELSEWHERE


def test_a_process_is_pickled_without_what_a_gpu_keeps():
    process = DiscreteVP.linear(10)
    process._decay_on(ELSEWHERE)
    again = pickle.loads(pickle.dumps(process))
    assert list(again._decay) == [torch.device("cpu")]
    assert again == process and list(process._decay) == [torch.device("cpu"), ELSEWHERE]
