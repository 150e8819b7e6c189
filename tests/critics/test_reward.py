"""RewardCritic: a reward of one's own behind a critic's face."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch

from fewstep.critics import MLPBaseline, MMDCritic, RewardCritic

K, N = 4, 64


def reward(sample: torch.Tensor) -> torch.Tensor:
    return -sample.square().sum(1)


def states_of(fake: torch.Tensor) -> torch.Tensor:
    return fake + 0.1 * torch.randn(K, *fake.shape)


def test_the_reward_is_passed_through_and_its_baseline_learns_it():
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        critic = RewardCritic(reward, MLPBaseline((2,), K, hidden=32), learning_rate=1e-2)
        real = torch.randn(N, 2)
        losses = []
        for _ in range(200):
            fake = torch.randn(N, 2)
            losses.append(float(critic.update(real, fake, states_of(fake))["baseline_loss"]))
        ratios.append(sum(losses[-10:]) / sum(losses[:10]))
    assert statistics.median(ratios) < 0.2
    fake = torch.randn(N, 2)
    assert torch.equal(critic(fake), reward(fake))
    assert critic.value(states_of(fake)).shape == (K, N)


def test_a_reward_that_learns_is_told_of_every_batch():
    real, fake = torch.randn(N, 2), torch.randn(N, 2) + 1
    witness = MMDCritic(real)
    metrics = RewardCritic(witness).update(real, fake)
    assert torch.equal(witness.reference, fake)
    assert metrics["ipm_gap"] == MMDCritic(real).update(real, fake)["ipm_gap"]


def test_state_round_trip_continues_bit_for_bit():
    torch.manual_seed(0)
    real, fake = torch.randn(N, 2), torch.randn(N, 2)
    states = states_of(fake)
    critics = [RewardCritic(MMDCritic(real), MLPBaseline((2,), K, hidden=8)) for _ in range(2)]
    critics[0].update(real, fake, states)
    critics[1].load_state_dict(copy.deepcopy(critics[0].state_dict()))
    for critic in critics:
        critic.update(real, fake + 1, states)
    assert torch.equal(*(critic.value(states) for critic in critics))
    assert torch.equal(*(critic(fake) for critic in critics))


def test_without_a_baseline_there_is_no_value():
    with pytest.raises(ValueError, match="no baseline"):
        RewardCritic(reward).value(torch.zeros(K, N, 2))


@pytest.mark.parametrize(
    ("answer", "error", "complaint"),
    [
        (lambda x: x.sum(1) * float("nan"), ValueError, "'user_reward' returned NaN.* 8 of 8"),
        (lambda x: x, ValueError, r"one number a sample, shape \(8,\); it returned shape \(8, 2\)"),
        (lambda x: x[:, :1], ValueError, "drop the last dimension"),
        (lambda x: None, TypeError, "'user_reward' must return .* it returned NoneType"),
        (lambda x: 1, TypeError, "it returned int"),
        (lambda x: x.sum(1).tolist(), TypeError, "it returned list"),
    ],
)
def test_a_reward_that_returns_nonsense_is_named_and_nothing_else_blamed(answer, error, complaint):
    """In the third round only: the learning rate is not at fault."""
    calls = []

    def user_reward(sample):
        calls.append(len(sample))
        return sample.sum(1).numpy() if len(calls) < 5 else answer(sample)

    critic = RewardCritic(user_reward, MLPBaseline((2,), K, hidden=8))
    states, steps = torch.randn(K, 8, 2), torch.arange(K)
    for _ in range(2):  # twice a round: real and fake
        metrics = critic.update(torch.randn(8, 2), torch.randn(8, 2), states, steps)
        assert metrics["baseline_loss"].isfinite()
    with pytest.raises(error, match=complaint):
        critic.update(torch.randn(8, 2), torch.randn(8, 2), states, steps)


def test_a_diverged_sampler_is_not_the_rewards_fault():
    critic = RewardCritic(lambda sample: sample.sum(1))
    assert critic(torch.full((3, 2), float("nan"))).isnan().all()
