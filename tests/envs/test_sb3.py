import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from fewstep.envs import SB3VecEnv

STEPS, N = 3, 4
ID = "fewstep/SwissRoll-v0"


@pytest.fixture
def env(reward):
    return SB3VecEnv(ID, N, steps=STEPS, reward=reward, render_mode="rgb_array")


def run_episode(env, rng):
    for _ in range(STEPS):
        actions = rng.normal(size=(N, 2)).astype(np.float32)
        result = env.step(actions)
    return *result, actions


def test_observations_are_numpy_and_in_their_space(env):
    observation = env.reset()
    assert observation["sample"].shape == (N, 2)
    assert observation["timestep"].shape == (N, 1)
    for i in range(N):
        assert env.observation_space.contains({key: observation[key][i] for key in observation})
    assert np.isfinite(env.action_space.high).all()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodes_restart_by_themselves_whatever_the_mode_inside(make_vec, reward, mode):
    env = SB3VecEnv(make_vec(steps=STEPS, autoreset_mode=mode))
    rng = np.random.default_rng(0)
    first = env.reset()
    for _ in range(2):
        observation, rewards, dones, infos, actions = run_episode(env, rng)
        assert dones.tolist() == [True] * N
        assert rewards.dtype == np.float32
        np.testing.assert_allclose(rewards, reward(torch.as_tensor(actions)))
        np.testing.assert_array_equal(observation["timestep"], first["timestep"])
        for i, info in enumerate(infos):
            np.testing.assert_array_equal(info["terminal_observation"]["sample"], actions[i])
            assert info["terminal_observation"]["timestep"].tolist() == [0.0]
            assert info["TimeLimit.truncated"] is False


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_terminal_observation_has_the_condition_of_its_own_episode(make_vec, mode):
    inside = make_vec("Digits", 16, steps=STEPS, conditional=True, autoreset_mode=mode)
    env, plain = SB3VecEnv(inside), make_vec("Digits", 16, steps=STEPS, conditional=True)
    first, second = (plain.reset(seed=seed)[0]["condition"] for seed in (3, None))
    assert not torch.equal(first, second)
    env.seed(3)
    observation = env.reset()
    for _ in range(STEPS):
        np.testing.assert_array_equal(observation["condition"], first)
        observation, _, _, infos = env.step(np.zeros((16, 1, 8, 8), np.float32))
    ended = [info["terminal_observation"]["condition"] for info in infos]
    np.testing.assert_array_equal(ended, first)
    np.testing.assert_array_equal(observation["condition"], second)


def test_infos_are_empty_before_the_end(env):
    env.reset()
    _, rewards, dones, infos = env.step(np.zeros((N, 2), np.float32))
    assert infos == [{}] * N
    assert not rewards.any()
    assert not dones.any()


def test_seeds(env):
    env.seed(3)
    first, second = env.reset(), env.reset()
    env.seed(3)
    np.testing.assert_array_equal(first["sample"], env.reset()["sample"])
    np.testing.assert_array_equal(second["sample"], env.reset()["sample"])
    assert not np.array_equal(first["sample"], second["sample"])


def test_options_last_one_reset(env):
    noise = torch.randn(N, 2)
    env.set_options({"sample": noise})
    np.testing.assert_array_equal(env.reset()["sample"], noise)
    assert not np.array_equal(env.reset()["sample"], noise)


def test_attributes_and_methods_are_shared(env):
    assert env.get_attr("render_mode") == ["rgb_array"] * N
    assert env.get_attr("num_envs", indices=[0, 2]) == [N, N]
    assert not env.has_attr("no_such_thing")
    env.set_attr("reward", lambda sample: sample[:, 0])
    env.reset()
    assert run_episode(env, np.random.default_rng(0))[1].shape == (N,)
    assert len(env.env_method("render", indices=[1])) == 1
    assert env.env_is_wrapped(gym.Wrapper) == [False] * N


def test_render(env):
    env.reset()
    assert len(env.get_images()) == N
    assert env.render().shape == (512, 512, 3)


def test_images_without_a_render_mode_are_none(make_vec):
    env = SB3VecEnv(make_vec())
    env.reset()
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.get_images() == [None] * N


def test_wrong_environments_are_refused(make_vec):
    with pytest.raises(TypeError, match="must be a DiffusionVectorEnv or the id of one; got Sync"):
        SB3VecEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync"))
    with pytest.raises(TypeError, match="no further settings; got steps"):
        SB3VecEnv(make_vec(), steps=3)


def test_stock_ppo_learns_and_evaluates(env):
    model = PPO("MultiInputPolicy", VecMonitor(env), n_steps=2 * STEPS, batch_size=12, device="cpu")
    model.learn(4 * STEPS * N)
    assert model.ep_info_buffer[0]["l"] == STEPS
    mean, _ = evaluate_policy(model, VecMonitor(env), n_eval_episodes=N, deterministic=False)
    assert np.isfinite(mean)
