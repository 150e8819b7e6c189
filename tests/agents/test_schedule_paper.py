"""Schedule learning as Huang (2024) reads it: data as the target, its loss, and its collapse."""

import copy
import warnings

import pytest
import torch
from rounds import learn_rounds
from schedule_worlds import (
    EDM,
    OF_DATA,
    QUICK,
    TWO_STAGES,
    assert_same_agents,
    assert_sound,
    error,
    fresh_noise,
    known,
    learned,
    total_variance,
    trainable_mixture,
    truth,
    two_stages,
    world,
)

from fewstep.agents import ScheduleLearning
from fewstep.agents.solver_learning.scheduling.paper.loss import diffusion_loss, tuning_loss
from fewstep.agents.solver_learning.scheduling.paper.parts import PATIENCE
from fewstep.agents.solvers import make_solver
from fewstep.envs import Schedule

pytestmark = pytest.mark.numeric


OTHERS = ((2, "exact"), (16, "eq14"))

# -- the collapse ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_without_a_guard_the_target_of_data_collapses(seed):
    denoiser, target = known()
    schedule = Schedule.karras(EDM, 6)
    settings = {**QUICK, "scale": 10, "collapse": 0.0, "diffusion_weight": 0.0}
    agent = learned(schedule, target="data", seed=seed, **settings)
    data = total_variance(target.sample(5000, torch.Generator().manual_seed(1)))
    # L_disc falls to its floor, the variance of the data ...
    assert 2 * agent.errors["given"] > 1.2 * data
    assert 2 * agent.errors["learned"] == pytest.approx(data, rel=0.1)
    assert agent.returned == "learned" and "without comparison" in agent.verdict
    assert not agent.collapsed and agent.rounds == agent.budget == 45
    # ... as the samples become their mean.
    noise = fresh_noise(EDM)
    goal = truth(denoiser, noise, schedule)
    karras = make_solver("euler", schedule)
    samples = [table.sample(denoiser, noise) for table in (karras, agent.tableau)]
    assert total_variance(samples[0]) > 0.5 * data
    assert total_variance(samples[1]) < 0.02 * data
    mean = target.sample(5000, torch.Generator().manual_seed(1)).double().mean(0)
    torch.testing.assert_close(samples[1].mean(0), mean, rtol=0, atol=0.1)
    assert error(agent.tableau, denoiser, noise, goal) > 5 * error(karras, denoiser, noise, goal)
    assert_sound(agent.schedule, schedule)


@pytest.mark.parametrize(
    ("dimension", "gradient"),
    [(2, "eq14"), (16, "exact"), *(pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS)],
)
def test_the_guard_stops_the_collapse(dimension, gradient):
    denoiser, target = known("ve", dimension)
    schedule = Schedule.karras(EDM, 6)
    settings = {**QUICK, "schedule_rounds": 150, "gradient": gradient, "diffusion_weight": 0.0}
    agent = ScheduleLearning(world(schedule, target), denoiser, target="data", **settings)
    with pytest.warns(UserWarning, match=r"variance fell from .*take target='teacher'"):
        agent.learn()
    assert agent.collapsed and agent.done
    assert agent.rounds < agent.budget == 150
    noise = torch.cat([batch.noise for batch in agent.make_batches()])
    variances = [
        total_variance(table.sample(denoiser, noise))
        for table in (agent.tableau, make_solver("euler", schedule))
    ]
    assert variances[0] >= 0.7 * variances[1]
    # What remains is no worse than a little: the collapsed schedule errs many times as much.
    noise = fresh_noise(EDM, dimension)
    goal = truth(denoiser, noise, schedule)
    before = error(make_solver("euler", schedule), denoiser, noise, goal)
    assert error(agent.tableau, denoiser, noise, goal) < 3 * before


def test_with_l_diff_added_the_guard_stops_it_too():
    with pytest.warns(UserWarning, match=r"take target='teacher'"):
        agent = learned(target="data", **{**QUICK, "schedule_rounds": 150, "scale": 10})
    assert agent.collapsed and agent.done
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = learned(**QUICK)
    assert not agent.collapsed and agent.done


def test_stage_two_follows_a_collapse():
    """Then the alternation ends."""
    settings = {"schedule_rounds": 60, "schedule_learning_rate": 0.3, "batch_size": 100}
    agent = ScheduleLearning(
        world(), trainable_mixture(), target="data", **{**TWO_STAGES, **settings, "alternations": 3}
    )
    with pytest.warns(UserWarning, match=r"take target='teacher'"):
        agent.learn()
    assert agent.collapsed and agent.done
    assert agent._alternation == 1
    assert PATIENCE + 5 <= agent.rounds < 60
    assert float(agent.denoiser.body.shift.detach().abs().max()) > 0


def test_the_programme_minimises_l_diff(generator):
    schedule = Schedule.karras(EDM, 6)
    # What belongs to data is returned as it was found; against the teacher it may lose.
    settings = {"start": "diffusion-dp", "gradient": "none", "batch_size": 500}
    agent = learned(schedule, **settings, target="data")
    assert agent.returned == "programme"
    assert agent.rounds == 1
    assert_sound(agent.schedule, schedule)
    denoiser, target = known()
    clean = target.sample(2000, generator(3))
    found, karras, descended = (
        diffusion_loss(denoiser, schedule.times[:-1], clean, generator(4))[0]
        for schedule in (agent.schedule, schedule, learned(schedule, **QUICK).schedule)
    )
    assert found < 0.95 * karras
    assert found < descended
    # It skews to low noise (MATH.md 3.6).
    assert agent.schedule.times[2] < schedule.times[2]


@pytest.mark.parametrize("weights", ["lambda", "original"])
def test_stage_two_learns(weights):
    agent = two_stages(
        **OF_DATA,
        tuning_rounds=200,
        tuning_batch_size=64,
        tuning_weights=weights,
        tuning_learning_rate=3e-3,
    )
    clean = agent.mdp.target.sample(2000, torch.Generator().manual_seed(8))

    def loss():
        generator = torch.Generator().manual_seed(9)
        denoiser = agent.sampling_denoiser
        with torch.no_grad():
            return float(tuning_loss(denoiser, agent.levels, clean, weights, 1.0, generator))

    learn_rounds(agent, 4)
    before = loss()
    agent.learn(reset_num_timesteps=False)
    assert loss() < 0.95 * before


def test_a_collapse_survives_an_interruption(tmp_path):
    denoiser, _ = known()
    settings = {**QUICK, "target": "data", "scale": 10}
    whole = ScheduleLearning(world(), denoiser, **settings)
    path = tmp_path / "agent"
    learn_rounds(whole, 3)
    whole.save(path)
    with pytest.warns(UserWarning, match=r"take target='teacher'"):
        whole.learn(reset_num_timesteps=False)
    resumed = ScheduleLearning.load(path, world(), body=copy.deepcopy(denoiser.body))
    with pytest.warns(UserWarning, match=r"take target='teacher'"):
        resumed.learn(reset_num_timesteps=False)
    assert_same_agents(whole, resumed)
    whole.save(path)
    resumed = ScheduleLearning.load(path, world(), body=copy.deepcopy(denoiser.body))
    assert resumed.collapsed and resumed.done and resumed.schedule == whole.schedule
