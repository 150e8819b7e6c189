"""The contracts of Gymnasium's wrappers, and of clients that want arrays of equal dimensions."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import (
    ClipAction,
    NormalizeReward,
    NumpyToTorch,
    RecordEpisodeStatistics,
)

from fewstep.envs import DiffusionVectorEnv, NumpyVectorEnv, SB3VecEnv, Schedule

ID, STEPS, N = "fewstep/SwissRoll-v0", 3, 4


@pytest.fixture
def make(reward):
    def make(**settings):
        return gym.make_vec(ID, N, **{"steps": STEPS, "reward": reward, "numpy": True, **settings})

    return make


def test_it_speaks_numpy_and_does_what_the_torch_shell_does(make):
    env, torch_env = make(), make(numpy=False)
    assert isinstance(env, NumpyVectorEnv)
    assert isinstance(torch_env, DiffusionVectorEnv)
    observation, other = env.reset(seed=3)[0], torch_env.reset(seed=3)[0]
    rng = np.random.default_rng(0)
    for _ in range(2 * (STEPS + 1)):
        assert observation in env.observation_space
        assert observation["timestep"].shape == (N, 1)
        np.testing.assert_array_equal(observation["sample"], other["sample"].numpy())
        np.testing.assert_array_equal(observation["timestep"][:, 0], other["timestep"].numpy())
        action = rng.normal(size=(N, 2))
        observation, *numbers, info = env.step(action)
        other, *tensors, _ = torch_env.step(torch.from_numpy(action).float())
        for number, tensor in zip(numbers, tensors, strict=True):
            assert type(number) is np.ndarray
            np.testing.assert_array_equal(number, tensor.numpy())
        assert [number.dtype for number in numbers] == [np.float32, bool, bool]
        assert info == {}


def test_another_reward_counts(make):
    env = make()
    env.reward = lambda sample: sample[:, 0]
    env.reset(seed=0)
    action = np.arange(2.0 * N).reshape(N, 2)
    for _ in range(STEPS):
        gained = env.step(action)[1]
    np.testing.assert_array_equal(gained, action[:, 0])
    assert env.reward is env.mdp.reward


def test_the_final_observation_is_numpy_too(make):
    env = make(autoreset_mode="SAME_STEP")
    env.reset(seed=0)
    action = np.full((N, 2), 0.5, np.float32)
    for _ in range(STEPS):
        observation, _, terminated, _, info = env.step(action)
    assert terminated.all()
    np.testing.assert_array_equal(info["final_obs"]["sample"], action)
    np.testing.assert_array_equal(info["final_obs"]["timestep"], np.zeros((N, 1)))
    assert type(info["_final_obs"]) is np.ndarray
    assert observation["timestep"].tolist() == [[STEPS]] * N


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_gymnasium_records_episodes(make, mode, reward):
    env = RecordEpisodeStatistics(ClipAction(make(autoreset_mode=mode)))
    env.reset(seed=0)
    action = np.full((N, 2), 0.5, np.float32)
    for _ in range(STEPS):
        info = env.step(action)[-1]
    np.testing.assert_allclose(info["episode"]["r"], np.full(N, -0.5))
    assert info["episode"]["l"].tolist() == [STEPS] * N
    assert list(env.return_queue) == pytest.approx([-0.5] * N)


def test_gymnasium_normalizes_rewards(make):
    env = NormalizeReward(make(autoreset_mode="SAME_STEP"), gamma=1.0)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(40 * STEPS):
        _, gained, terminated, _, _ = env.step(rng.normal(size=(N, 2)))
        last = gained if terminated.all() else 0 * gained
        np.testing.assert_array_equal(gained, last)  # nothing before the end
    assert np.abs(last).max() < 10


def test_gymnasium_turns_it_back_into_torch(make):
    env = NumpyToTorch(make())
    observation, _ = env.reset(seed=0)
    observation, gained, *_ = env.step(observation["sample"])
    assert isinstance(gained, torch.Tensor)
    # What TorchRL's CatTensors concatenates.
    assert torch.cat([observation["sample"], observation["timestep"]], -1).shape == (N, 3)


def test_options_and_agents(make):
    env = make()
    start = np.arange(2.0 * N).reshape(N, 2)
    schedule = Schedule(env.mdp.process, [2, 0])
    observation, _ = env.reset(options={"sample": start, "schedule": schedule})
    np.testing.assert_array_equal(observation["sample"], start)
    assert observation["timestep"].tolist() == [[2]] * N
    assert SB3VecEnv(env).num_envs == N


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("action", [np.zeros((N, 2), int), np.zeros((N, 2), bool)])
def test_actions_that_are_no_floating_numbers(make, numpy, action):
    env = make(numpy=numpy)
    env.reset(seed=0)
    with pytest.raises(TypeError, match=f"action must hold floating numbers.* {action.dtype}"):
        env.step(action)


def test_integer_actions_on_the_single_shell():
    env = gym.make(ID, steps=2, disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(TypeError, match=r"action must hold floating numbers.* int64"):
        env.step(np.zeros(2, int))


def test_wrappers_find_the_horizon_and_nothing_is_truncated(make):
    env = gym.make(ID, steps=STEPS)
    assert env.spec.max_episode_steps == STEPS
    assert make().spec.max_episode_steps == STEPS
    assert make(numpy=False).spec.max_episode_steps == STEPS
    assert gym.make_vec(ID, 2, steps=STEPS, vectorization_mode="sync").envs[0].spec is not None
    env.reset(seed=0)
    for _ in range(STEPS):
        _, _, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
        assert truncated is False
    assert terminated is True
    again = gym.make_vec(make().spec)  # which hands max_episode_steps to the constructor
    assert again.spec.max_episode_steps == again.unwrapped.mdp.steps == STEPS


def test_another_horizon_is_refused(make):
    with pytest.raises(ValueError, match=r"max_episode_steps=2, but .* 3 steps.*steps=2"):
        make(max_episode_steps=2)
    assert make(max_episode_steps=STEPS).mdp.steps == STEPS


@pytest.mark.parametrize("numpy", [True, False])
def test_an_unknown_setting_names_the_known_ones(make, numpy):
    with pytest.raises(TypeError, match=r"unknown setting of an environment 'stps'.*steps"):
        make(stps=3, numpy=numpy)
    with pytest.raises(TypeError, match="unknown setting of an environment 'stps'"):
        gym.make(ID, stps=3)
    with pytest.raises(TypeError, match="numpy must be True or False, got 'no'"):
        make(numpy="no")
