"""SFT and SFT-PG: what a round does to sampler and critic."""

import copy
import math
import statistics

import pytest
import torch
from norms import assert_close_by_norm
from rounds import learn_rounds

from fewstep.agents import SFT, SFTPG, SFTV, BehaviorCloning
from fewstep.agents.policy_gradient.buffer import Trajectories
from fewstep.critics import IPMCritic, MLPCritic, make_baseline, make_critic
from fewstep.critics.metrics.distances import sliced_wasserstein
from fewstep.envs import Schedule

SMALL = {"batch_size": 16, "n_critic": 2, "n_generator": 2}  # a buffer of 128 transitions


@pytest.fixture
def make_pg(make_mdp, make_denoiser):
    return lambda **settings: SFTPG(make_mdp(), make_denoiser(), **{**SMALL, **settings})


@pytest.fixture
def make_sft(make_mdp, make_denoiser):
    return lambda **settings: SFT(make_mdp(), make_denoiser(), **{**SMALL, **settings})


@pytest.mark.parametrize("log_density", ["sum", "mean"])
@pytest.mark.parametrize("clip_range", [None, 0.1])
@pytest.mark.parametrize("learn_std", [False, True])
def test_the_ratio_is_exactly_1_before_any_update(clip_range, log_density, learn_std, make_pg):
    agent = make_pg(
        clip_range=clip_range,
        log_density=log_density,
        learn_std=learn_std,
        learning_rate=1e-2,
        lr_schedule="constant",
    )
    agent.will_log = True
    for _ in range(3):
        metrics = agent.train_round()
        assert float(metrics["train/ratio_first_batch"]) == 1.0
        ends = [float(metrics[f"train/ratio_{end}"]) for end in ("min", "max")]
        assert ends[0] < 1 < ends[1]
        # The mean of r - 1 - log r, which grows away from r = 1 to both sides.
        kl = float(metrics["train/approx_kl"])
        assert 0 < kl < max(ratio - 1 - math.log(ratio) for ratio in ends)


def test_noise_power_weights_the_gradient_of_each_step(make_pg):
    trajectories = make_pg().collect()
    steps, count = 4, trajectories.states.shape[1]

    def gradient(agent, step):
        """The policy gradient of one step's transitions alone, which is what Adam is handed."""
        advantages = torch.zeros(steps, count)
        advantages[step] = torch.linspace(-1, 1, count)
        agent.collect = lambda: trajectories
        agent.advantages = lambda _: advantages
        agent.train_round()
        return torch.cat([weight.grad.flatten() for weight in agent.denoiser.parameters()])

    whole = {"n_generator": 1, "minibatch_size": steps * count, "max_grad_norm": 1e9}
    std = torch.tensor(make_pg()._tableau.noise)
    for power in (1.0, 2.0):
        weights = std**power / (std**power).mean()
        for step, weight in enumerate(weights.tolist()):
            plain, weighted = (
                gradient(make_pg(noise_power=p, **whole), step) for p in (0.0, power)
            )
            torch.testing.assert_close(weighted, weight * plain)
    with pytest.raises(ValueError, match="noise_power"):
        make_pg(noise_power=-1.0)


@pytest.fixture
def make_v(make_mdp, make_denoiser):
    return lambda **settings: SFTV(make_mdp(), make_denoiser(), **{**SMALL, **settings})


@pytest.mark.parametrize("maker", ["make_pg", "make_v", "make_sft"])
def test_the_critic_learns_alone_at_first(maker, request):
    make = request.getfixturevalue(maker)
    agent = make(critic_rounds=2)

    def weights(module):
        return torch.cat([weight.detach().flatten() for weight in module.parameters()])

    policy, critic = weights(agent.denoiser), weights(agent.critic)
    agent.learn(2 * agent.timesteps_per_round)
    assert torch.equal(weights(agent.denoiser), policy)
    assert not torch.equal(weights(agent.critic), critic)
    agent.learn(agent.timesteps_per_round, reset_num_timesteps=False)
    assert not torch.equal(weights(agent.denoiser), policy)
    with pytest.raises(ValueError, match="critic_rounds"):
        make(critic_rounds=-1)


@pytest.mark.parametrize("maker", ["make_pg", "make_v", "make_sft"])
def test_a_long_average_soon_forgets_where_theta_began(maker, request):
    """Its decay rises as (1 + n) / (10 + n); by hand, over rounds in which theta moves."""
    agent = request.getfixturevalue(maker)(ema=0.3, critic_rounds=2)
    by_hand = [weight.clone() for weight in agent.averaged.module.parameters()]
    for done in range(7):
        learn_rounds(agent, done + 1, reset_num_timesteps=False)
        if done >= 2:
            decay = min(0.3, (done - 1) / (done + 8))
            for average, live in zip(by_hand, agent.policy.parameters(), strict=True):
                average.copy_(decay * average + (1 - decay) * live.detach())
    for average, ours in zip(by_hand, agent.averaged.module.parameters(), strict=True):
        torch.testing.assert_close(ours, average)


def test_without_a_step_the_policy_has_not_moved(make_pg):
    agent = make_pg(learning_rate=0.0)
    agent.will_log = True
    metrics = agent.train_round()
    assert float(metrics["train/approx_kl"]) == 0
    assert float(metrics["train/ratio_max"]) == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 2.0, -2.4, False),  # good enough already
        (1.5, -2.0, 3.0, True),
        (0.5, -2.0, 1.6, False),  # avoided enough already
        (0.5, 2.0, -1.0, True),
    ],
)
def test_the_clipped_surrogate_is_ppo_s(ratio, advantage, loss, moves, make_pg):
    agent = make_pg(clip_range=0.2)
    old = torch.tensor([-3.0])
    new = (old + torch.tensor([ratio]).log()).requires_grad_()
    value = agent.policy_loss(new, torch.tensor([advantage]), old)
    value.backward()
    assert float(value.detach()) == pytest.approx(loss)
    assert bool(new.grad != 0) == moves


def test_minibatches_hold_transitions_of_the_buffer_and_none_twice(make_pg, monkeypatch):
    """Also each with its own step and advantage."""
    agent = make_pg(n_critic=3, n_generator=4, minibatch_size=40)  # 160 of 192
    kept, drawn = {}, []
    collect, advantages = agent.collect, agent.advantages
    log_density, policy_loss = agent.policy.log_density, agent.policy_loss

    def note_buffer():
        kept["buffer"] = collect()
        return kept["buffer"]

    def note_advantages(trajectories):
        kept["advantages"] = advantages(trajectories)
        return kept["advantages"]

    def note_transitions(next_sample, sample, step, reduction, condition):
        drawn.append([next_sample, sample, step])
        return log_density(next_sample, sample, step, reduction)

    def note_advantage(density, advantage, old):
        drawn[-1].append(advantage)
        return policy_loss(density, advantage, old)

    monkeypatch.setattr(agent, "collect", note_buffer)
    monkeypatch.setattr(agent, "advantages", note_advantages)
    monkeypatch.setattr(agent.policy, "log_density", note_transitions)
    monkeypatch.setattr(agent, "policy_loss", note_advantage)
    agent.train_round()
    assert [len(parts[0]) for parts in drawn] == [40] * 4
    buffer = kept["buffer"].states
    seen = set()
    for parts in drawn:
        for next_sample, sample, step, advantage in zip(*parts, strict=True):
            (row,) = (buffer[step] == sample).all(1).nonzero().flatten().tolist()
            assert torch.equal(buffer[step + 1, row], next_sample)
            assert advantage == kept["advantages"][step, row]
            seen.add((int(step), row))
    assert len(seen) == 160
    assert {step for step, _ in seen} == {0, 1, 2, 3}


def test_normalised_advantages_have_unit_deviation_and_keep_their_sign(make_pg, generator):
    states = torch.randn(5, 6, 2, generator=generator())
    trajectories = Trajectories(4, 6, torch.device("cpu"))
    trajectories.begin(make_pg().mdp)
    for step, sample in enumerate(states):
        trajectories.keep(step, sample)
    plain = make_pg(normalize_advantage=False).advantages(trajectories)
    scaled = make_pg(normalize_advantage=True).advantages(trajectories)
    assert float(scaled.std()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(scaled, plain / plain.std())


@pytest.mark.parametrize("kind", [SFT, SFTPG, SFTV])
def test_the_gradient_is_clipped_and_its_norm_reported(kind, mdp, make_denoiser):
    agent = kind(mdp, make_denoiser(), **{**SMALL, "n_generator": 1}, max_grad_norm=1e-4)
    reported = agent.train_round()["train/grad_norm"]
    norm = torch.stack([p.grad.norm() for p in agent.denoiser.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-4, rel=1e-2)
    assert reported > 2e-4


@pytest.mark.parametrize("learn_std", [False, True])
def test_gradient_checkpointing_changes_memory_only(learn_std, make_sft, count_calls):
    gradients, calls = [], []
    for checkpointing in (False, True):
        agent = make_sft(gradient_checkpointing=checkpointing, learn_std=learn_std, n_generator=1)
        calls.append(count_calls(agent.denoiser.body))
        agent.train_round()
        gradients.append([p.grad for p in agent.policy.parameters() if p.requires_grad])
    assert_close_by_norm(*gradients)
    assert len(calls[0]) == 8  # 4 for the critic, 4 for theta
    assert len(calls[1]) == 12  # and 4 recomputed


@pytest.mark.parametrize("last", [1, 3, 4, 7])
def test_the_gradient_goes_through_the_last_steps_only(last, make_sft):
    """From states of the critic's trajectories, with fresh noise; the critic gets no gradient."""
    agent = make_sft(gradient_steps=last, max_grad_norm=None)
    last = min(last, 4)  # of four steps
    assert agent.timesteps_per_round == 16 * (2 * 4 + 2 * last)
    trajectories = agent.collect()
    kept, agent.collect, agent.train_critic = [], lambda: trajectories, lambda _: {}
    agent.descend = lambda: kept.append([w.grad.clone() for w in agent.denoiser.parameters()])
    state = agent.generator.get_state()
    agent.train_round()
    assert all(weight.grad is None for weight in agent.critic.parameters())
    agent.generator.set_state(state)
    for number, found in enumerate(kept):
        rows = slice(16 * number, 16 * (number + 1))
        sample = trajectories.states[4 - last, rows]
        for step in range(4 - last, 4):
            mean, std = agent.policy.distribution(sample, step)
            sample = mean + std * torch.empty_like(sample).normal_(generator=agent.generator)
        agent.optimizer.zero_grad()
        (-agent.critic(sample).mean()).backward()
        expected = [weight.grad for weight in agent.denoiser.parameters()]
        assert_close_by_norm(found, expected)


def test_the_non_saturating_gradient_is_weighted_by_the_share_taken_for_fakes(make_sft):
    """d log s(f) = s(-f) df: in units of f's own gradient at the same samples."""
    agent = make_sft(
        gradient_steps=1,
        n_generator=1,
        non_saturating=True,
        objective="logistic",
        max_grad_norm=None,
    )
    trajectories, state = agent.collect(), agent.generator.get_state()
    agent.collect, agent.train_critic = lambda: trajectories, lambda _: {}
    agent.train_round()
    found = [weight.grad for weight in agent.denoiser.parameters()]
    again = make_sft(objective="logistic", gradient_steps=1)
    again.critic.load_state_dict(agent.critic.state_dict())
    again.generator.set_state(state)
    mean, std = again.policy.distribution(trajectories.states[3, :16], 3)
    f = again.critic(mean + std * torch.empty_like(mean).normal_(generator=again.generator))
    (-(torch.sigmoid(-f.detach()) * f).mean()).backward()
    expected = [weight.grad for weight in again.denoiser.parameters()]
    assert_close_by_norm(found, expected)
    with pytest.raises(ValueError, match="non_saturating is for a critic with the logistic"):
        make_sft(non_saturating=True)


def test_a_reward_of_ones_own_is_not_taken_for_a_log_density_ratio(mdp, make_denoiser):
    settings = {**SMALL, "objective": "logistic", "learning_rate": 0.0, "n_generator": 1}
    losses = [
        SFT(
            mdp, make_denoiser(), critic=lambda x: x.sum(1), non_saturating=flag, **settings
        ).train_round()["train/policy_loss"]
        for flag in (False, True)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("learn_std", [False, True])
def test_deviations_are_trained_only_if_asked(learn_std, make_pg):
    agent = make_pg(learn_std=learn_std)
    before = agent.tableau.noise.copy()
    for _ in range(3):
        agent.train_round()
    assert (agent.tableau.noise != before).all() == learn_std
    assert (agent.tableau.noise != before).any() == learn_std


def test_each_step_climbs_the_value_of_the_state_it_leads_to(make_v):
    """With fresh noise, f after the last step; the critic's weights get no gradient."""
    agent = make_v(n_generator=1, max_grad_norm=None)
    trajectories = agent.collect()
    starts = list(trajectories.starts(1))
    assert [step for step, _, _ in starts] == [0, 1, 2, 3]
    for step, episodes, states in starts:
        state = agent.generator.get_state()
        value = agent.value_after(episodes, states, step)
        agent.generator.set_state(state)
        noise = torch.empty_like(states).normal_(generator=agent.generator)
        mean, std = agent.policy.distribution(states, step)
        moved = (mean + std * noise)[None]
        expected = agent.critic.value(moved, torch.tensor([step + 1])) if step < 3 else None
        torch.testing.assert_close(value, agent.critic(moved[0]) if step == 3 else expected[0])
    agent.critic.optimizer.zero_grad()
    agent.train_critic = lambda _: {}
    agent.train_round()
    assert all(weight.grad is None for weight in agent.critic.parameters())
    assert all(weight.requires_grad for weight in agent.critic.parameters())


def test_micro_batches_of_a_value_gradient_share_its_mean(make_v):
    """Without noise in the policy and critic, the gradient is that of the whole batch."""
    gradients = []
    for size in (None, 5):
        agent = make_v(n_generator=1, micro_batch_size=size, max_grad_norm=None)
        agent.draw = torch.zeros_like
        trajectories = agent.collect()
        agent.collect = lambda kept=trajectories: kept
        agent.train_round()
        gradients.append([weight.grad for weight in agent.denoiser.parameters()])
    assert_close_by_norm(*gradients, rtol=1e-4)  # rounding alone makes 2e-6 to 2e-5


def test_the_environment_pays_what_the_critic_says(make_pg, generator):
    agent = make_pg()
    sample = torch.randn(5, 2, generator=generator())
    first = agent.mdp.terminal_reward(sample)
    assert torch.equal(first, agent.critic(sample))
    agent.train_round()
    assert not torch.equal(agent.mdp.terminal_reward(sample), first)


def test_a_critic_of_ones_own_is_used(mdp, make_denoiser):
    critic = IPMCritic(MLPCritic((2,), hidden=8), "weight-clip", coefficient=0.1)
    agent = SFT(mdp, make_denoiser(), critic=critic, **SMALL)
    agent.train_round()
    assert agent.critic is critic
    assert max(float(p.detach().abs().max()) for p in critic.parameters()) <= 0.1 + 1e-7


def rates_of(agent, rounds):
    """The learning rates of theta, f and V, round by round."""
    rates = []

    def note(*_):
        groups = agent.critic.optimizer.param_groups
        rates.append([agent.optimizer.param_groups[0]["lr"], groups[0]["lr"], groups[-1]["lr"]])
        return True

    agent.learn(rounds * agent.timesteps_per_round, note)
    return list(zip(*rates, strict=True))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", [SFT, SFTPG, SFTV])
def test_learning_rates_follow_their_schedules(kind, own, mdp, make_denoiser):
    """The critic's is its own, if it is one's own."""
    baseline = None if kind is SFT else make_baseline((2,), 4)
    critic = IPMCritic(
        make_critic((2,)),
        "none",
        baseline=baseline,
        learning_rate=3e-2,
        baseline_learning_rate=5e-2,
    )
    agent = kind(
        mdp,
        make_denoiser(),
        **SMALL,
        critic=critic if own else None,
        learning_rate=1e-4,
        lr_schedule="constant",
        critic_learning_rate=1e-2,
        critic_lr_schedule="linear",
    )
    theta, f, value = rates_of(agent, 4)
    assert theta == pytest.approx([1e-4 * min(1, n / 20) for n in (1, 2, 3, 4)])
    first = 3e-2 if own else 1e-2
    assert f == pytest.approx([first * left for left in (1, 0.75, 0.5, 0.25)])
    if kind is not SFT:
        first = 5e-2 if own else 1e-3
        assert value == pytest.approx([first * left for left in (1, 0.75, 0.5, 0.25)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SFT, SFTPG, SFTV])
def test_a_shifted_sampler_is_brought_back(kind, mdp, make_denoiser):
    """Fine-tuning finds the target again, judged by samples it never saw."""
    denoiser = make_denoiser()
    cloning = BehaviorCloning(mdp, denoiser, batch_size=256, ema=0.0)
    cloning.learn(300 * 256)
    with torch.no_grad():
        denoiser.body.out.bias += torch.tensor([0.8, -0.8])
    real = mdp.target.sample_fresh(2000)
    settings = {"batch_size": 128, "n_critic": 3, "n_generator": 2, "learning_rate": 2e-3}
    shares = []
    for seed in range(3):
        agent = kind(mdp, copy.deepcopy(denoiser), seed=seed, **settings)
        before = sliced_wasserstein(agent.sample(2000), real)
        agent.learn(120 * agent.timesteps_per_round)
        shares.append(sliced_wasserstein(agent.sample(2000), real) / before)
        assert before > 0.4
    assert statistics.median(shares) < 0.4


@pytest.mark.parametrize("n_generator", [1, 2, 7])
def test_the_default_minibatches_fit_the_buffer(n_generator, make_mdp, make_denoiser, process):
    """Also that of a sampler of one step."""
    mdp = make_mdp(schedule=Schedule(process, [4, 0]))
    agent = SFTPG(mdp, make_denoiser(), batch_size=8, n_generator=n_generator)
    agent.train_round()
    assert agent.sample(3).shape == (3, 2)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"n_critic": 0}, "n_critic must be at least 1"),
        ({"n_generator": 0}, "n_generator must be at least 1"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0, got -0.001"),
        ({"critic_learning_rate": math.nan}, "learning_rate must be at least 0, got nan"),
        ({"max_grad_norm": -1}, "max_grad_norm must be above 0, got -1"),
        ({"clip_range": 0}, "clip_range must be above 0, got 0"),
        ({"gae_lambda": 1.5}, "gae_lambda must be at least 0 and at most 1, got 1.5"),
        ({"noise_power": -1}, "noise_power must be at least 0, got -1"),
        ({"ema": 1}, "ema must be at least 0 and below 1, got 1"),
        ({"n_generator": 3, "minibatch_size": 50}, "128 transitions.* = 150"),
        ({"minibatch_size": 65}, "n_generator \\* minibatch_size = 130"),
        ({"solver": "ddim"}, "adds no noise"),
        ({"solver_options": {"variance": "small"}}, "adds no noise in step 3"),
        ({"regularizer": "nun"}, "unknown regularizer"),
        ({"critic_lr_schedule": "linea"}, "did you mean 'linear'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, complaint, make_pg):
    with pytest.raises(ValueError, match=complaint):
        make_pg(**settings)


def test_later_passes_of_the_critic_see_fakes_of_earlier_rounds(make_sft, make_pg, tmp_path):
    """The first pass sees the round's own, in order; what is drawn lies in the last batches."""
    agent = make_sft(critic_passes=3, critic_replay=4)
    seen, update = [], agent.critic.update
    agent.critic.update = lambda real, fake, *rest: seen.append(fake) or update(real, fake, *rest)
    rounds = []
    collect = agent.collect
    agent.collect = lambda: rounds.append(collect()) or rounds[-1]
    for number in range(3):
        seen.clear()
        agent.train_round()
        assert len(seen) == 6
        own = rounds[-1].states[-1]
        assert torch.equal(torch.cat(seen[:2]), own)
        kept = torch.cat([each.states[-1] for each in rounds[-2:]])
        for fake in seen[2:]:
            assert all((row == kept).all(1).any() for row in fake)
        earlier = [row for fake in seen[2:] for row in fake if not (row == own).all(1).any()]
        assert bool(earlier) == (number > 0)
    agent.save(tmp_path / "agent.safetensors")
    again = make_sft(critic_passes=3, critic_replay=4)
    again.resume(tmp_path / "agent.safetensors")
    assert torch.equal(again.replay.samples, agent.replay.samples)
    with pytest.raises(ValueError, match="critic_passes of 2 or more"):
        make_sft(critic_replay=4)
    with pytest.raises(ValueError, match="baseline regularizer needs the states"):
        make_pg(critic_passes=2, critic_replay=4)
