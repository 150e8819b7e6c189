"""Small worlds for the agents' tests: a toy decision process, tiny networks, known denoisers."""

import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.networks import MLP
from fewstep.envs import DiffusionMDP, DiscreteVP, Schedule, Target

torch.set_num_threads(1)


def toward_the_corner(sample):
    """A critic with a known answer: minus the squared distance to (1, 1, ...)."""
    return -(sample - 1).flatten(1).square().sum(1)


def cluster(n, seed):
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([0.2, 0.3]) + torch.tensor([0.5, -0.5])


class Wave(nn.Module):
    """A smooth nonlinear body in float64, which depends on its time."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.6, -0.3], [0.2, 0.8]], dtype=torch.float64))

    def forward(self, sample, time):
        phase = (0.03 * time.double()).view(-1, *[1] * (sample.ndim - 1))
        return torch.tanh(sample @ self.matrix + phase.sin())


class Calls:
    """Counts the calls of a module and the samples in them, with a forward hook."""

    def __init__(self, module):
        self.times = []
        self.samples = 0
        module.register_forward_hook(self._note)

    def _note(self, _module, arguments, _output):
        self.times.append(float(arguments[1].flatten()[0]))
        self.samples += len(arguments[0])

    def __len__(self):
        return len(self.times)


@pytest.fixture
def reward():
    return toward_the_corner


@pytest.fixture
def count_calls():
    return Calls


@pytest.fixture
def process():
    """Four noisings that do destroy the sample: abar is 0.14 at the end."""
    return DiscreteVP([0.1, 0.3, 0.5, 0.55])


@pytest.fixture
def make_mdp(process):
    """A decision process on a correlated 2-D cluster; `reward` is a known critic."""

    def make(name="Cluster", schedule=None, reward=toward_the_corner):
        schedule = schedule or Schedule.uniform(process, 4)
        return DiffusionMDP(Target.from_sampler(cluster, name, 1000), process, schedule, reward)

    return make


@pytest.fixture
def mdp(make_mdp):
    return make_mdp()


@pytest.fixture
def make_denoiser(process):
    """Tiny seeded denoisers."""

    def make(seed=0, hidden=32, prediction="epsilon"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body = MLP((2,), levels=4, hidden=hidden, layers=2, input_gain=1.0)
        return Denoiser(body, process, prediction)

    return make


@pytest.fixture
def wave():
    """A denoiser in float64 on the thousand noisings of DDPM."""
    return Denoiser(Wave(), DiscreteVP.linear(1000))


@pytest.fixture
def generator():
    """`generator(seed)`: a seeded generator."""
    return lambda seed=0: torch.Generator().manual_seed(seed)
