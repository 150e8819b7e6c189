"""FastDPM's coefficients against the published numbers, and what they reduce to."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.agents.solvers import ancestral, ddim, fast_dpm, make_solver
from fewstep.envs import VE, DiscreteVP, Schedule
from fewstep.envs.schedules.fast_dpm import noise_levels

pytestmark = pytest.mark.numeric

DDPM = DiscreteVP.linear(1000)


@pytest.mark.parametrize(
    ("spacing", "first", "last"),
    [
        (
            "quadratic",
            [
                (1.992938, -1.506928, 0.8372391),
                (1.56729, -0.970206, 0.7177041),
                (1.355348, -0.6917303, 0.5987305),
            ],
            (1.00005, -0.0100005, 0.001),
        ),
        (
            "linear",
            [
                (5.976423, -5.809216, 0.985211),
                (2.711765, -2.344692, 0.9252506),
                (2.024541, -1.53878, 0.8549411),
            ],
            (1.00005, -0.0100005, 0.001),
        ),
    ],
)
def test_the_vectors_of_the_appendix(spacing, first, last):
    """MATH.md A.2."""
    table = fast_dpm(Schedule.fast_dpm(DDPM, 10, spacing=spacing), last_std=0.001)
    ours = np.stack([table.scale, np.diag(table.weights), table.noise], axis=1)
    np.testing.assert_allclose(ours[[0, 1, 2, -1]], [*first, last], rtol=3e-7)
    assert table.one_step
    assert table.output == "epsilon"


@given(
    steps=st.integers(2, 40),
    kappa=st.floats(0, 1),
    spacing=st.sampled_from(["linear", "quadratic"]),
)
@settings(max_examples=40, deadline=None)
def test_the_reverse_step_keeps_the_marginals(steps, kappa, spacing):
    """With the true noise as prediction, x_s = sqrt(Gbar_s) x_0 + noise of variance 1 - Gbar_s."""
    kept = np.cumprod(1 - noise_levels(DDPM, steps, spacing))[::-1]
    after = np.append(kept[1:], 1.0)
    table = fast_dpm(Schedule.fast_dpm(DDPM, steps, spacing=spacing), kappa)
    on_noise = np.diag(table.weights) + table.scale * np.sqrt(1 - kept)
    np.testing.assert_allclose(table.scale * np.sqrt(kept), np.sqrt(after), rtol=1e-9)
    np.testing.assert_allclose(on_noise**2 + table.noise**2, 1 - after, rtol=1e-7, atol=1e-12)
    small = (1 - after) / (1 - kept) * (1 - kept / after)
    np.testing.assert_allclose(table.noise, kappa * np.sqrt(small), rtol=1e-6, atol=1e-12)
    assert table.noise[-1] == 0


@pytest.mark.parametrize("process", [DDPM, DiscreteVP.cosine(1000), VE(0.002, 1000)])
def test_at_whole_times_it_is_ddim_and_ddpm(process):
    schedule = Schedule(process, [1000, 731, 400, 90, 7, 1, 0])
    for ours, theirs in (
        (fast_dpm(schedule, 0.0), ddim(schedule)),
        (fast_dpm(schedule, 0.3), ddim(schedule, 0.3)),
        (fast_dpm(schedule), ancestral(schedule, "small")),
    ):
        for part in ("times", "scale", "weights", "noise"):
            np.testing.assert_allclose(getattr(ours, part), getattr(theirs, part), atol=1e-12)


def test_it_has_a_name_and_options():
    schedule = Schedule.fast_dpm(DDPM, 6)
    by_name = make_solver("fast-dpm", schedule, kappa=0.5, last_std=0.01)
    assert by_name.to_json() == fast_dpm(schedule, 0.5, 0.01).to_json()
    assert by_name.name == "fast-dpm (kappa 0.5)"
    assert by_name.noise[-1] == 0.01


@pytest.mark.parametrize(
    "options", [{"kappa": 1.1}, {"kappa": -0.1}, {"kappa": float("nan")}, {"last_std": -1.0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fast_dpm(Schedule.fast_dpm(DDPM, 6), **options)


def test_one_step_to_clean_data_needs_no_log_gamma(wave):
    table = fast_dpm(Schedule(DDPM, [500.5, 0]))
    x = torch.ones(2, 2, dtype=torch.float64)
    with torch.no_grad():
        sample = table.sample(wave, x)
        expected = wave.denoised(x, 500.5)
    # Linear interpolation of the logarithm differs by an eighth of the betas' rise.
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)
