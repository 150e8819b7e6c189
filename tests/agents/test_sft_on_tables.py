"""SFT through solvers without a density: deterministic ones, and those that read what came before.

The references walk through the arrays of the tables by themselves, and let autograd do the rest.
"""

import numpy as np
import pytest
import torch
from rounds import learn_rounds

from fewstep.agents import SFD, SFT, Tableau
from fewstep.agents.solvers import make_solver
from fewstep.common.checkpoint import CheckpointError
from fewstep.critics.metrics.distances import sliced_wasserstein
from fewstep.envs import Schedule

SMALL = {"batch_size": 16, "n_critic": 2, "n_generator": 2}
TABLES = ["ddim", "dpm-solver++-2m", "unipc-2", "ipndm", "dpm-solver-2"]


def table_of(name, process, denoiser):
    return make_solver(name, Schedule.uniform(process, 4), denoiser)


def walked(table, denoiser, noise, first):
    """Finished samples (N, *shape) from the rows of a table; no gradient before step `first`."""
    anchors = np.arange(table.steps) if table.anchors is None else table.anchors
    current = np.zeros(table.steps) if table.current is None else table.current
    states, outputs = [noise], []
    for j in range(table.steps):
        with torch.set_grad_enabled(j >= first):
            ask = denoiser.epsilon if table.output == "epsilon" else denoiser.denoised
            outputs.append(ask(states[j], float(table.evaluation_times[j])))
            state = float(table.scale[j]) * states[int(anchors[j])] + float(current[j]) * states[j]
            for k in range(j + 1):
                state = state + float(table.weights[j, k]) * outputs[k]
            states.append(state)
    return states[-1]


@pytest.mark.numeric
@pytest.mark.parametrize("last", [None, 1, 3])
@pytest.mark.parametrize("solver", TABLES)
def test_the_gradient_is_autograd_s_through_the_table(solver, last, make_mdp, make_denoiser):
    """Of fresh rollouts, or from the critic's states where a step reads nothing before it."""
    agent = SFT(
        make_mdp(), make_denoiser(), solver=solver, gradient_steps=last, max_grad_norm=None, **SMALL
    )
    table, steps = agent.tableau, agent.tableau.steps
    first = 0 if last is None else steps - last
    replays = last is not None and table.one_step
    played = last if replays else steps
    assert agent.timesteps_per_round == 16 * (2 * steps + 2 * played)
    trajectories = agent.collect()
    kept, agent.collect, agent.train_critic = [], lambda: trajectories, lambda _: {}
    agent.descend = lambda: kept.append([w.grad.clone() for w in agent.denoiser.parameters()])
    state = agent.generator.get_state()
    agent.train_round()
    agent.generator.set_state(state)
    for number, found in enumerate(kept):
        if replays:
            sample = trajectories.states[first, 16 * number : 16 * (number + 1)]
            for j in range(first, steps):
                output = agent.denoiser.epsilon(sample, float(table.evaluation_times[j]))
                sample = float(table.scale[j]) * sample + float(table.weights[j, j]) * output
        else:
            noise = agent.mdp.initial(16, agent.generator)
            sample = walked(table, agent.denoiser, noise, first)
        agent.optimizer.zero_grad()
        (-agent.critic(sample).mean()).backward()
        expected = [weight.grad for weight in agent.denoiser.parameters()]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_given_table_is_kept_and_found_again(make_mdp, make_denoiser, process, tmp_path):
    """Its times are the environment's; it comes with the file; training goes on to the same end."""
    denoiser = make_denoiser()
    table = table_of("dpm-solver++-2m", process, denoiser)
    table = table.replace(times=np.array([4.0, 3.0, 2.5, 1.0, 0.0]), name="learned")
    settings = {**SMALL, "gradient_steps": 2, "rounds": 4}
    whole = SFT(make_mdp(), make_denoiser(), tableau=table, **settings)
    assert whole.mdp.schedule.times.tolist() == table.times.tolist()
    learn_rounds(whole, 4)
    half = SFT(make_mdp(), make_denoiser(), tableau=table, **settings)
    learn_rounds(half, 2)
    half.save(tmp_path / "half.safetensors")
    again = SFT.load(tmp_path / "half.safetensors", make_mdp())
    assert again.tableau.to_json() == table.to_json() == whole.tableau.to_json()
    learn_rounds(again, 4, reset_num_timesteps=False)
    ends = (agent.sampling_denoiser.parameters() for agent in (whole, again))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    other = table.replace(scale=1.01 * table.scale)
    with pytest.raises(CheckpointError, match=r"half.safetensors was trained with another table"):
        SFT(make_mdp(), make_denoiser(), tableau=other, **settings).resume(
            tmp_path / "half.safetensors"
        )
    with pytest.raises(ValueError, match="carries over to no other times"):
        again.tableau_on(Schedule.uniform(process, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "heun"}, "asks the network twice at one time"),
        ({"solver": "dpm-solver++-2m", "learn_std": True}, "uses earlier states or outputs"),
        ({"solver": "ddim", "learn_std": True}, "adds no noise in step 0"),
        ({"tableau": "learned.json"}, "tableau must be"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(settings, message, make_mdp, make_denoiser):
    with pytest.raises((TypeError, ValueError), match=message):
        SFT(make_mdp(), make_denoiser(), **SMALL, **settings)


@pytest.mark.numeric
def test_memory_and_portions_change_nothing(make_mdp, make_denoiser):
    """Checkpointing and micro-batches are the same training, to rounding."""
    ends = []
    for more in ({}, {"gradient_checkpointing": True}, {"micro_batch_size": 5}):
        agent = SFT(make_mdp(), make_denoiser(), solver="unipc-2", **SMALL, **more)
        learn_rounds(agent, 3)
        ends.append([weight.detach() for weight in agent.denoiser.parameters()])
    for other in ends[1:]:
        torch.testing.assert_close(ends[0], other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("chain", [False, True])
def test_a_deterministic_sampler_is_brought_to_the_data(chain, make_mdp, make_denoiser, process):
    """From an untrained network by SFT alone, and behind SFD on the same table."""
    mdp, denoiser = make_mdp(), make_denoiser()
    table = table_of("dpm-solver++-2m", process, denoiser)
    assert isinstance(table, Tableau)
    if chain:
        first = SFD(mdp, denoiser, tableau=table, rounds=2, batch_size=8, check=False)
        first.learn()
        denoiser = first.sampling_denoiser.requires_grad_(True)
    agent = SFT(mdp, denoiser, tableau=table, batch_size=128, rounds=300, learning_rate=1e-3)
    real = mdp.target.sample(2000, torch.Generator().manual_seed(5))
    before = sliced_wasserstein(agent.sample(2000), real)
    agent.learn()
    assert sliced_wasserstein(agent.sample(2000), real) < 0.5 * before
