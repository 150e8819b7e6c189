import json
import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from hypothesis import assume, given
from hypothesis import strategies as st

from fewstep.common import files
from fewstep.envs import VE, DiscreteVP, Schedule, make_schedule, refine_times
from fewstep.envs.schedules import SCHEDULES

pytestmark = pytest.mark.numeric

LINEAR = DiscreteVP.linear()
NAMES = ["uniform", "quadratic", "karras", "log_snr"]
SUBSETS = ["leading", "uniform_torch", "quad", "linspace", "trailing"]
SPACINGS = ["time", "sqrt_time", "log_snr", "karras"]


@given(
    name=st.sampled_from(NAMES),
    process=st.sampled_from([LINEAR, DiscreteVP.cosine(), DiscreteVP.sigmoid(10), VE()]),
    steps=st.integers(1, 1200),
)
def test_every_constructor_gives_k_steps_down_from_t_max(name, process, steps):
    schedule = make_schedule(name, process, steps)
    assert schedule.steps == steps
    assert schedule.times.dtype == torch.float64
    assert schedule.times[0] == process.t_max
    assert schedule.times[-1] == (process.t_min if name == "log_snr" else 0)
    assert (schedule.times.diff() < 0).all()


def test_uniform_visits_each_integer():
    for T in (1, 7, 10, 1000):
        times = Schedule.uniform(DiscreteVP.sigmoid(T), T).times
        assert times.tolist() == list(range(T, -1, -1))
    assert Schedule.uniform(LINEAR, 4).times.tolist() == [1000, 750, 500, 250, 0]
    assert Schedule.uniform(LINEAR, 3, end=1.0).times.tolist() == [1000, 667, 334, 1]


def test_a_single_uniform_step_to_zero_starts_at_t_max_itself():
    """In float32 0.3 is above itself, beyond the process, and 0.7 below."""
    for sigma_max in (0.3, 0.7):
        times = Schedule.uniform(VE(0.01, sigma_max), 1, end=0.01, append_zero=True).times
        assert times.tolist() == [sigma_max, 0]


def test_karras_matches_edm():
    levels = [80, 42.415189, 21.108677, 9.7232014, 4.0661236]  # MATH.md A.4
    levels += [1.501742, 0.46997906, 0.11663856, 0.020435335, 0.002]
    times = Schedule.karras(VE(), 10).times.tolist()
    assert times == pytest.approx([*levels, 0], rel=1e-7)
    assert Schedule.karras(VE(), 9, append_zero=False).times.tolist() == times[:-1]


def test_spacing_is_even_in_its_own_coordinate():
    def assert_even(values):
        steps = values.diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps))

    assert_even(Schedule.quadratic(LINEAR, 8, append_zero=False).times.sqrt())
    assert_even(LINEAR.log_snr(Schedule.log_snr(LINEAR, 8).times))
    noise_to_signal = (-LINEAR.log_snr(Schedule.karras(LINEAR, 8, append_zero=False).times)).exp()
    assert_even(noise_to_signal ** (1 / 7))


def indices_of(schedule):
    """The 0-based noisings that a subset visits, without its last time 0, ascending."""
    return [int(t) - 1 for t in schedule.times[:-1].flip(0).tolist()]


@pytest.mark.parametrize(
    ("name", "indices"),
    [  # MATH.md 0.5, ten of a thousand
        ("leading", [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]),
        ("uniform_torch", [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]),
        ("quad", [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]),
        ("linspace", [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
        ("trailing", [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]),
        # and seven, where the strides of the first two differ
        ("leading", [0, 142, 284, 426, 568, 710, 852]),
        ("uniform_torch", [0, 142, 285, 428, 571, 714, 857]),
    ],
)
def test_subsets_match_the_published_indices(name, indices):
    schedule = make_schedule(name, LINEAR, len(indices))
    assert indices_of(schedule) == indices
    assert schedule.times[-1] == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 15, 50, 999, 1000])
@pytest.mark.parametrize("name", ["leading", "linspace", "trailing"])
def test_subsets_agree_with_diffusers(name, steps):
    scheduler = DDIMScheduler(1000, timestep_spacing=name, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert indices_of(make_schedule(name, LINEAR, steps)) == scheduler.timesteps.tolist()[::-1]


def test_the_offset_of_leading_agrees_with_diffusers():
    scheduler = DDIMScheduler(1000, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(50)
    schedule = make_schedule("ddim-uniform", LINEAR, 50, steps_offset=1)
    assert indices_of(schedule) == scheduler.timesteps.tolist()[::-1]
    for offset in (-1, 20):
        with pytest.raises(ValueError, match="must stay within 0"):
            Schedule.leading(LINEAR, 50, steps_offset=offset)


@given(
    name=st.sampled_from(SUBSETS),
    noisings=st.integers(1, 60),
    steps=st.integers(1, 60),
    append_zero=st.booleans(),
)
def test_a_subset_is_strictly_decreasing_whole_times_or_refused(name, noisings, steps, append_zero):
    count = steps if append_zero else steps + 1
    try:
        schedule = make_schedule(name, DiscreteVP.linear(noisings), steps, append_zero=append_zero)
    except ValueError as error:
        assert count > noisings or (name == "quad" and "twice" in str(error))
        return
    times = schedule.times
    assert schedule.steps == steps
    assert (times.diff() < 0).all()
    assert torch.equal(times, times.round())
    assert (times[-1] == 0) == append_zero


def test_subsets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="1001 times of 1000 noisings"):
        Schedule.trailing(LINEAR, 1000, append_zero=False)
    with pytest.raises(ValueError, match="quad picks a noising twice for 30 times"):
        Schedule.quad(LINEAR, 30)
    for name in SUBSETS:
        with pytest.raises(ValueError, match=f"{name} picks noisings of a DiscreteVP; got VE"):
            make_schedule(name, VE(), 5)


@pytest.mark.parametrize("name", NAMES + SUBSETS)
@pytest.mark.parametrize("steps", [0, -3])
def test_steps_below_one_are_refused(name, steps):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        make_schedule(name, LINEAR, steps)


def test_steps_must_be_a_whole_number():
    with pytest.raises(TypeError):
        Schedule.uniform(LINEAR, 2.5)


@pytest.mark.parametrize(
    ("times", "complaint"),
    [
        ([3.0], "at least two"),
        (torch.tensor([[3.0, 1.0]]), "at least two"),
        ([3.0, 4.0], r"strictly decrease; times\[0:2\]"),
        ([3.0, 1.0, 1.0], r"strictly decrease; times\[1:3\]"),
        ([3.0, math.nan], "finite"),
        ([math.inf, 0.0], "finite"),
        ([3.0, -1.0], "lie in"),
        ([1000.5, 1.0], "lie in"),
    ],
)
def test_bad_times_are_refused(times, complaint):
    with pytest.raises(ValueError, match=complaint):
        Schedule(LINEAR, times)
    with pytest.raises(TypeError, match="a sequence of which each is a number"):
        Schedule(LINEAR, [times])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="rho must be positive"):
        Schedule.karras(VE(), 5, rho=0)
    with pytest.raises(ValueError, match="did you mean 'karras'"):
        make_schedule("karas", VE(), 5)
    with pytest.raises(
        ValueError, match="strictly decrease"
    ):  # a chain of one beta has no interior
        Schedule.log_snr(DiscreteVP([0.5]), 2)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("karras", {"rh": 5.0}, "unknown option of schedule karras 'rh'; did you mean 'rho'"),
        ("uniform", {"rho": True}, "unknown option of schedule uniform 'rho'"),
        ("9, 5, 1", {}, "steps=3, but the list of times has 2"),
        ("9, five, 1, 0", {}, "needs numbers between its commas; got '9, five, 1, 0'"),
        ("9,, 1, 0", {}, "needs numbers between its commas"),
        ("9, 5, 1, 0", {"rho": 5.0}, "a list of times takes no options; got rho"),
        ("9, 5, 5, 0", {}, "strictly decrease"),
        ("9, 5, nan, 0", {}, "finite"),
    ],
)
def test_names_with_bad_options_and_bad_lists_are_refused(name, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_schedule(name, LINEAR, 3, **options)


def test_a_name_may_be_a_list_of_times():
    schedule = make_schedule("1000, 700.5,300 , 5e1, 0", LINEAR, 4)
    assert schedule == Schedule(LINEAR, [1000, 700.5, 300, 50, 0])
    assert schedule.recipe is None


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_recipe_makes_the_same_grid_again(name):
    schedule = make_schedule(name, LINEAR, 6)
    assert schedule.recipe[0] == ("leading" if name == "ddim-uniform" else name)
    assert schedule.respaced(6) == schedule
    assert schedule.respaced(9) == make_schedule(name, LINEAR, 9)
    assert schedule.respaced(9).recipe == schedule.recipe
    back = Schedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert back.recipe == schedule.recipe
    assert back.to_config() == schedule.to_config()


def test_the_recipe_keeps_its_options():
    for schedule in (
        Schedule.karras(VE(), 5, rho=3.0, append_zero=False),
        Schedule.uniform(LINEAR, 5, end=1.0),
        Schedule.leading(LINEAR, 5, steps_offset=1, append_zero=False),
    ):
        name, options = schedule.recipe
        assert schedule.respaced(8) == make_schedule(name, schedule.process, 8, **options)
        assert schedule.respaced(8) != make_schedule(name, schedule.process, 8)


def test_a_list_of_times_has_no_recipe():
    schedule = Schedule(LINEAR, [1000, 10, 0])
    assert "recipe" not in schedule.to_config()
    assert Schedule.from_config(schedule.to_config()).recipe is None
    with pytest.raises(ValueError, match="a list of times cannot be respaced"):
        schedule.respaced(4)
    assert Schedule(LINEAR, Schedule.uniform(LINEAR, 4).times) == Schedule.uniform(LINEAR, 4)


@pytest.mark.parametrize("recipe", ["karras", ["karras"], ["karras", 7.0], [1, {}], ["a", {1: 2}]])
def test_a_recipe_of_another_form_is_refused(recipe):
    with pytest.raises(ValueError, match="recipe must be a name and a dict of options"):
        Schedule.from_config({**Schedule.karras(VE(), 5).to_config(), "recipe": recipe})


@given(
    process=st.sampled_from([LINEAR, DiscreteVP.sigmoid(10), VE()]),
    fractions=st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True),
    factor=st.integers(1, 7),
    spacing=st.sampled_from(SPACINGS),
    integer=st.booleans(),
    rho=st.floats(1, 10),
)
def test_refined_times_contain_the_given_ones(process, fractions, factor, spacing, integer, rho):
    times = torch.tensor(sorted(fractions, reverse=True), dtype=torch.float64) * process.t_max
    assume((times.diff() < 0).all())
    finer = refine_times(process, times, factor, spacing, integer, rho=rho)
    assert (finer.diff() < 0).all()
    assert finer[0] == times[0]
    assert finer[-1] == times[-1]
    assert set(times.tolist()) <= set(finer.tolist())
    assert len(finer) <= factor * (len(times) - 1) + 1
    if times[-1] == 0 and spacing != "time":
        assert finer[-2] == times[-2]
    if integer:
        assert all(t in times or t == t.round() for t in finer)
    if factor == 1:
        assert torch.equal(finer, times)


def test_refined_steps_are_even_in_the_grid_s_own_variable():
    """A refined grid is the same grid with more steps, where it does not end in a step to 0."""
    for process in (LINEAR, VE()):
        for name, options in (
            ("uniform", {"end": 1.0}),
            ("quadratic", {"append_zero": False}),
            ("log_snr", {}),
            ("karras", {"append_zero": False, "rho": 4.0}),
        ):
            schedule = make_schedule(name, process, 6, **options)
            finer = schedule.refined(4)
            torch.testing.assert_close(
                finer.times, schedule.respaced(24).times, rtol=1e-9, atol=1e-9
            )
            assert torch.equal(finer.times[::4], schedule.times)
            assert finer.recipe is None
            assert finer.spacing == ("time" if process is LINEAR else "karras")
            last = make_schedule(name, process, 6)
            if last.times[-1] == 0 and name != "uniform":
                assert last.refined(4).steps == 5 * 4 + 1


def test_whole_times_stay_whole_when_refined():
    assert Schedule.uniform(LINEAR, 10).refined(20) == Schedule.uniform(LINEAR, 200)
    assert Schedule.trailing(LINEAR, 10).refined(100) == Schedule.uniform(LINEAR, 1000)
    schedule = Schedule(LINEAR, [10, 7, 5.5, 5, 0])
    assert schedule.refined(2, integer=True).times.tolist() == [10, 8, 7, 6, 5.5, 5, 2, 0]


def test_refining_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="factor must be at least 1"):
        Schedule.uniform(LINEAR, 3).refined(0)
    with pytest.raises(ValueError, match="unknown spacing 'sqrt'; did you mean 'sqrt_time'"):
        refine_times(LINEAR, [2, 1], 2, "sqrt")
    with pytest.raises(ValueError, match="rho must be positive"):
        refine_times(LINEAR, [2, 1], 2, "karras", rho=0.0)


def test_config_round_trip_and_equality():
    schedule = Schedule.karras(VE(), 6)
    back = Schedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert back == schedule
    assert back != Schedule.karras(VE(), 7)
    assert Schedule(LINEAR, [3, 1]) != Schedule(DiscreteVP.cosine(), [3, 1])


# -- files -----------------------------------------------------------------------------------------

SAVED = {
    "a recipe": Schedule.karras(VE(), 6, rho=5.0),
    "whole times": Schedule.trailing(LINEAR, 7),
    "a list of times": Schedule(VE(0.01, 50.0), [49.0, 1 / 3, math.pi / 100, 0.0]),
    "a process of betas": Schedule.log_snr(DiscreteVP([0.1, 0.3, 0.5, 0.55]), 3),
    "an odd chain": Schedule(DiscreteVP.sigmoid(10), [9.87654321, 4.000000001, 1e-3]),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_file_gives_the_schedule_back_exactly(name, tmp_path):
    schedule, path = SAVED[name], tmp_path / "sub" / "schedule.json"
    schedule.save(path)
    back = Schedule.load(path)
    assert back == schedule
    assert torch.equal(back.times, schedule.times)
    assert back.process == schedule.process
    assert back.recipe == schedule.recipe
    for ours, theirs in zip(back.levels(), schedule.levels(), strict=True):
        assert (ours == theirs).all()
    again = tmp_path / "again.json"
    back.save(str(again))
    assert again.read_text() == path.read_text()
    assert Schedule.load(str(again)) == schedule


def test_a_file_with_a_recipe_can_be_respaced(tmp_path):
    path = tmp_path / "schedule.json"
    Schedule.karras(VE(), 6, rho=5.0).save(path)
    assert Schedule.load(path).respaced(9) == Schedule.karras(VE(), 9, rho=5.0)
    Schedule(VE(), [80, 1, 0]).save(path)  # over the old file
    assert Schedule.load(path) == Schedule(VE(), [80, 1, 0])
    with pytest.raises(ValueError, match=r"a list of times cannot be respaced"):
        Schedule.load(path).respaced(9)


def test_the_file_is_json_with_a_name_and_a_version(tmp_path):
    path = tmp_path / "schedule.json"
    Schedule(VE(), [80, 1, 0]).save(path)
    tree = json.loads(path.read_text())
    assert tree["format"] == "fewstep-schedule"
    assert tree["version"] == 1
    assert tree["times"] == [80, 1, 0]
    assert "recipe" not in tree
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize("moment", ["half-way", "renaming"])
def test_a_failing_write_leaves_the_old_file(moment, tmp_path, monkeypatch):
    path = tmp_path / "schedule.json"
    old, new = Schedule(VE(), [80, 1, 0]), Schedule(VE(), [80, 2, 1, 0])
    old.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["schedule.json"]

    def fail(*_arguments, **_settings):
        raise OSError("disk full")

    def fail_half_way(file, text):
        file.write_bytes(text[: len(text) // 2].encode())
        fail()

    with monkeypatch.context() as patch:
        if moment == "renaming":
            patch.setattr(files.os, "fsync", fail)
        else:
            patch.setattr(type(path), "write_text", fail_half_way)
        with pytest.raises(OSError, match=r"disk full"):
            new.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["schedule.json"]
    assert Schedule.load(path) == old
    new.save(path)
    assert Schedule.load(path) == new
    assert [file.name for file in tmp_path.iterdir()] == ["schedule.json"]


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"No schedule at .*"):
            Schedule.load(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"is damaged or foreign: (not valid JSON|no UTF-8)"),
        (b'{"format": "fewstep-sch', r"is damaged or foreign: (not valid JSON|no UTF-8)"),
        (b"\xff\xfe\x00garbage", r"is damaged or foreign: (not valid JSON|no UTF-8)"),
        (b"[1, 2]", r"is not a schedule: it has no 'format': 'fewstep-schedule'"),
        (b"null", r"is not a schedule: it has no 'format'"),
        (b'{"times": [80, 1, 0]}', r"is not a schedule: it has no 'format'"),
        (b'{"format": "fewstep-tableau", "version": 1}', r"it has no 'format'"),
        (b'{"format": "fewstep-schedule"}', r"has version None; this fewstep reads 1"),
        (b'{"format": "fewstep-schedule", "version": 2}', r"has version 2; this fewstep reads 1"),
    ],
)
def test_files_of_something_else_are_refused(content, complaint, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"schedule\.json .*{complaint}"):
        Schedule.load(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"times": None}, r"times|None"),
        ({"times": "80, 1, 0"}, r""),
        ({"times": [80, "one", 0]}, r""),
        ({"times": {"0": 80}}, r""),
        ({"times": [80]}, r"at least two times"),
        ({"times": [[80, 1], [1, 0]]}, r"a sequence of which each is a number"),
        ({"times": [[80, 1], [0]]}, r""),
        ({"times": [80, 1, 1, 0]}, r"strictly decrease"),
        ({"times": [80, 1, math.nan]}, r"NaN, which is no number"),
        ({"times": [80.5, 1, 0]}, r"must lie in \[0, 80\]"),
        ({"process": {"kind": "Brownian"}}, r"Brownian"),
        ({"process": {}}, r"kind|process"),
        ({"process": None}, r""),
        ({"process": "VE"}, r""),
        ({"process": ["VE"]}, r""),
        ({"process": {"kind": "VE", "sigma_min": -1.0, "sigma_max": 80.0}}, r""),
        ({"process": {"kind": "DiscreteVP", "betas": "many"}}, r""),
        ({"recipe": ["karras"]}, r"recipe must be a name and a dict of options"),
    ],
)
def test_a_damaged_file_is_refused(change, complaint, tmp_path):
    path = tmp_path / "schedule.json"
    Schedule(VE(), [80, 1, 0]).save(path)
    tree = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf"schedule\.json is damaged.*: .*({complaint})"):
        Schedule.load(path)


@pytest.mark.parametrize("part", ["times", "process"])
def test_a_file_that_lacks_a_part_says_which(part, tmp_path):
    path = tmp_path / "schedule.json"
    Schedule(VE(), [80, 1, 0]).save(path)
    tree = json.loads(path.read_text())
    del tree[part]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf"schedule\.json is damaged.*: .*{part}"):
        Schedule.load(path)
