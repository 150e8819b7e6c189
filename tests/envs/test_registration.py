import gymnasium as gym
import pytest
import torch

from fewstep.envs import ENVIRONMENTS, VE, Schedule, make_mdp, make_target, register_environments
from fewstep.envs.targets.images import IMAGE_SETS

# tests/envs/test_images.py has the others, which need data files.
WITHOUT_FILES = ["SwissRoll", "Moons", "GaussianCluster", "Digits"]
IDS = {f"fewstep/{name}-v0" for name in ENVIRONMENTS}


def test_importing_registers_each_environment_once():
    assert set(ENVIRONMENTS) == {*WITHOUT_FILES, *IMAGE_SETS}
    assert set(gym.registry) >= IDS
    before = {name: gym.registry[name] for name in IDS}
    register_environments()
    assert all(gym.registry[name] is spec for name, spec in before.items())
    assert all(spec.max_episode_steps is None for spec in before.values())


@pytest.mark.parametrize("name", WITHOUT_FILES)
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
    with pytest.raises(ValueError, match="unknown environment 'Swisroll'; did you mean"):
        make_mdp("Swisroll")
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        make_mdp("SwissRoll", schedule="linear")
    with pytest.raises(ValueError, match="did you mean 'Moons'"):
        make_mdp("SwissRoll", target="Moon")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gym.make_vec("fewstep/Digits-v0", 2, data_dir=tmp_path / "nowhere")


def test_a_schedule_s_file_brings_its_steps_and_its_process(reward, tmp_path):
    schedule, path = Schedule(VE(), [80, 20.5, 3, 0.1, 0]), tmp_path / "schedule.json"
    schedule.save(path)
    mdp = make_mdp("SwissRoll", schedule=str(path), reward=reward)
    assert mdp.schedule == schedule
    assert mdp.process == VE()
    assert mdp.steps == 4
    assert make_mdp("SwissRoll", schedule=str(path), steps=4, reward=reward).schedule == schedule
    assert make_mdp("Moons", schedule=str(path), process=VE(), reward=reward).process == VE()
    with pytest.raises(ValueError, match=r"steps=5, but the given schedule has 4"):
        make_mdp("SwissRoll", schedule=str(path), steps=5)
    with pytest.raises(ValueError, match=r"the schedule is made for VE"):
        make_mdp("SwissRoll", schedule=str(path), process=VE(0.1, 3.0))
    with pytest.raises(ValueError, match=r"schedule_options are for a schedule given by name"):
        make_mdp("SwissRoll", schedule=str(path), schedule_options={"rho": 3.0})


def test_environments_are_made_with_a_schedule_s_file(reward, tmp_path):
    schedule, path = Schedule(VE(), [80, 20.5, 3, 0.1, 0]), tmp_path / "schedule.json"
    schedule.save(path)
    env = gym.make_vec("fewstep/SwissRoll-v0", num_envs=2, schedule=str(path), reward=reward)
    assert env.unwrapped.schedule == schedule
    observation, _ = env.reset(seed=0)
    seen = []
    for _ in range(4):
        seen.append(observation["timestep"].tolist())
        observation, _, terminated, _, _ = env.step(observation["sample"])
    assert seen == [[time] * 2 for time in schedule.times[:-1].float().tolist()]
    assert terminated.all()
    single = gym.make("fewstep/SwissRoll-v0", schedule=str(path), reward=reward)
    assert single.unwrapped.mdp.schedule == schedule


def test_a_schedule_s_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No schedule at .*nowhere\.json"):
        make_mdp("SwissRoll", schedule=str(tmp_path / "nowhere.json"))
    path = tmp_path / "tableau.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tableau\.json is not a schedule"):
        gym.make_vec("fewstep/SwissRoll-v0", num_envs=2, schedule=str(path))
