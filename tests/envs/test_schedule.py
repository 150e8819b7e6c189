import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.envs import VE, DiscreteVP, Schedule, make_schedule

LINEAR = DiscreteVP.linear()
NAMES = ["uniform", "quadratic", "karras", "log_snr"]


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


@pytest.mark.parametrize("name", NAMES)
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
        ([[3.0, 1.0]], "at least two"),
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


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="rho must be positive"):
        Schedule.karras(VE(), 5, rho=0)
    with pytest.raises(ValueError, match="did you mean 'karras'"):
        make_schedule("karas", VE(), 5)
    with pytest.raises(
        ValueError, match="strictly decrease"
    ):  # a chain of one beta has no interior
        Schedule.log_snr(DiscreteVP([0.5]), 2)


def test_config_round_trip_and_equality():
    schedule = Schedule.karras(VE(), 6)
    back = Schedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert back == schedule
    assert back != Schedule.karras(VE(), 7)
    assert Schedule(LINEAR, [3, 1]) != Schedule(DiscreteVP.cosine(), [3, 1])
