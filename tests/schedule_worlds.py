"""Small worlds for the tests of schedule learning: mixtures whose denoiser is known exactly."""

import copy
import functools

import torch
from torch import nn

from fewstep.agents import Denoiser, ScheduleLearning
from fewstep.agents.denoisers.exact import mixture as exact_mixture
from fewstep.agents.denoisers.networks import ResidualMLP
from fewstep.agents.solvers import make_solver
from fewstep.envs import VE, DiffusionMDP, DiscreteVP, Schedule

EDM, VP = VE(), DiscreteVP.linear(1000)
# Enough noise and updates for the plane.
QUICK = {
    "batch_size": 200,
    "schedule_rounds": 45,
    "schedule_learning_rate": None,
    "tuning_rounds": 0,
}
# Steps so small that a few of them descend: the levels that are kept are not those of the start.
SMALL = {
    "batch_size": 20,
    "batches": 2,
    "schedule_rounds": 4,
    "schedule_learning_rate": 0.03,
    "tuning_rounds": 0,
    "start": "karras",
    "scale": 3,
    "check_teacher": False,
}
TWO_STAGES = {
    **SMALL,
    "tuning_rounds": 5,
    "tuning_batch_size": 16,
    "tuning_learning_rate": 1e-2,
    "tuning_weights": "lambda",
    "ema": 0.5,
}
# The mode of Huang (2024), in which nothing is compared: what was tuned samples.
OF_DATA = {"target": "data", "collapse": 0.0}
# Errors that MATH.md 3.6 publishes for the learned levels, as shares of Karras's.
PUBLISHED = {6: 0.588 / 0.932, 10: 0.240 / 0.492}


def worth(sample):
    return -sample.square().flatten(1).sum(1)


@functools.cache
def known(process_name="ve", dimension=2, seed=0):
    """An exact denoiser and its data."""
    return exact_mixture(
        EDM if process_name == "ve" else VP,
        prediction="sample",
        dimension=dimension,
        components=3 if dimension == 2 else 6,
        seed=seed,
    )


def world(schedule=None, target=None):
    schedule = schedule or Schedule.karras(EDM, 6)
    name = "ve" if schedule.process == EDM else "vp"
    return DiffusionMDP(target or known(name)[1], schedule.process, schedule, worth)


def smooth_body(seed=0):
    """A network with weights that learn; not a good one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = ResidualMLP((2,), hidden=16, blocks=1)
        for weight in body.parameters():
            nn.init.normal_(weight, std=0.2)
    return body


def short_world():
    return world(Schedule.karras(EDM, 4))


class Shifted(nn.Module):
    """A known body with something to train."""

    def __init__(self, body):
        super().__init__()
        self.body, self.shift = body, nn.Parameter(torch.zeros(2))

    def forward(self, sample, time):
        return self.body(sample, time) + self.shift


def trainable_mixture():
    return Denoiser(Shifted(copy.deepcopy(known()[0].body)), EDM, "sample")


def network(seed=0):
    return Denoiser(smooth_body(seed), EDM, "edm", sigma_data=1.0)


def learned(schedule=None, denoiser=None, **settings):
    schedule = schedule or Schedule.karras(EDM, 6)
    if denoiser is None:
        denoiser, _ = known("ve" if schedule.process == EDM else "vp")
    agent = ScheduleLearning(world(schedule), denoiser, **{**SMALL, **settings})
    return agent.learn()


def two_stages(**settings):
    return ScheduleLearning(short_world(), network(), **{**TWO_STAGES, **settings})


def name_of(process):
    """Return the name of one of the two processes here; they cannot be keys themselves."""
    (name,) = (name for name, known_one in (("ve", EDM), ("vp", VP)) if process == known_one)
    return name


def fresh_noise(process, dimension=2, n=1000):
    return noise_of(name_of(process), dimension, n)


@functools.cache
def noise_of(name, dimension, n):
    process, generator = {"ve": EDM, "vp": VP}[name], torch.Generator().manual_seed(12345)
    return process.prior_sample((n, dimension), generator, t=process.t_max).double()


def truth(denoiser, noise, like):
    """Where the ODE takes the noise, by many of Heun's steps; of one denoiser and noise once."""
    return ode_end(denoiser, noise, name_of(like.process), bool(like.times[-1] == 0))


@functools.cache
def ode_end(denoiser, noise, name, to_zero):
    fine = Schedule.karras({"ve": EDM, "vp": VP}[name], 200, append_zero=to_zero)
    with torch.no_grad():
        return make_solver("heun", fine).sample(denoiser, noise)


def error(tableau, denoiser, noise, goal):
    with torch.no_grad():
        return float((tableau.sample(denoiser, noise) - goal).square().sum(1).mean())


def total_variance(samples):
    return float(samples.double().var(0).sum())


def weights_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_weights(one, other):
    assert list(one) == list(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def differ(one, other):
    return any(not torch.equal(value, other[key]) for key, value in one.items())


def assert_sound(schedule, like):
    """The ends are exactly those of `like`, and the times between them descend."""
    assert schedule.process == like.process
    assert schedule.steps == like.steps
    ends = [0, -1] if like.times[-1] > 0 else [0, -2, -1]
    assert schedule.times[ends].tolist() == like.times[ends].tolist()
    assert (schedule.times.diff() < 0).all()


def assert_same_agents(one, other):
    assert torch.equal(one.schedule.times, other.schedule.times)
    assert torch.equal(one.levels, other.levels)
    assert_same_weights(weights_of(one.denoiser), weights_of(other.denoiser))
    assert_same_weights(weights_of(one.sampling_denoiser), weights_of(other.sampling_denoiser))
    for what in ("rounds", "errors", "converged", "collapsed", "done", "budget"):
        assert getattr(one, what) == getattr(other, what), what
    assert one.settings == other.settings
    assert torch.equal(one.sample(7), other.sample(7))
