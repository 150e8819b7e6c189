"""How training is run (pieces, buffers, precision, dropout) is not to change what is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.agents import SFTPG, BehaviorCloning, Denoiser
from fewstep.agents.denoisers.networks import ResidualMLP
from fewstep.common.optimisation import OutOfMemoryError, seeded
from fewstep.envs.registration import make_mdp

SETTINGS = {"batch_size": 16, "n_critic": 2, "n_generator": 2, "minibatch_size": 50}


@pytest.fixture(scope="module")
def digits():
    return make_mdp("Digits", steps=4)


def small(mdp, dropout=0.0):
    with seeded(0):
        body = ResidualMLP(mdp.shape, hidden=16, blocks=1)
    if dropout:
        body.out = nn.Sequential(nn.Dropout(dropout), body.out)
    return Denoiser(body, mdp.process, "sample")


def trained(agent, rounds=2):
    """Train with an Adam that is smooth in the gradients; see two_processes.py."""
    for optimizer in (agent.optimizer, getattr(getattr(agent, "critic", None), "optimizer", None)):
        for group in optimizer.param_groups if optimizer else ():
            group["eps"] = 1.0
    agent.learn(rounds * agent.timesteps_per_round, log_interval=1)
    return torch.cat([weight.detach().flatten() for weight in agent.denoiser.parameters()])


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_micro_batches_change_nothing_but_rounding(digits, clip_range):
    start = torch.cat([weight.flatten() for weight in small(digits).parameters()])
    whole, pieces = (
        trained(
            SFTPG(
                digits,
                small(digits),
                **SETTINGS,
                learning_rate=1.0,
                clip_range=clip_range,
                micro_batch_size=size,
            )
        )
        for size in (None, 7)
    )
    assert (pieces - whole).norm() < 1e-4 * (whole - start).norm()


def test_cloning_accumulates_the_gradient_of_the_whole_batch(digits):
    start = torch.cat([weight.flatten() for weight in small(digits).parameters()])
    whole, pieces = (
        trained(
            BehaviorCloning(
                digits, small(digits), batch_size=20, micro_batch_size=size, learning_rate=1.0
            )
        )
        for size in (None, 7)
    )
    assert (pieces - whole).norm() < 1e-4 * (whole - start).norm()


def test_a_buffer_on_the_cpu_is_the_same_buffer(digits):
    beside, apart = (
        trained(SFTPG(digits, small(digits), **SETTINGS, buffer=buffer))
        for buffer in ("float32", "cpu")
    )
    assert torch.equal(beside, apart)


def test_a_half_precision_buffer_holds_the_states_that_the_chain_went_through(digits):
    agent = SFTPG(digits, small(digits), **SETTINGS, buffer="float16")
    buffer = agent.collect().states
    assert buffer.dtype == torch.float16
    policy = agent.policy
    for step in range(policy.steps):
        with torch.no_grad():
            mean, std = policy.distribution(buffer[step].float(), step)
        z = (buffer[step + 1].float() - mean) / std
        # Standard normal noise, seen through roundings of a quarter of the smallest std at most.
        assert abs(float(z.mean())) < 0.1
        assert 0.9 < float(z.std()) < 1.1


def test_bfloat16_is_close_and_its_first_ratio_is_one(digits):
    exact, rough = small(digits), small(digits).run_with(precision="bf16")
    sample = torch.randn(64, *digits.shape, generator=torch.Generator().manual_seed(0))
    # An untrained residual network answers 0: give it something to say.
    for denoiser in (exact, rough):
        nn.init.eye_(denoiser.body.out.weight[:, :64])
    a, b = exact.denoised(sample, 500.0), rough.denoised(sample, 500.0)
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    agent = SFTPG(digits, small(digits), **SETTINGS, precision="bf16")
    metrics = {}
    original = agent._check_finite
    agent._check_finite = lambda values: (metrics.update(values), original(values))
    agent.learn(agent.timesteps_per_round, log_interval=1)
    assert float(metrics["train/ratio_first_batch"]) == pytest.approx(1.0, abs=1e-6)


def test_dropout_is_on_in_cloning_only_and_fixed_by_the_seed(digits):
    weights = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        agent = BehaviorCloning(digits, small(digits, dropout=0.5), batch_size=16, ema=0.0)
        agent.learn(2 * agent.timesteps_per_round)
        weights.append(agent.denoiser.state_dict())
        generators = (torch.Generator().manual_seed(3) for _ in range(2))
        a, b = (agent.sample(5, generator=generator) for generator in generators)
        assert torch.equal(a, b)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    plain = BehaviorCloning(digits, small(digits, dropout=1e-12), batch_size=16, ema=0.0)
    plain.learn(2 * plain.timesteps_per_round)
    assert any(
        not torch.equal(weights[0][key], value)
        for key, value in plain.denoiser.state_dict().items()
    )


def test_running_out_of_memory_names_the_settings_that_help(digits, monkeypatch):
    def allocate():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    agent = SFTPG(digits, small(digits), **SETTINGS)
    monkeypatch.setattr(agent, "train_round", allocate)
    with pytest.raises(OutOfMemoryError, match="micro_batch_size=25"):
        agent.learn(agent.timesteps_per_round)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"buffer": "disk"}, "cpu-float16"),
        ({"precision": "fp8"}, "bf16"),
    ],
)
def test_bad_settings_are_refused(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        SFTPG(digits, small(digits), **SETTINGS, **settings)
