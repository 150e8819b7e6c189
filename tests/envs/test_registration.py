import gymnasium as gym
import pytest
import torch

from fewstep.envs import ENVIRONMENTS, VE, Schedule, make_mdp, make_target, register_environments

IDS = {f"fewstep/{name}-v0" for name in ENVIRONMENTS}


def test_importing_registers_each_environment_once():
    assert set(ENVIRONMENTS) == {"SwissRoll", "Moons", "GaussianCluster", "Digits"}
    assert set(gym.registry) >= IDS
    before = {name: gym.registry[name] for name in IDS}
    register_environments()
    assert all(gym.registry[name] is spec for name, spec in before.items())
    assert all(spec.max_episode_steps is None for spec in before.values())


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_defaults(name):
    env = gym.make_vec(f"fewstep/{name}-v0", num_envs=3).unwrapped
    assert env.schedule == Schedule.uniform(env.process, 10)
    assert env.process.t_max == (1000 if name == "Digits" else 10)
    assert env.target.name == name
    observation, _ = env.reset(seed=0)
    for _ in range(10):
        observation, reward, terminated, _, _ = env.step(observation["sample"])
    assert terminated.all()
    assert reward.isfinite().all()


def test_the_toys_process_follows_the_steps(reward):
    mdp = make_mdp("SwissRoll", steps=7, reward=reward)
    assert mdp.process.t_max == 7
    assert mdp.schedule.times.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_a_schedule_brings_its_steps_and_its_process(reward):
    schedule = Schedule.karras(VE(), 6)
    mdp = make_mdp("Digits", schedule=schedule, reward=reward)
    assert mdp.schedule is schedule
    assert mdp.process is schedule.process
    assert mdp.steps == 6
    with pytest.raises(ValueError, match="steps=5, but the given schedule has 6"):
        make_mdp("Digits", schedule=schedule, steps=5)
    with pytest.raises(ValueError, match="the schedule is made for VE"):
        make_mdp("Digits", schedule=schedule, process=VE(0.1, 3.0))


def test_any_part_can_be_replaced(reward):
    moons = make_target("Moons")
    mdp = make_mdp("SwissRoll", target=moons, process=VE(), schedule="karras", reward=reward)
    assert torch.equal(mdp.target.samples, moons.samples)
    assert mdp.schedule == Schedule.karras(VE(), 10)
    assert mdp.reward is reward
    assert make_mdp("SwissRoll", target="Digits", reward=reward).shape == (1, 8, 8)


def test_a_schedule_s_name_comes_with_options_or_is_a_list_of_times(reward):
    mdp = make_mdp(
        "Digits", steps=4, schedule="karras", schedule_options={"rho": 3.0}, reward=reward
    )
    assert mdp.schedule == Schedule.karras(mdp.process, 4, rho=3.0)
    mdp = make_mdp("Digits", schedule="1000, 700, 300, 0", reward=reward)
    assert mdp.schedule == Schedule(mdp.process, [1000, 700, 300, 0])
    with pytest.raises(ValueError, match="steps=4, but the list of times has 3"):
        make_mdp("Digits", steps=4, schedule="1000, 700, 300, 0")
    with pytest.raises(ValueError, match="did you mean 'rho'"):
        make_mdp("Digits", schedule="karras", schedule_options={"rh": 3.0})
    with pytest.raises(ValueError, match="schedule_options are for a schedule given by name"):
        make_mdp("Digits", schedule=mdp.schedule, schedule_options={"rho": 3.0})


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("name", ["SwissRoll", "Digits"])
def test_steps_below_one_are_refused(name, steps):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        make_mdp(name, steps=steps)


def test_unknown_names_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown environment 'Swissroll'; did you mean"):
        make_mdp("Swissroll")
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        make_mdp("SwissRoll", schedule="linear")
    with pytest.raises(ValueError, match="did you mean 'Moons'"):
        make_mdp("SwissRoll", target="Moon")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gym.make_vec("fewstep/Digits-v0", 2, data_dir=tmp_path / "nowhere")
