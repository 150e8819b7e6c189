"""Small worlds for the agents' tests: a toy decision process, tiny networks, known denoisers."""

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.networks import MLP, UNet2D
from fewstep.envs import DiffusionMDP, DiscreteVP, NoiseProcess, Schedule, Target, make_schedule
from fewstep.envs.mdp import no_reward

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
        self.times.append(float(arguments[1].detach().flatten()[0]))
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
    """A decision process on a correlated 2-D cluster; without a reward agents learn a critic."""

    def make(name="Cluster", schedule=None, reward=no_reward):
        schedule = schedule or Schedule.uniform(process, 4)
        return DiffusionMDP(Target.from_sampler(cluster, name, 1000), process, schedule, reward)

    return make


@pytest.fixture
def mdp(make_mdp):
    return make_mdp()


@pytest.fixture
def play():
    """`play(chain, noise, generator)`: all states (K + 1, N, *shape), in the chain's precision."""

    def states(chain, noise, generator):
        def draw(like):
            return torch.empty_like(like).normal_(generator=generator)

        found = [noise]
        for step in range(chain.steps):
            found.append(chain.act({"sample": found[-1]}, step, draw))
        return torch.stack(found)

    return states


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


class Mixture(nn.Module):
    """The exact noise prediction of a Gaussian mixture under any process (MATH.md A.5)."""

    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]], dtype=torch.float64)
    variance = 0.3**2

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, sample, time):
        time = time.double() - self.process.network_time(0.0)
        alpha, sigma = (f(time)[:, None] for f in (self.process.alpha, self.process.sigma))
        marginal = alpha**2 * self.variance + sigma**2
        offsets = sample[:, None] - alpha[:, None] * self.means
        logits = self.weights.log() - offsets.square().sum(2) / (2 * marginal)
        # eps = (x - alpha D) / sigma, with the large terms cancelled by hand.
        return (logits.softmax(1)[..., None] * offsets).sum(1) * sigma / marginal


class SmoothVP(NoiseProcess):
    """The linear VP-SDE: log abar = -t^2 (b1 - b0)/2 - t b0, smooth in its time (MATH.md 1.8)."""

    slowest, fastest = 0.1, 20.0
    t_min, t_max = 1e-3, 1.0

    def _log_abar(self, t):
        time = self._check_time(t)
        return -time.square() * (self.fastest - self.slowest) / 2 - time * self.slowest

    def alpha(self, t):
        return (self._log_abar(t) / 2).exp()

    def sigma(self, t):
        return (-torch.expm1(self._log_abar(t))).sqrt()

    def log_snr(self, t):
        return self._log_abar(t) / 2 - self.sigma(t).log()

    def time_of_log_snr(self, log_snr):
        value = self._check_log_snr(log_snr)
        decay = torch.logaddexp(torch.zeros_like(value), -2 * value)
        rise = self.fastest - self.slowest
        root = (self.slowest**2 + 2 * rise * decay).sqrt()
        return (2 * decay / (self.slowest + root)).clamp(max=self.t_max)

    def network_time(self, t):
        return t

    def to_config(self):
        return {"kind": "SmoothVP"}


def named_grid(name, process, steps):
    """A schedule of `steps` that ends at t_min, or at 0 where the name says so."""
    name, _, end = name.partition("-to-")
    if name == "irregular":
        # Decreasing gaps with no pattern, from t_max to t_min on the rho^(1/7) scale.
        gaps = np.random.default_rng(steps).uniform(0.3, 1.7, steps - (end == "0"))
        ramp = 1 - np.concatenate([[0], gaps.cumsum() / gaps.sum()])
        most, least = (
            float((-process.log_snr(t) / 7).exp()) for t in (process.t_max, process.t_min)
        )
        root = least + (most - least) * ramp
        times = process.time_of_log_snr(torch.from_numpy(-7 * np.log(root)))
        return Schedule(process, [*times.tolist(), *([0.0] if end == "0" else [])])
    options = {"end": 0.0 if end else process.t_min}
    if name != "uniform":
        options = {"append_zero": bool(end)}
    return make_schedule(name, process, steps, **options)


@pytest.fixture
def mixture():
    """`mixture(process)`: an exact denoiser in float64 of three Gaussians in the plane."""
    return lambda process: Denoiser(Mixture(process), process)


@pytest.fixture
def smooth_vp():
    return SmoothVP()


@pytest.fixture
def grid():
    """`grid(name, process, steps)`: "karras", "irregular-to-0" and so on."""
    return named_grid


@pytest.fixture
def prior(generator):
    """`prior(process)`: seven initial states (7, 2) in float64."""
    return lambda process: process.prior_sample(
        (7, 2), generator(), dtype=torch.float64, t=process.t_max
    )


@pytest.fixture
def make_unet():
    """`make_unet(**options)`: a seeded U-Net of 2x8x8 with some thousand random weights."""

    def make(seed=0, **options):
        small = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet2D((2, 8, 8), **{**small, **options}).eval()

    return make
