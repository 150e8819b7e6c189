"""The variance of the best Gaussian step: exact cases, bounds, and what its options change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.variance_head import VarianceHead
from fewstep.agents.solvers import analytic_dpm, ancestral, ddim, make_solver, per_pixel_dpm
from fewstep.envs import VE, DiscreteVP, Schedule

pytestmark = pytest.mark.numeric

DDPM = DiscreteVP.linear(1000)
LEVELS = torch.arange(1, 1001, dtype=torch.float64)


def gamma_of_gaussian(std):
    """Gamma of data N(0, std^2): epsilon = sigma x / (alpha^2 std^2 + sigma^2)."""
    alpha, sigma = DDPM.alpha(LEVELS), DDPM.sigma(LEVELS)
    return sigma**2 / (alpha**2 * std**2 + sigma**2)


@st.composite
def grids(draw):
    steps = draw(st.integers(1, 12))
    times = draw(st.lists(st.integers(1, 1000), min_size=steps, max_size=steps, unique=True))
    end = draw(st.booleans())
    times = sorted(times, reverse=True)
    return Schedule(DDPM, [*times, 0] if end or len(times) < 2 else times)


@given(schedule=grids(), std=st.floats(0.05, 1.0), eta=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_gaussian_data_keep_their_exact_marginals(schedule, std, eta):
    """The best Gaussian step is the true one for Gaussian data: for every eta, at every time."""
    table = analytic_dpm(schedule, gamma_of_gaussian(std), eta, clip=False, late_clip=None)
    alpha, sigma = schedule.levels()
    marginal = alpha**2 * std**2 + sigma**2
    # epsilon is a multiple of x, so a step multiplies x by `factor`.
    epsilon = sigma[:-1] / marginal[:-1]
    factor = table.scale + np.diag(table.weights) * epsilon
    after = factor**2 * marginal[:-1] + table.noise**2
    sampled = slice(None, -1) if sigma[-1] == 0 else slice(None)
    np.testing.assert_allclose(after[sampled], marginal[1:][sampled], rtol=1e-9)
    if eta == 1:
        # ... and each transition is the true posterior p(x_s | x_t).
        joint = alpha[1:] * alpha[:-1] * std**2 + alpha[:-1] / alpha[1:] * sigma[1:] ** 2
        variance = marginal[1:] - joint**2 / marginal[:-1]
        np.testing.assert_allclose(table.noise[sampled] ** 2, variance[sampled], rtol=1e-8)


@given(schedule=grids(), eta=st.floats(0, 1), seed=st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_the_variance_is_that_of_the_publication_and_bounded(schedule, eta, seed):
    """MATH.md 1.11, in its VP form, Gamma anything from 0 to 1.2."""
    gamma = np.random.default_rng(seed).uniform(0, 1.2, 1000)
    table = analytic_dpm(schedule, gamma, eta, clip=True, late_clip=None)
    abar = DDPM.abar[schedule.times.long()].numpy()
    here, after = abar[:-1], abar[1:]
    added = 1 - here / after
    least = eta**2 * added * (1 - after) / (1 - here)
    kept = np.sqrt(1 - after - least)
    bracket = np.sqrt(after) - kept * np.sqrt(here / (1 - here))
    known = gamma[schedule.times[:-1].long() - 1]
    covariance = np.clip((1 - here) / here * (1 - known), 0, 1)
    expected = least + bracket**2 * covariance
    last = len(here) - 1
    if after[-1] == 1:
        assert table.noise[last] == 0
        expected[last] = 0
    np.testing.assert_allclose(table.noise**2, expected, rtol=1e-7, atol=1e-12)
    inner = expected[:last]
    assert (inner >= least[:last] * (1 - 1e-9)).all()
    # For data in [-1, 1], and for any data.
    assert (inner <= (least + bracket**2)[:last] * (1 + 1e-9)).all()
    assert (inner <= (least + bracket**2 * (1 - here) / here)[:last] * (1 + 1e-9)).all()
    free = np.flatnonzero((covariance[:last] > 0) & (covariance[:last] < 1))
    swing = np.sqrt((1 - here) * after / here) - kept
    np.testing.assert_allclose(
        inner[free], (least + swing**2 * (1 - known))[free], rtol=1e-6, atol=1e-12
    )
    if eta == 1:
        np.testing.assert_allclose(
            bracket**2, after * added**2 / (1 - here) ** 2, rtol=1e-6, atol=1e-14
        )


@pytest.mark.parametrize("end", [[0], []])
@pytest.mark.parametrize("late_clip", [2.0, 1.0])
def test_the_last_landing_above_zero_is_clipped_to_grey_levels(late_clip, end):
    schedule = Schedule(DDPM, [1000, 500, 250, 60, *end])
    gamma = gamma_of_gaussian(0.5)
    free = analytic_dpm(schedule, gamma, late_clip=None)
    late = analytic_dpm(schedule, gamma, late_clip=late_clip)
    # The mean of |N(0, s^2)| is s sqrt(2 / pi); a grey level is 2 / 255.
    assert late.noise[2] * math.sqrt(2 / math.pi) == pytest.approx(late_clip * 2 / 255)
    assert late.noise[2] < free.noise[2]
    others = [j for j in range(late.steps) if j != 2]
    np.testing.assert_array_equal(late.noise[others], free.noise[others])
    np.testing.assert_array_equal(
        analytic_dpm(schedule, gamma, late_clip=math.inf).noise, free.noise
    )
    single = analytic_dpm(Schedule(DDPM, [1000, 0]), gamma)
    assert single.noise.tolist() == [0]


def test_the_means_are_those_of_ddpm_and_of_ddim():
    schedule = Schedule.linspace(DDPM, 7)
    for clip in (False, True):
        for eta, base in (
            (1.0, ancestral(schedule, "small", clip=clip)),
            (0.4, ddim(schedule, 0.4, clip=clip)),
            (0.0, ddim(schedule, 0.0, clip=clip)),
        ):
            for table in (
                analytic_dpm(schedule, gamma_of_gaussian(0.5), eta, clip=clip),
                per_pixel_dpm(schedule, eta=eta, clip=clip),
            ):
                for part in ("scale", "weights", "clipped", "times"):
                    np.testing.assert_array_equal(getattr(table, part), getattr(base, part))
                assert table.output == base.output


def test_gamma_is_interpolated_between_whole_times():
    gamma = np.linspace(0.2, 0.9, 1000)
    schedule = Schedule(DDPM, [900, 400.25, 1])
    ours = analytic_dpm(schedule, gamma, late_clip=None).noise[1]
    known = 0.75 * gamma[399] + 0.25 * gamma[400]
    constant = analytic_dpm(schedule, np.full(1000, known), late_clip=None).noise[1]
    assert ours == pytest.approx(constant, rel=1e-12)


class Blunt(nn.Module):
    """Predicts no noise at all, and shows one feature."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 3, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, sample, time):
        return self.out(sample[:, :1])


@pytest.mark.parametrize("kind", ["sn", "npr"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("process", [DDPM, VE(0.002, 1000.0)], ids=["VP", "VE"])
def test_a_head_that_says_the_same_of_every_pixel_is_analytic_dpm(process, eta, kind, generator):
    """An untrained head says what is right for Gaussian data, and knows the time."""
    std = 0.5
    schedule = Schedule(process, [1000, 731, 400, 90, 7, 0])
    denoiser = Denoiser(Blunt().double(), process)
    denoiser.head = VarianceHead(kind, (3,), 1, convolutional=False, data_std=std)
    table = make_solver(f"{kind}-ddpm", schedule, denoiser, eta=eta, late_clip=1.0)
    assert table.name == f"{kind}-ddpm" + (f" (eta {eta:g})" if eta != 1 else "")
    if process is DDPM:
        expected = analytic_dpm(schedule, gamma_of_gaussian(std), eta, late_clip=1.0).noise
    else:
        # The same step in VE's units, where alpha is 1 and the clip leaves Cov0 alone.
        sigma = schedule.times.numpy()
        cov0 = (sigma * std) ** 2 / (std**2 + sigma**2)
        least = eta * np.sqrt(1 - (sigma[1:] / sigma[:-1]) ** 2) * sigma[1:]
        bracket = 1 - np.sqrt(sigma[1:] ** 2 - least**2) / sigma[:-1]
        expected = np.sqrt(least**2 + bracket**2 * cov0[:-1])
        expected[-2:] = min(expected[-2], math.sqrt(math.pi / 2) * 2 / 255), 0
    x = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    for j in range(table.steps):
        _, std_of_state = table.evaluate_with_std(denoiser, x, j)
        if j == table.steps - 1:
            assert std_of_state is None
            assert table.row(j).noise == 0
        else:
            ours = std_of_state.detach().expand_as(x).numpy()
            np.testing.assert_allclose(ours, np.full(x.shape, expected[j]), rtol=1e-6)


def test_last_std_gives_the_last_transition_a_density():
    for ending in ([0], []):
        schedule = Schedule(DDPM, [1000, 500, 1, *ending])
        for build in (lambda s, **o: analytic_dpm(s, gamma_of_gaussian(0.5), **o), per_pixel_dpm):
            plain, changed = build(schedule), build(schedule, last_std=0.01)
            assert changed.noise[-1] == 0.01
            assert changed.covariance[-1] == 0
            assert changed.cap[-1] == math.inf
            for part in ("noise", "covariance", "cap"):
                ours, theirs = getattr(changed, part), getattr(plain, part)
                np.testing.assert_array_equal(ours[:-1], theirs[:-1])


def test_solvers_say_what_they_need_of_the_denoiser(make_denoiser, process):
    schedule = Schedule.uniform(process, 4)
    denoiser = make_denoiser()
    for name, lacking in (
        ("analytic-dpm", "Gamma: .*VarianceLearning, kind='gamma'"),
        ("sn-ddpm", "kind 'sn': .*VarianceLearning, kind='sn'"),
        ("npr-ddpm", "kind 'npr': .*VarianceLearning, kind='npr'"),
    ):
        for given_denoiser in (None, denoiser):
            with pytest.raises(ValueError, match=lacking):
                make_solver(name, schedule, given_denoiser)
    denoiser.head = VarianceHead("npr", (2,), 32, convolutional=False)
    with pytest.raises(ValueError, match="second head of kind 'sn'"):
        make_solver("sn-ddpm", schedule, denoiser)
    with pytest.raises(ValueError, match=r"unknown option of solver 'analytic-dpm' 'gamma'"):
        make_solver("analytic-dpm", schedule, denoiser, gamma=1.0)
    denoiser.gamma = torch.ones(4, dtype=torch.float64)
    table = make_solver("analytic-dpm", schedule, denoiser, clip=False)
    assert (
        table.to_json()
        == analytic_dpm(schedule, np.ones(4), clip=False, late_clip=math.inf).to_json()
    )
    # Nothing is left to vary: DDPM's small variance.
    np.testing.assert_allclose(table.noise[:-2], ancestral(schedule, "small").noise[:-2])


@pytest.mark.parametrize(
    ("process", "gamma", "options", "message"),
    [
        (VE(), np.ones(1000), {}, "one Gamma a noising of a DiscreteVP"),
        (DDPM, np.ones(999), {}, r"shape \(999,\); this process has 1000 noisings"),
        (DDPM, np.full(1000, np.nan), {}, "finite numbers >= 0"),
        (DDPM, -np.ones(1000), {}, "finite numbers >= 0"),
        (DDPM, np.ones(1000), {"eta": 1.5}, "eta must lie in"),
        (DDPM, np.ones(1000), {"late_clip": 0.0}, "late_clip must be a number of grey levels"),
        (DDPM, np.ones(1000), {"late_clip": math.nan}, "late_clip"),
        (DDPM, np.ones(1000), {"last_std": -1.0}, "last_std"),
    ],
)
def test_what_makes_no_sense_is_refused(process, gamma, options, message):
    with pytest.raises(ValueError, match=message):
        analytic_dpm(Schedule(process, [50, 10, 1]), gamma, **options)
