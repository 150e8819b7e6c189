import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import ArrayConversion, RecordEpisodeStatistics, RecordVideo

from fewstep.envs import VE, DiffusionVectorEnv, Schedule, Target, make_mdp

STEPS = 3  # of the environments made by the fixture


def run_episode(env, random_action):
    """Steps 1 to K; returns what each gave, and the last action."""
    results = []
    for _ in range(STEPS):
        action = random_action(env)
        results.append(env.step(action))
    return results, action


def assert_same(observation, other):
    assert observation.keys() == other.keys()
    assert all(torch.equal(observation[key], other[key]) for key in observation)


def times(env):
    return env.unwrapped.schedule.times.float()


# The contract that all autoreset modes share.


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_episode_until_its_last_step(make_vec, random_action, mode):
    env = make_vec(autoreset_mode=mode)
    assert env.metadata["autoreset_mode"] is mode
    observation, info = env.reset(seed=0)
    assert info == {}
    for step in range(STEPS - 1):
        assert observation["timestep"].tolist() == [float(times(env)[step])] * 4
        action = random_action(env)
        observation, reward, terminated, truncated, info = env.step(action)
        assert torch.equal(observation["sample"], action)
        assert reward.dtype == torch.float32
        assert terminated.dtype == truncated.dtype == torch.bool
        assert reward.tolist() == [0.0] * 4
        assert not (terminated | truncated).any()
        assert info == {}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_everything_returned_is_in_its_space(make_vec, random_action, mode):
    env = make_vec(autoreset_mode=mode)
    arrays = ArrayConversion(env, env_xp=torch, target_xp=np)
    observation, _ = arrays.reset(seed=0)
    assert env.observation_space.contains(observation)
    for _ in range(STEPS):
        action = random_action(env)
        assert env.action_space.contains(action.numpy())
        assert env.observation_space.contains(arrays.step(action.numpy())[0])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_last_step_rewards_the_finished_sample(make_vec, random_action, reward, mode):
    env = make_vec(autoreset_mode=mode)
    env.reset(seed=0)
    results, last = run_episode(env, random_action)
    _, final_reward, terminated, truncated, _ = results[-1]
    assert torch.equal(final_reward, reward(last))
    assert terminated.all()
    assert not truncated.any()


def test_next_step_returns_x0_and_resets_one_step_later(make_vec, random_action):
    env = make_vec()
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    env.reset(seed=0)
    results, last = run_episode(env, random_action)
    observation, *_, info = results[-1]
    assert torch.equal(observation["sample"], last)
    assert observation["timestep"].tolist() == [0.0] * 4
    assert info == {}

    # The action of the resetting step is ignored, whatever it is: a network may well give NaN at 0.
    observation, reward, terminated, truncated, info = env.step(torch.full((4, 2), math.nan))
    assert observation["timestep"].tolist() == [float(times(env)[0])] * 4
    assert reward.tolist() == [0.0] * 4
    assert not (terminated | truncated).any()
    assert info == {}
    results, last = run_episode(env, random_action)
    assert results[-1][2].all()


def test_same_step_returns_the_next_episode_and_x0_in_info(make_vec, random_action):
    env = make_vec(autoreset_mode="SAME_STEP")
    env.reset(seed=0)
    results, last = run_episode(env, random_action)
    observation, *_, info = results[-1]
    assert set(info) == {"final_obs", "_final_obs", "final_info", "_final_info"}
    assert torch.equal(info["final_obs"]["sample"], last)
    assert info["final_obs"]["timestep"].tolist() == [0.0] * 4
    assert info["_final_obs"].all()
    assert info["_final_info"].all()
    assert info["final_info"] == {}
    assert observation["timestep"].tolist() == [float(times(env)[0])] * 4
    results, _ = run_episode(env, random_action)
    assert results[-1][2].all()


def test_disabled_waits_for_reset(make_vec, random_action):
    env = make_vec(autoreset_mode="disabled")
    env.reset(seed=0)
    results, last = run_episode(env, random_action)
    assert torch.equal(results[-1][0]["sample"], last)
    with pytest.raises(ResetNeeded, match="the episode ended after 3 steps"):
        env.step(last)
    env.reset()
    env.step(last)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_modes_continue_the_same_stream_of_noise(make_vec, random_action, mode):
    env, plain = make_vec(autoreset_mode=mode), make_vec(autoreset_mode="disabled")
    env.reset(seed=5)
    plain.reset(seed=5)
    results, last = run_episode(env, random_action)
    if mode is AutoresetMode.SAME_STEP:
        observation = results[-1][0]
    elif mode is AutoresetMode.NEXT_STEP:
        observation = env.step(last)[0]
    else:
        observation = env.reset()[0]
    assert_same(observation, plain.reset()[0])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_episode_is_shown_and_paid_for_under_its_own_condition(make_vec, random_action, mode):
    def reward(sample, condition):
        return condition.float()

    settings = {"num_envs": 16, "conditional": True, "reward": reward}
    env = make_vec("Digits", autoreset_mode=mode, **settings)
    plain = make_vec("Digits", autoreset_mode="disabled", **settings)
    first, second = (plain.reset(seed=seed)[0]["condition"] for seed in (5, None))
    assert not torch.equal(first, second)
    env.reset(seed=5)
    results, last = run_episode(env, random_action)
    assert all(torch.equal(result[0]["condition"], first) for result in results[:-1])
    observation, paid, *_, info = results[-1]
    assert torch.equal(paid, first.float())
    if mode is AutoresetMode.SAME_STEP:
        final, following = info["final_obs"], observation
    else:
        final = observation
        begin = env.step if mode is AutoresetMode.NEXT_STEP else lambda _: env.reset()
        following = begin(last)[0]
    assert torch.equal(final["condition"], first)
    assert torch.equal(following["condition"], second)
    results, _ = run_episode(env, random_action)
    assert torch.equal(results[0][0]["condition"], second)
    assert torch.equal(results[-1][1], second.float())


def test_observations_are_new_objects(make_vec):
    env = make_vec(autoreset_mode="SAME_STEP")
    action = torch.zeros(4, 2)
    observations = [env.reset(seed=0)[0]]
    for _ in range(STEPS):
        observation, _, _, _, info = env.step(action)
        observations += [observation, *([info["final_obs"]] if info else [])]
    tensors = [action] + [o[key] for o in observations for key in o]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_steps_do_not_hold_on_to_gradients(make_vec):
    env = make_vec(steps=1)
    env.reset(seed=0)
    action = torch.zeros(4, 2, requires_grad=True)
    observation, reward, *_ = env.step(action)
    assert not observation["sample"].requires_grad
    assert not reward.requires_grad


# Seeds and options.


def test_seeds(make_vec):
    env, other = make_vec(), make_vec()
    first, _ = env.reset(seed=1)
    second, _ = env.reset()
    assert not torch.equal(first["sample"], second["sample"])
    assert not torch.equal(first["sample"], env.reset(seed=2)[0]["sample"])
    assert_same(first, other.reset(seed=1)[0])
    assert_same(second, other.reset()[0])


def test_option_schedule_lasts_one_episode(make_vec, random_action):
    env = make_vec(steps=10, autoreset_mode="SAME_STEP")
    schedule = Schedule(env.unwrapped.process, [10, 4, 0])
    observation, _ = env.reset(seed=0, options={"schedule": schedule})
    assert observation["timestep"][0] == 10
    assert env.step(random_action(env))[0]["timestep"][0] == 4
    observation, _, terminated, _, _ = env.step(random_action(env))
    assert terminated.all()
    assert env.step(random_action(env))[0]["timestep"][0] == 9
    env.reset(options={"schedule": "quadratic"})
    expected = Schedule.quadratic(env.unwrapped.process, 10).times[1]
    assert env.step(random_action(env))[0]["timestep"][0] == expected.float()


def test_option_sample_is_copied(make_vec):
    env = make_vec()
    noise = torch.randn(4, 2)
    observation, _ = env.reset(options={"sample": noise})
    assert torch.equal(observation["sample"], noise)
    assert observation["sample"].data_ptr() != noise.data_ptr()


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"sample": torch.zeros(3, 2)}, ValueError, "sample must have shape"),
        ({"sample": torch.full((4, 2), math.nan)}, ValueError, "sample holds NaN"),
        ({"sample": np.zeros((4, 2))}, TypeError, "sample must be a floating torch tensor"),
        ({"schedule": Schedule.karras(VE(), 3)}, ValueError, "the schedule is made for VE"),
        ({"schedule": "unifrom"}, ValueError, "did you mean 'uniform'"),
        ({"schedule": [3, 2, 0]}, TypeError, "must be a Schedule or a name"),
        ({"shedule": "uniform"}, ValueError, "did you mean 'schedule'"),
        ({"reset_mask": np.array([True, False, True, True])}, ValueError, "only be reset together"),
        ({"reset_mask": np.ones(3, bool)}, ValueError, r"must have shape \(4,\)"),
        ({"reset_mask": [True] * 4}, TypeError, "NumPy array of bool"),
        ({"reset_mask": np.ones(4)}, TypeError, "NumPy array of bool"),
    ],
)
def test_bad_options_are_refused(make_vec, options, error, complaint):
    with pytest.raises(error, match=complaint):
        make_vec().reset(options=options)


def test_a_full_reset_mask_is_a_reset(make_vec):
    observation, _ = make_vec().reset(seed=0, options={"reset_mask": np.ones(4, bool)})
    assert_same(observation, make_vec().reset(seed=0)[0])


# The reward, bad input, wrappers.


def test_the_reward_can_be_replaced_at_any_time(make_vec, random_action):
    env = make_vec().unwrapped
    env.reset(seed=0, options={"schedule": Schedule(env.process, [3, 0])})
    env.reward = lambda sample: sample[:, 0]
    action = random_action(env)
    assert torch.equal(env.step(action)[1], action[:, 0])
    with pytest.raises(TypeError, match="reward must be callable"):
        env.reward = 3


def test_a_bad_reward_leaves_the_step_to_be_repeated(make_vec, reward):
    env = make_vec(steps=1, reward=lambda sample: sample.sum(1) * math.nan).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="returned NaN"):
        env.step(torch.zeros(4, 2))
    env.reward = reward
    assert env.step(torch.zeros(4, 2))[2].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_arrays_act_as_tensors_do(make_vec, dtype):
    env, same = make_vec(), make_vec()
    env.reset(seed=0)
    same.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(STEPS):
        # Reversed: no tensor can share the memory of an array with negative strides.
        array = (env.action_space.sample()[::-1] / 100).astype(dtype)
        result, expected = env.step(array), same.step(torch.tensor(array.copy()))
        assert result[0]["sample"].dtype == torch.float32
        assert_same(result[0], expected[0])
        assert torch.equal(result[1], expected[1])
    env.reset()
    assert env.step(env.action_space.sample())[0]["sample"].shape == (4, 2)


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (np.zeros((4, 2), np.int64), TypeError),
        (np.zeros((4, 3)), ValueError),
        (np.zeros(2, np.float32), ValueError),
        (np.full((4, 2), math.nan, np.float32), ValueError),
        ([[0.0, 0.0]] * 4, TypeError),
        (torch.zeros(4, 2, dtype=torch.int32), TypeError),
        (torch.zeros(4, 3), ValueError),
        (torch.zeros(2), ValueError),
        (torch.full((4, 2), math.nan), ValueError),
        (torch.full((4, 2), math.inf), ValueError),
    ],
)
def test_bad_actions_are_refused(make_vec, action, error):
    env = make_vec()
    env.reset(seed=0)
    with pytest.raises(error, match="action"):
        env.step(action)


def test_step_and_render_before_reset_are_refused(make_vec):
    env = make_vec(render_mode="rgb_array")
    with pytest.raises(ResetNeeded):
        env.step(torch.zeros(4, 2))
    with pytest.raises(ResetNeeded):
        env.render()


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"num_envs": 0}, ValueError, "num_envs must be at least 1"),
        ({"autoreset_mode": "next"}, ValueError, "did you mean 'NEXT_STEP'"),
        ({"render_mode": "human"}, ValueError, "unknown render mode 'human'"),
        ({"stps": 3}, TypeError, "stps"),
        ({"reward": "mmd"}, TypeError, "reward must be callable or None, got .mmd"),
    ],
)
def test_bad_settings_are_refused(make_vec, settings, error, complaint):
    with pytest.raises(error, match=complaint):
        make_vec(**settings)


def test_a_finished_mdp_takes_no_settings(reward):
    mdp = make_mdp("Moons", steps=2, reward=reward)
    assert DiffusionVectorEnv(mdp, 3).mdp is mdp
    with pytest.raises(TypeError, match="no further settings; got steps"):
        DiffusionVectorEnv(mdp, 3, steps=2)


def test_bounds_are_loose_and_scale_with_noise_and_data(make_vec):
    assert make_vec().single_action_space.high.max() == 100
    assert make_vec(process=VE()).single_action_space.high.max() == 8000
    wide = Target.from_samples(torch.full((3, 2), 4.5))
    assert make_vec(target=wide).single_action_space.high.max() == 500


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_record_episode_statistics(make_vec, random_action, mode):
    env = make_vec(autoreset_mode=mode)
    env = RecordEpisodeStatistics(ArrayConversion(env, env_xp=torch, target_xp=np))
    env.reset(seed=0)
    for _ in range(2):
        for _ in range(STEPS):
            _, reward, _, _, info = env.step(random_action(env).numpy())
        assert info["episode"]["l"].tolist() == [STEPS] * 4
        np.testing.assert_allclose(info["episode"]["r"], reward)
        if mode is AutoresetMode.DISABLED:
            env.reset()
        elif mode is AutoresetMode.NEXT_STEP:
            env.step(random_action(env).numpy())
    assert env.episode_count == 8


def test_render_and_record_video(make_vec, random_action, tmp_path):
    env = make_vec(render_mode="rgb_array", autoreset_mode="disabled")
    video = RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    video.reset(seed=0)
    run_episode(video, random_action)
    frames = env.render()
    video.close()
    assert len(frames) == 4
    assert all(frame.dtype == np.uint8 and frame.shape == (256, 256, 3) for frame in frames)
    assert [path.name for path in tmp_path.glob("videos/*")] == ["rl-video-episode-0.mp4"]


def test_render_without_a_mode_warns(make_vec):
    env = make_vec()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.render() is None


def test_the_spec_rebuilds_the_environment(make_vec):
    env = gym.make_vec("fewstep/Moons-v0", 2, steps=4, schedule="quadratic")
    again = gym.make_vec(env.unwrapped.spec)
    assert again.num_envs == 2
    assert again.unwrapped.schedule == env.unwrapped.schedule
