"""FastDPM's noise levels and times, against the published numbers and the log-gamma function."""

import json

import mpmath  # of sympy, which torch needs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.envs import VE, DiscreteVP, Schedule, make_schedule
from fewstep.envs.schedules.fast_dpm import fast_levels, noise_levels

pytestmark = pytest.mark.numeric

DDPM = DiscreteVP.linear(1000)


def log_product(process, time):
    """log R(t) at 0-based times as MATH.md 1.10 writes it, with forty digits."""
    first, last = (mpmath.mpf(float(process.betas[i])) for i in (0, -1))
    with mpmath.workdps(40):
        rise = (last - first) / (len(process.betas) - 1)
        c = (1 - first) / rise
        start = mpmath.loggamma(c + 1)
        return np.array(
            [
                float((mpmath.mpf(t) + 1) * mpmath.log(rise) + start - mpmath.loggamma(c - t))
                for t in np.asarray(time).tolist()
            ]
        )


lines = st.builds(
    lambda noisings, first, rise: DiscreteVP.linear(noisings, first, first + rise),
    st.integers(2, 1500),
    st.floats(1e-5, 0.05),
    st.floats(1e-3, 0.9),
)


@pytest.mark.parametrize(
    ("spacing", "levels", "times"),
    [
        (
            "quadratic",
            ".0001 .011025 .04 .087025 .1521 .235225 .3364 .455625 .5929 .748225",
            "616.73412 493.98171 394.07647 308.86763 234.85825 170.30048 114.36313 66.86527 "
            "28.29255 0",
        ),
        (
            "linear",
            None,
            "999 802.76355 668.63648 554.59259 452.10217 357.47245 268.60464 183.98606 101.75136 0",
        ),
    ],
)
def test_the_vectors_of_the_appendix(spacing, levels, times):
    """MATH.md A.2, where times are 0-based and run down to 0; ours are one more, then 0."""
    eta = noise_levels(DDPM, 10, spacing)
    if levels is not None:
        np.testing.assert_allclose(eta, np.array(levels.split(), dtype=float), rtol=1e-12)
    else:
        assert eta[-1] == pytest.approx(0.9720026191, abs=5e-11)
    schedule = Schedule.fast_dpm(DDPM, 10, spacing=spacing)
    expected = np.array([*times.split(), "-1"], dtype=float)
    np.testing.assert_allclose(schedule.times.numpy() - 1, expected, rtol=0, atol=6e-6)
    assert schedule.times[-2] == 1


def test_a_long_quadratic_chain_is_not_saturated():
    x = np.sqrt(noise_levels(DDPM, 50, "quadratic")[-1] / 1e-4) - 1
    assert x / 49 == pytest.approx(1.41206069, abs=5e-9)


@given(process=lines)
@settings(max_examples=60, deadline=None)
def test_the_interpolation_of_abar(process):
    """The process's own at whole times, log-gamma between."""
    whole = torch.arange(len(process.betas) + 1, dtype=torch.float64)
    alpha, sigma = fast_levels(process, whole)
    np.testing.assert_array_equal(alpha, process.alpha(whole).numpy())
    np.testing.assert_array_equal(sigma, process.sigma(whole).numpy())
    between = 1 + (len(process.betas) - 1) * torch.tensor([0.013, 0.21, 0.5017, 0.997])
    alpha, sigma = fast_levels(process, between.double())
    expected = log_product(process, between.double().numpy() - 1)
    np.testing.assert_allclose(2 * np.log(alpha), expected, rtol=1e-10)
    np.testing.assert_allclose(sigma**2, -np.expm1(expected), rtol=1e-10)
    early = torch.tensor([0.4])
    assert fast_levels(process, early)[0] == process.alpha(early).numpy()


@given(process=lines, steps=st.integers(2, 60), spacing=st.sampled_from(["linear", "quadratic"]))
@settings(max_examples=60, deadline=None)
def test_each_state_has_the_noise_of_its_time(process, steps, spacing):
    steps = min(steps, len(process.betas))
    eta = noise_levels(process, steps, spacing)
    assert eta[0] == pytest.approx(float(process.betas[0]))
    assert (np.diff(eta) > 0).all()
    assert 0 < eta[0] < eta[-1] < 0.991
    kept = np.cumsum(np.log1p(-eta))
    assert kept[-1] >= float(process.abar[-1].log()) - 1e-9
    times = Schedule.fast_dpm(process, steps, spacing=spacing).times[:-1].numpy()[::-1]
    # A time within 1e-6 of a whole noising is that noising, which moves its level by that much of
    # the next beta.
    following = process.betas.numpy()[np.minimum(times.astype(int), len(process.betas) - 1)]
    moved = np.where(times == times.round(), -1e-6 * np.log1p(-following), 0)
    error = np.abs(log_product(process, times - 1) - kept)
    assert (error <= 1e-9 * np.abs(kept) + moved).all()


def test_as_many_steps_as_noisings_give_the_chain_itself():
    for noisings in (2, 10, 1000):
        process = DiscreteVP.linear(noisings, 1e-3, 0.02)
        schedule = Schedule.fast_dpm(process, noisings, spacing="linear")
        assert torch.equal(schedule.times, Schedule.uniform(process, noisings).times)


def test_step_picks_whole_noisings():
    """MATH.md 0.5."""
    quadratic = Schedule.fast_dpm(DDPM, 10, kind="step", spacing="quadratic")
    assert (quadratic.times - 1).tolist() == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0, -1]
    linear = Schedule.fast_dpm(DDPM, 10, kind="step", spacing="linear")
    assert (linear.times - 1).tolist() == [*range(999, -1, -111), -1]
    cosine = DiscreteVP.cosine(100)
    assert Schedule.fast_dpm(cosine, 5, kind="step").steps == 5


def test_betas_that_were_float32_once_are_still_on_a_line():
    rounded = DiscreteVP(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32))
    times = Schedule.fast_dpm(rounded, 10).times
    torch.testing.assert_close(times, Schedule.fast_dpm(DDPM, 10).times, rtol=1e-5, atol=0)


def test_the_recipe_is_remembered():
    schedule = make_schedule("fast_dpm", DDPM, 10, kind="step", spacing="linear")
    assert schedule.recipe == ("fast_dpm", {"kind": "step", "spacing": "linear"})
    assert schedule.respaced(7) == Schedule.fast_dpm(DDPM, 7, kind="step", spacing="linear")
    again = Schedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert again == schedule
    assert again.recipe == schedule.recipe


@pytest.mark.parametrize(
    ("process", "steps", "options", "message"),
    [
        (VE(), 10, {}, "chain of a DiscreteVP"),
        (
            DiscreteVP.cosine(100),
            10,
            {},
            r"on a line.*kind='step' takes any.*uniform schedule",
        ),
        (DiscreteVP([0.1, 0.1, 0.1]), 2, {}, "rise on a line"),
        (DDPM, 1, {}, "2 to 1000 steps"),
        (DDPM, 1001, {}, "2 to 1000 steps"),
        (DDPM, 0, {}, "steps must be at least 1"),
        (DDPM, 10, {"kind": "vra"}, "did you mean 'var'"),
        (DDPM, 10, {"spacing": "quadartic"}, "did you mean 'quadratic'"),
        (DDPM, 900, {"kind": "step"}, "picks a noising twice"),
    ],
)
def test_what_makes_no_sense_is_refused(process, steps, options, message):
    with pytest.raises(ValueError, match=message):
        Schedule.fast_dpm(process, steps, **options)
