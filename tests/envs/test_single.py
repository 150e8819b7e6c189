import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordVideo
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from fewstep.envs import ENVIRONMENTS, Schedule
from fewstep.envs.targets.images import IMAGE_SETS

# tests/envs/test_images.py has those that need data files.
every_environment = pytest.mark.parametrize(
    "name", [name for name in ENVIRONMENTS if name not in IMAGE_SETS]
)
# Advice that a sampler cannot follow: its actions are samples, which no box normalises.
NORMALIZED = "For Box action spaces, we recommend using a symmetric and normalized space"


@pytest.fixture
def make(reward):
    def make(name="SwissRoll", **settings):
        return gym.make(f"fewstep/{name}-v0", **{"reward": reward, "steps": 3, **settings})

    return make


@every_environment
def test_gymnasium_check_env(make, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(make(name, render_mode="rgb_array").unwrapped)
    assert [str(w.message) for w in caught if NORMALIZED not in str(w.message)] == []


@every_environment
def test_sb3_check_env(make, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sb3_check_env(make(name, render_mode="rgb_array"), skip_render_check=False)
    # The rest is advice for uint8 images and CnnPolicy, which float samples do not want.
    advice = ["symmetric and normalized", *(["image", "CnnPolicy"] if name == "Digits" else [])]
    messages = [str(w.message) for w in caught]
    assert [m for m in messages if not any(word in m for word in advice)] == []


@every_environment
def test_an_episode(make, reward, name):
    env = make(name)
    observation, info = env.reset(seed=0)
    assert info == {}
    for step in range(3):
        assert env.observation_space.contains(observation)
        assert observation["timestep"] == env.unwrapped.schedule.times[step].float().item()
        action = env.action_space.sample() / 100
        observation, gained, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(observation["sample"], action)
        assert terminated is (step == 2)
        assert truncated is False
        assert info == {}
    assert observation["timestep"] == 0
    assert gained == pytest.approx(-np.square(action).sum(), rel=1e-5)
    with pytest.raises(ResetNeeded):
        env.step(action)


def test_seeds(make):
    env = make()
    first, second = env.reset(seed=3)[0], env.reset()[0]
    assert not np.array_equal(first["sample"], second["sample"])
    assert not np.array_equal(first["sample"], env.reset(seed=4)[0]["sample"])
    np.testing.assert_array_equal(first["sample"], env.reset(seed=3)[0]["sample"])
    np.testing.assert_array_equal(second["sample"], env.reset()[0]["sample"])


def test_a_single_environment_is_a_batch_of_one(make, make_vec):
    single, batch = make().reset(seed=9)[0], make_vec(num_envs=1).reset(seed=9)[0]
    np.testing.assert_array_equal(single["sample"], batch["sample"][0])


def test_options(make):
    env = make()
    schedule = Schedule(env.unwrapped.process, [3, 0])
    options = {"schedule": schedule, "sample": np.array([0.1, 0.2])}
    observation, _ = env.reset(options=options)
    np.testing.assert_allclose(observation["sample"], [0.1, 0.2], rtol=1e-6)
    assert env.step(np.zeros(2, np.float32))[2] is True
    assert options["sample"].shape == (2,)


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (np.zeros(3, np.float32), ValueError),
        (np.zeros(2, np.int64), TypeError),
        (np.array([0.0, np.nan]), ValueError),
        (np.array([np.inf, 0.0]), ValueError),
    ],
)
def test_bad_actions_are_refused(make, action, error):
    env = make()
    env.reset(seed=0)
    with pytest.raises(error, match="action"):
        env.step(action)


def test_the_reward_can_be_replaced(make):
    env = make(steps=1)
    env.reset(seed=0)
    env.unwrapped.reward = lambda sample: sample[:, 1]
    assert env.unwrapped.reward is env.unwrapped.mdp.reward
    assert env.step(np.array([0.0, 2.5]))[1] == 2.5


@pytest.mark.parametrize("name", ["SwissRoll", "Digits"])
def test_record_video(make, tmp_path, name):
    env = RecordVideo(make(name, render_mode="rgb_array"), str(tmp_path / "videos"))
    env.reset(seed=0)
    while not env.step(env.action_space.sample() / 100)[2]:
        pass
    env.close()
    assert [path.name for path in tmp_path.glob("videos/*")] == ["rl-video-episode-0.mp4"]
