"""Policies for other people's loops: SB3's PPO on a denoiser, any tableau in a Gymnasium loop."""

import copy
import statistics

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import obs_as_tensor

from fewstep.agents import SFTPG, Denoiser, DenoiserPolicy, SolverPolicy, Tableau
from fewstep.agents.samplers.gaussian import GaussianChain
from fewstep.agents.solvers import ancestral, ddim, heun
from fewstep.envs import (
    DiffusionEnv,
    DiffusionMDP,
    DiffusionVectorEnv,
    DiscreteVP,
    SB3VecEnv,
    Schedule,
)


@pytest.fixture
def make_vec_env(make_mdp, reward):
    return lambda n: SB3VecEnv(DiffusionVectorEnv(make_mdp(reward=reward), n))


@pytest.fixture
def parts(make_denoiser, mdp):
    return {"denoiser": make_denoiser(), "tableau": ancestral(mdp.schedule, "beta")}


@pytest.fixture
def files(parts, tmp_path):
    """The same by name, which is what SB3 can pickle without pickling a network."""
    paths = {key: tmp_path / key for key in parts}
    for key, path in paths.items():
        parts[key].save(path)
    return {key: str(path) for key, path in paths.items()}


def make_ppo(vec_env, policy_kwargs, **settings):
    settings = {"n_steps": 4, "batch_size": 256, "seed": 0, "device": "cpu", **settings}
    return PPO(DenoiserPolicy, vec_env, policy_kwargs=policy_kwargs, **settings)


@pytest.mark.slow
def test_ppo_of_sb3_raises_the_reward_of_a_sampler(make_vec_env, parts):
    """The reward is minus the squared distance to (1, 1): -4 for noise, -25 for this network."""
    settings = {"learning_rate": 3e-3, "n_epochs": 4, "gamma": 1.0, "gae_lambda": 1.0}
    rewards = []
    for seed in range(3):
        vec_env = make_vec_env(256)
        model = make_ppo(vec_env, copy.deepcopy(parts), seed=seed, **settings)
        before, _ = evaluate_policy(model, vec_env, 1024, deterministic=False, warn=False)
        model.learn(24 * 4 * 256)
        rewards.append(evaluate_policy(model, vec_env, 1024, deterministic=False, warn=False)[0])
        assert before < -5
    # The last transition alone, variance 0.1 in two dimensions, costs 0.2.
    assert -0.4 < statistics.median(rewards) < -0.15


@pytest.mark.parametrize("log_density", ["sum", "mean"])
def test_the_density_of_an_action_is_the_same_when_acting_and_learning(
    log_density, make_vec_env, parts
):
    """PPO's ratio is then 1 before the first update."""
    vec_env = make_vec_env(64)
    policy = make_ppo(vec_env, {**parts, "log_density": log_density}).policy
    observation = obs_as_tensor(vec_env.reset(), "cpu")
    for j in range(4):
        with torch.no_grad():
            action, value, log_density_then = policy(observation)
        again, log_density_now, entropy = policy.evaluate_actions(observation, action)
        assert torch.equal(log_density_now, log_density_then)
        assert torch.equal(again, value)
        assert torch.equal(policy.predict_values(observation), value)
        assert value.shape == (64, 1)
        normal = torch.distributions.Normal(
            *(part.detach() for part in policy.chain.distribution(observation["sample"], j))
        )
        densities = normal.log_prob(action)
        expected = densities.sum(1) if log_density == "sum" else densities.mean(1)
        torch.testing.assert_close(log_density_then, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropy[0], 2 * normal.entropy().flatten()[0])
        distribution = policy.get_distribution(observation)
        torch.testing.assert_close(
            distribution.log_prob(action), densities.sum(1), rtol=1e-4, atol=1e-4
        )
        vec_env.step(action.numpy())
        observation = {
            "sample": action,
            "timestep": torch.full((64, 1), float(vec_env.env.mdp.schedule.times[j + 1])),
        }


def test_ppo_starts_from_ratio_1(make_vec_env, parts):
    """One epoch of one minibatch measures the KL before any update: it is 0."""
    model = make_ppo(make_vec_env(64), parts, batch_size=256, n_epochs=1)
    model.learn(256)
    assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert model.logger.name_to_value["train/clip_fraction"] == 0


def test_ppo_is_saved_and_loaded_by_file_names(make_vec_env, files, tmp_path):
    vec_env = make_vec_env(16)
    model = make_ppo(vec_env, {**files, "learn_std": True}, batch_size=32)
    model.learn(128)
    model.save(tmp_path / "ppo")
    loaded = PPO.load(tmp_path / "ppo", vec_env)
    observation = vec_env.reset()
    for a, b in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    actions = [m.predict(observation, deterministic=True)[0] for m in (model, loaded)]
    np.testing.assert_array_equal(*actions)
    assert actions[0].shape == (16, 2)
    loaded.learn(64)
    model.policy.save(tmp_path / "policy")
    policy = DenoiserPolicy.load(tmp_path / "policy")
    np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], actions[0])


def test_deviations_are_trained_only_if_asked(make_vec_env, parts):
    for learn_std in (False, True):
        model = make_ppo(make_vec_env(16), {**parts, "learn_std": learn_std}, batch_size=32)
        model.learn(64)
        moved = model.policy.chain.export().noise / parts["tableau"].noise - 1
        assert (np.abs(moved) > 1e-5).all() == learn_std


def test_predict_of_the_policy_is_the_transition(make_vec_env, parts, generator):
    vec_env = make_vec_env(8)
    policy = make_ppo(vec_env, parts, batch_size=32).policy
    observation = vec_env.reset()
    mean = policy.chain.distribution(torch.from_numpy(observation["sample"]), 0)[0]
    action, _ = policy.predict(observation, deterministic=True)
    np.testing.assert_allclose(action, mean.detach().numpy(), rtol=1e-5, atol=1e-6)
    many = {key: np.repeat(value[:1], 20_000, 0) for key, value in observation.items()}
    torch.manual_seed(0)
    noise = policy.predict(many)[0] - action[0]
    assert np.abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(parts["tableau"].noise[0], rel=0.02)
    single = {key: value[0] for key, value in observation.items()}
    np.testing.assert_allclose(
        policy.predict(single, deterministic=True)[0], action[0], rtol=1e-5, atol=1e-6
    )


# -- solvers as policies -------------------------------------------------------------------------


@pytest.fixture
def tables(mdp, process):
    rng = np.random.default_rng(0)
    multistep = Tableau(
        "multistep",
        process,
        mdp.schedule.times.numpy(),
        rng.uniform(0.5, 1, 4),
        np.tril(rng.normal(size=(4, 4))),
        np.zeros(4),
        anchors=np.array([0, 0, 1, 3]),
        output="sample",
    )
    return {"ddim": ddim(mdp.schedule), "multistep": multistep}


@pytest.mark.parametrize("name", ["ddim", "multistep"])
def test_a_gymnasium_loop_gives_the_sample(name, tables, mdp, make_denoiser, generator):
    policy = SolverPolicy(tables[name], make_denoiser())
    noise = torch.randn(3, 2, generator=generator())
    whole = policy.sample(3, noise=noise, return_trajectory=True)
    assert whole.shape == (5, 3, 2)
    env = DiffusionEnv(mdp)
    for row in range(3):
        observation, _ = env.reset(options={"sample": noise[row].numpy()})
        state = None
        for j in range(4):
            action, state = policy.predict(observation, state)
            observation, _, terminated, _, _ = env.step(action)
            expected = whole[j + 1, row].numpy()
            np.testing.assert_allclose(observation["sample"], expected, rtol=1e-4, atol=1e-5)
        assert terminated
    torch.testing.assert_close(policy.sample(3, noise=noise), whole[-1])


@pytest.mark.parametrize("name", ["ddim", "multistep"])
def test_sb3_evaluates_a_solver_over_several_episodes(
    name, tables, make_vec_env, make_denoiser, reward
):
    """`episode_start` drops the memory of the last episode."""
    vec_env = make_vec_env(8)
    policy = SolverPolicy(tables[name], make_denoiser())
    vec_env.seed(5)
    rewards, lengths = evaluate_policy(policy, vec_env, 24, return_episode_rewards=True, warn=False)
    assert lengths == [4] * 24
    vec_env.seed(5)
    first = torch.from_numpy(vec_env.reset()["sample"])
    expected = reward(policy.sample(8, noise=first))
    np.testing.assert_allclose(rewards[:8], expected.numpy(), rtol=1e-4)


def test_a_stochastic_table_draws_from_the_generator(mdp, make_denoiser, generator):
    policy = SolverPolicy(ancestral(mdp.schedule, "beta"), make_denoiser())
    observation = {"sample": np.zeros((5, 2), np.float32), "timestep": np.full((5, 1), 4)}
    one, again, other = (
        policy.predict(observation, generator=generator(seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    draws = [policy.sample(5, shape=(2,), generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    # The body says its shape; a foreign one does not.
    assert torch.equal(policy.sample(5, generator=generator(0)), draws[0])
    foreign = Denoiser(torch.nn.Identity(), mdp.process)
    with pytest.raises(ValueError, match=r"noise=.*shape"):
        SolverPolicy(ancestral(mdp.schedule, "beta"), foreign).sample(5)


def test_too_long_an_episode_is_refused(tables, make_denoiser):
    policy = SolverPolicy(tables["ddim"], make_denoiser())
    state = None
    for time in (4, 3, 2, 1):
        observation = {"sample": np.zeros((5, 2), np.float32), "timestep": np.full((5, 1), time)}
        _, state = policy.predict(observation, state)
    with pytest.raises(ValueError, match="has 4 steps"):
        policy.predict(observation, state)
    observation["timestep"] = np.full((5, 1), 4)
    policy.predict(observation, state, episode_start=np.ones(5, bool))


def test_nfe_of_a_solver_is_counted_in_network_calls(tables, make_denoiser, count_calls):
    policy = SolverPolicy(tables["multistep"], make_denoiser())
    calls = count_calls(policy.denoiser.body)
    policy.sample(6, shape=(2,))
    assert len(calls) == policy.nfe == 4
    assert calls.samples == 24


def test_a_table_of_another_process_is_refused(tables, make_denoiser, generator):
    other = DiscreteVP([0.1, 0.2, 0.5, 0.55])
    table = ddim(Schedule.uniform(other, 4))
    with pytest.raises(ValueError, match=r"'ddim' is made for DiscreteVP.*the denoiser for"):
        SolverPolicy(table, make_denoiser())
    with pytest.raises(ValueError, match=r"is made for"):
        table.sample(make_denoiser(), torch.randn(3, 2, generator=generator()))


# -- the clock: a policy, its tableau and its environment agree on process and times --------------


def test_a_table_on_another_grid_is_refused_before_training(make_vec_env, parts, process):
    table = ancestral(Schedule(process, [4, 2, 0]), "beta")
    with pytest.raises(ValueError, match=r"'ancestral.*' has 2 steps at.*4.0, 2.0, 0.0.* has 4 at"):
        make_ppo(make_vec_env(8), {**parts, "tableau": table}, batch_size=32)
    table = ancestral(Schedule(process, [4, 3, 2, 0.5, 0]), "beta")
    with pytest.raises(ValueError, match=r"at the times .*0\.5"):
        make_ppo(make_vec_env(8), {**parts, "tableau": table}, batch_size=32)


def test_three_processes_must_be_one(make_mdp, parts):
    other = DiscreteVP([0.1, 0.2, 0.5, 0.55])
    mdp = make_mdp()
    elsewhere = DiffusionMDP(mdp.target, other, Schedule.uniform(other, 4), mdp.reward)
    with pytest.raises(ValueError, match=r"'ancestral.*' is made for DiscreteVP.*environment has"):
        make_ppo(SB3VecEnv(DiffusionVectorEnv(elsewhere, 8)), parts, batch_size=32)
    table = ancestral(elsewhere.schedule, "beta")
    with pytest.raises(ValueError, match=r"'ancestral.*' is made for .*, the denoiser for"):
        make_ppo(
            SB3VecEnv(DiffusionVectorEnv(elsewhere, 8)), {**parts, "tableau": table}, batch_size=32
        )
    with pytest.raises(ValueError, match=r"'ancestral.*' is made for .*, the denoiser for"):
        GaussianChain(parts["denoiser"], table)


def test_no_time_is_taken_for_another(make_vec_env, parts):
    """What passes is the rounding of float32; an episode on another schedule is refused."""
    policy = make_ppo(make_vec_env(8), parts, batch_size=32).policy
    observation = {"sample": torch.zeros(4, 2), "timestep": torch.tensor([4.0, 1.0, 3.0, 0.0])}
    assert policy.chain.steps_at(observation["timestep"]).tolist() == [0, 3, 1, 3]
    near = np.nextafter(np.float32([4, 3, 2, 1]), np.float32(9))
    assert policy.chain.steps_at(torch.from_numpy(near)).tolist() == [0, 1, 2, 3]
    observation["timestep"][2] = 2.99
    with pytest.raises(
        ValueError, match=r"no step of 'ancestral.*' is at time 2\.99.*\[4\.0, 3\.0"
    ):
        policy.predict_values(observation)


@pytest.mark.parametrize("times", [[4, 0], [4, 2, 0], [3, 2, 1, 0.5, 0]])
def test_a_solver_in_an_environment_of_other_times_is_refused(
    times, tables, make_mdp, process, make_denoiser
):
    env = DiffusionEnv(make_mdp(schedule=Schedule(process, times)))
    policy, state = SolverPolicy(tables["multistep"], make_denoiser()), None
    observation, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"Step \d of the 4 of 'multistep' is at time"):
        for _ in range(len(times)):
            action, state = policy.predict(observation, state)
            observation = env.step(action)[0]


def test_an_episode_that_ends_before_the_table_is_refused(process, make_mdp, make_denoiser):
    """Heun's times repeat, so no environment shows them; only where the episode ends tells."""
    table = heun(Schedule(process, [4, 2, 0]))
    assert table.steps == 3
    policy = SolverPolicy(table, make_denoiser())
    env = DiffusionEnv(make_mdp(schedule=Schedule(process, [4, 3, 1, 0])))
    noise = np.array([0.5, -1.5], np.float32)
    observation, state = env.reset(options={"sample": noise})[0], None
    for _ in range(3):
        action, state = policy.predict(observation, state)
        observation, _, finished, _, _ = env.step(action)
    assert finished
    expected = policy.sample(1, noise=torch.from_numpy(noise)[None])[0].numpy()
    np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)
    short = SB3VecEnv(DiffusionVectorEnv(make_mdp(schedule=Schedule(process, [4, 2, 0])), 4))
    with pytest.raises(ValueError, match=r"ended after 2 of the 3 steps of 'heun'"):
        evaluate_policy(policy, short, 8, warn=False)


def test_a_model_does_not_go_on_in_another_process(make_mdp, make_vec_env, files, tmp_path):
    model = make_ppo(make_vec_env(8), files, batch_size=32)
    model.save(tmp_path / "ppo")
    other = DiscreteVP([0.1, 0.2, 0.5, 0.55])
    mdp = make_mdp()
    elsewhere = DiffusionMDP(mdp.target, other, Schedule.uniform(other, 4), mdp.reward)
    env = SB3VecEnv(DiffusionVectorEnv(elsewhere, 8))
    for go_on in (lambda: model.set_env(env), lambda: PPO.load(tmp_path / "ppo", env)):
        with pytest.raises(
            ValueError, match=r"spaces do not match: .*DiscreteVP.* != .*DiscreteVP"
        ):
            go_on()
    model.set_env(make_vec_env(8))


def test_samples_at_different_times(tables, mdp, make_denoiser):
    """Each row is asked at its own time, or the batch is refused; a finished sample stays."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(5, 2, generator=generator).numpy()
    times = np.float32([4, 1, 3, 1, 0])
    agent = SFTPG(mdp, make_denoiser(), batch_size=8)
    action, _ = agent.predict({"sample": sample, "timestep": times}, deterministic=True)
    column, _ = agent.predict({"sample": sample, "timestep": times[:, None]}, deterministic=True)
    np.testing.assert_array_equal(action, column)
    for row in range(4):
        alone = {"sample": sample[row], "timestep": times[row : row + 1]}
        expected, _ = agent.predict(alone, deterministic=True)
        np.testing.assert_allclose(action[row], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(action[4], sample[4])
    policy = SolverPolicy(tables["multistep"], make_denoiser())
    with pytest.raises(ValueError, match="different times, 0 to 4"):
        policy.predict({"sample": sample, "timestep": times})


# -- what algorithms such as TRPO ask of a policy -------------------------------------------------


@pytest.mark.parametrize("learn_std", [False, True])
def test_every_parameter_can_be_differentiated_by(learn_std, make_vec_env, parts):
    """sb3-contrib's TRPO differentiates by every parameter whose name lacks "value"."""
    vec_env = make_vec_env(16)
    policy = make_ppo(vec_env, {**parts, "learn_std": learn_std}, batch_size=64).policy
    assert "chain.log_std" in policy.state_dict()
    assert ("chain.log_std" in dict(policy.named_parameters())) == learn_std
    observation = obs_as_tensor(vec_env.reset(), "cpu")
    values, log_density, _ = policy.evaluate_actions(observation, torch.zeros(16, 2))
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad, name
        (gradient,) = torch.autograd.grad(
            (values + log_density).sum(), parameter, retain_graph=True, allow_unused=True
        )
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
