import json
import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.envs import (
    VE,
    ContinuousVP,
    CustomProcess,
    DiscreteVP,
    NoiseProcess,
    RectifiedFlow,
    Schedule,
    make_process,
)

pytestmark = pytest.mark.numeric

PROCESSES = {
    "linear": DiscreteVP.linear(),
    "cosine": DiscreteVP.cosine(),
    "sigmoid": DiscreteVP.sigmoid(10),
    "single beta": DiscreteVP([0.3]),
    "ve": VE(),
    "continuous VP": ContinuousVP(),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(3.0, 1000.0),
    "zero terminal SNR": DiscreteVP.linear(100).zero_terminal_snr(),
    "two functions": CustomProcess("circle", lambda t: t.cos(), lambda t: t.sin(), 1.5, 0.01),
}

processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@pytest.mark.parametrize(
    ("process", "beta_schedule"),
    [(DiscreteVP.linear(), "linear"), (DiscreteVP.cosine(), "squaredcos_cap_v2")],
)
def test_marginals_agree_with_diffusers(process, beta_schedule):
    oracle = DDPMScheduler(1000, 1e-4, 2e-2, beta_schedule).alphas_cumprod.double()
    n = torch.arange(1, 1001)
    # diffusers multiplies a thousand factors in float32.
    torch.testing.assert_close(process.abar[1:], oracle, rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(process.alpha(n).square(), process.abar[n], rtol=1e-12, atol=0)


def test_linear_matches_published_values():
    # MATH.md A.2, whose index n is after n + 1 noisings.
    abar = DiscreteVP.linear().abar
    assert abar[0] == 1
    assert float(abar[1000].log()) == pytest.approx(-10.117713542413, abs=1e-11)
    assert float(abar[500]) == pytest.approx(0.0785872428818, abs=1e-12)


def test_sigmoid_is_the_toy_process_of_sft_pg():
    ramp = [1 / (1 + math.exp(6 - 12 * i / 9)) * (1e-2 - 1e-5) + 1e-5 for i in range(10)]
    assert DiscreteVP.sigmoid(10).betas.tolist() == pytest.approx(ramp, rel=1e-12)


@given(st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=20))
def test_noising_one_step_at_a_time_composes_to_the_marginal(betas):
    process = DiscreteVP(betas)
    mean, variance = 1.0, 0.0
    for n, beta in enumerate(betas, 1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert float(process.alpha(n)) == pytest.approx(mean, rel=1e-10)
        assert float(process.sigma(n)) == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_log_alpha_is_linear_between_integers():
    process = DiscreteVP.linear()
    middle = process.alpha(torch.tensor([412.0, 413.0])).log().mean()
    assert float(process.alpha(412.5).log()) == pytest.approx(float(middle), rel=1e-12)


@processes
def test_closed_forms(process):
    t = torch.linspace(0, process.t_max, 101, dtype=torch.float64)
    alpha, sigma, log_snr = process.alpha(t), process.sigma(t), process.log_snr(t)
    assert alpha.dtype == sigma.dtype == log_snr.dtype == torch.float64
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert log_snr[0] == math.inf
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close((alpha / sigma).log()[1:], log_snr[1:], rtol=1e-9, atol=1e-9)
    if isinstance(process, VE):
        torch.testing.assert_close(sigma, t)
        assert (alpha == 1).all()
    elif isinstance(process, RectifiedFlow):
        torch.testing.assert_close(alpha + sigma, torch.ones_like(t))
    else:
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))


@processes
@given(fraction=st.floats(1e-6, 1.0))
@settings(max_examples=50)
def test_log_snr_round_trip(process, fraction):
    t = fraction * process.t_max
    back = process.time_of_log_snr(process.log_snr(t))
    assert float(back) == pytest.approx(t, rel=1e-9)


@processes
def test_log_snr_has_its_ends(process):
    assert float(process.time_of_log_snr(math.inf)) == 0
    last = process.time_of_log_snr(process.log_snr(process.t_max))
    assert float(last) == pytest.approx(process.t_max, rel=1e-14)
    assert float(last) <= process.t_max
    least = float(process.log_snr(process.t_max))
    if math.isfinite(least):
        with pytest.raises(ValueError, match="log-SNR must be at least"):
            process.time_of_log_snr(least - 0.1)
    else:
        assert float(process.alpha(process.t_max)) == 0
        assert float(process.sigma(process.t_max)) == 1
    with pytest.raises(ValueError, match="log-SNR must be at least"):
        process.time_of_log_snr(math.nan)


@processes
@pytest.mark.parametrize("t", [-0.1, 1e6, math.nan, torch.tensor([0.0, -1.0])])
def test_times_out_of_range_are_refused(process, t):
    for coefficient in (process.alpha, process.sigma, process.log_snr):
        with pytest.raises(ValueError, match="times must lie in"):
            coefficient(t)


@processes
def test_coefficients_are_shaped_as_the_time(process):
    assert process.alpha(0.5).shape == ()
    assert process.sigma(torch.full((3, 2), 0.5)).shape == (3, 2)
    assert process.log_snr(torch.ones(3, dtype=torch.int64)).shape == (3,)


@processes
def test_add_noise_uses_the_marginal(process):
    x0, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    t = torch.tensor([0.0, 0.5, 1.0]) * process.t_max
    noised = process.add_noise(x0, t, noise)
    assert noised.dtype == torch.float32
    assert torch.equal(noised[0], x0[0])
    for i in range(3):
        one = process.add_noise(x0[i : i + 1], float(t[i]), noise[i : i + 1])
        expected = process.alpha(t[i]) * x0[i] + process.sigma(t[i]) * noise[i]
        torch.testing.assert_close(one[0], expected.float())
        torch.testing.assert_close(noised[i], one[0])


def test_add_noise_refuses_what_does_not_fit():
    process, x0 = DiscreteVP.linear(), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="noise has shape"):
        process.add_noise(x0, 1.0, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="one time a sample"):
        process.add_noise(x0, torch.ones(2), torch.zeros(3, 2))


@processes
def test_prior_sample_has_the_prior_s_spread_and_follows_the_generator(process):
    draws = [
        process.prior_sample((4000, 2), torch.Generator().manual_seed(s), t=process.t_max)
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert float(draws[0].std()) == pytest.approx(process.prior_std(process.t_max), rel=0.05)
    expected = {"VE": 80, "CustomProcess": math.sin(1.5)}.get(type(process).__name__, 1)
    assert process.prior_std(process.t_max) == pytest.approx(expected, rel=1e-15)


def test_network_time():
    assert DiscreteVP.linear().network_time(1000.0) == 999.0
    assert torch.equal(DiscreteVP.linear().network_time(torch.ones(2)), torch.zeros(2))
    assert VE().network_time(80.0) == 80.0
    assert ContinuousVP().network_time(0.5) == 499.5


@processes
def test_network_times_have_an_inverse(process):
    t = torch.linspace(0.1, 1, 7, dtype=torch.float64) * process.t_max
    torch.testing.assert_close(
        process.time_of_network(process.network_time(t)), t, rtol=1e-14, atol=0
    )


@processes
def test_the_time_of_a_log_snr_has_the_right_derivative(process):
    # Between the whole noisings of a chain, where the slope jumps.
    t = torch.tensor([0.83, 0.3141]) * process.t_max
    level = process.log_snr(t.double()).requires_grad_()
    (ours,) = torch.autograd.grad(process.time_of_log_snr(level).sum(), level)
    at = t.double().requires_grad_()
    (slope,) = torch.autograd.grad(process.log_snr(at).sum(), at)
    torch.testing.assert_close(ours, 1 / slope, rtol=1e-7, atol=0)


@processes
def test_drawn_times_lie_within_the_process(process):
    draws = process.draw_times(1000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert float(draws.min()) >= process.t_min * (1 - 1e-6)
    assert float(draws.max()) <= process.t_max * (1 + 1e-6)
    assert process.sigma(draws.clamp(max=process.t_max)).isfinite().all()


def test_a_flow_has_the_levels_and_the_times_of_diffusers():
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        process = RectifiedFlow(shift, 1000.0)
        # diffusers shifts the ends of its grid once when it is made, and again when it is set.
        ours = torch.linspace(1, float(scheduler.sigma_min), 8, dtype=torch.float64)
        scheduler.set_timesteps(8)
        torch.testing.assert_close(
            process.sigma(ours).float(), scheduler.sigmas[:-1], rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            process.network_time(ours).float(), scheduler.timesteps, rtol=1e-6, atol=0
        )


def test_continuous_vp_is_the_limit_of_ddpm_s_chain():
    # Song et al. 2021, appendix C: beta_n = beta(n / T) / T with beta_min = .1, beta_max = 20.
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    chains = [DiscreteVP.linear(T, 0.1 / T, 20 / T) for T in (10_000, 20_000)]
    ours = ContinuousVP().alpha(t).log()
    gaps = [float((chain.alpha(t * chain.t_max).log() - ours).abs().max()) for chain in chains]
    assert gaps[1] < 0.01
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=0.05)


def test_zero_terminal_snr_is_that_of_diffusers():
    betas = DiscreteVP.linear(1000).betas
    theirs = rescale_zero_terminal_snr(betas)
    ours = DiscreteVP.linear(1000).zero_terminal_snr()
    torch.testing.assert_close(ours.betas, theirs, rtol=1e-9, atol=1e-12)
    assert ours.betas[-1] == 1
    assert ours == make_process("linear-1000-zero-snr")
    short = make_process("linear-1000/10-zero-snr")
    assert float(short.alpha(10)) == 0
    torch.testing.assert_close(short.abar, ours.abar[::100], rtol=0, atol=1e-14)


def test_a_custom_process_is_read_where_its_functions_are_known():
    known = CustomProcess("known", lambda t: 1 - t, lambda t: t)
    flow = RectifiedFlow()
    t = torch.linspace(0.01, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(known.time_of_log_snr(flow.log_snr(t)), t, rtol=1e-12, atol=0)
    assert NoiseProcess.from_config(known.to_config()) == known
    with pytest.raises(ValueError, match="is made of functions, which no file holds"):
        NoiseProcess.from_config({**known.to_config(), "name": "unknown"})


def test_a_signal_that_is_rounding_is_none():
    turn = torch.pi / 2
    process = CustomProcess("quarter turn", lambda t: (turn * t).cos(), lambda t: (turn * t).sin())
    assert process.levels(1.0) == (0.0, 1.0)
    assert float(process.log_snr(1.0)) == -math.inf
    assert float(process.time_of_log_snr(-math.inf)) == 1.0
    level = torch.tensor([math.inf, 0.3, -math.inf], dtype=torch.float64, requires_grad=True)
    assert process.time_of_log_snr(level).isfinite().all()
    assert float(ContinuousVP(0.0, 20.0).time_of_log_snr(math.inf)) == 0


def test_functions_of_something_else_are_refused():
    for alpha in (lambda t: 1.0, 3.0):
        with pytest.raises(TypeError, match=r"alpha must be (a function of a float64|callable)"):
            CustomProcess("wrong", alpha, lambda t: t)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: RectifiedFlow(0.0), "shift and time_scale must be positive"),
        (lambda: RectifiedFlow(t_min=1.0), "t_min must lie strictly between 0 and 1"),
        (lambda: ContinuousVP(20, 0.1), "beta_min < beta_max"),
        (lambda: ContinuousVP(time_scale=-1), "time_scale must be positive"),
        (lambda: CustomProcess("up", lambda t: t, lambda t: 1 - t), "strictly decreasing"),
        (lambda: CustomProcess("a", torch.cos, torch.sin, 1.0, 2.0), "0 < t_min < t_max"),
        (lambda: CustomProcess("a", torch.cos, torch.sin, prior_std=0.0), "prior_std must be"),
        (lambda: DiscreteVP([0.3]).zero_terminal_snr(), "a chain of one noising"),
        (lambda: DiscreteVP([1.0, 0.5]), "the last one may be 1"),
    ],
)
def test_bad_processes_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


@processes
def test_config_round_trip(process):
    back = NoiseProcess.from_config(json.loads(json.dumps(process.to_config())))
    assert back == process
    assert back != VE(0.01, 3.0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="did you mean 'DiscreteVP'"):
        NoiseProcess.from_config({"kind": "discretevp", "betas": [0.1]})


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0], [1.1], [math.nan], [-0.1]])
def test_bad_betas_are_refused(betas):
    with pytest.raises((TypeError, ValueError), match="beta"):
        DiscreteVP(betas)


@pytest.mark.parametrize("levels", [(0.0, 1.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)])
def test_bad_noise_levels_are_refused(levels):
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        VE(*levels)


@given(low=st.floats(-3, 14), high=st.floats(-3, 14))
def test_the_kinks_of_a_chain_are_its_inner_integers(low, high):
    inside = [float(n) for n in range(1, 10) if low < n < high]
    kinks = DiscreteVP.sigmoid(10).kinks(low, high)
    assert kinks.dtype == torch.float64
    assert kinks.tolist() == inside


def test_a_kink_is_where_the_slope_jumps():
    process, h = DiscreteVP([0.1, 0.5, 0.2]), 1e-6

    def jump(t):
        left, middle, right = (float(process.log_snr(t + d)) for d in (-h, 0, h))
        return abs(right - 2 * middle + left) / h

    assert process.kinks(0.5, 3).tolist() == [1, 2]
    assert all(jump(t) > 0.1 for t in (1.0, 2.0))
    assert all(jump(t) < 1e-3 for t in (0.8, 1.5, 2.7))


def test_a_ve_has_no_kinks():
    kinks = VE().kinks(0.0, 80.0)
    assert kinks.shape == (0,)
    assert kinks.dtype == torch.float64


def test_processes_have_names():
    assert make_process("sigmoid-10") == DiscreteVP.sigmoid(10)
    assert make_process("linear-1000") == DiscreteVP.linear(1000)
    assert make_process("cosine-50") == DiscreteVP.cosine(50)
    assert make_process("ve") == VE()
    assert make_process("ve-0.01-50") == VE(0.01, 50)
    assert make_process("ve-2e-3-80.5") == VE(0.002, 80.5)
    assert make_process("flow") == RectifiedFlow()
    assert make_process("flow-3") == RectifiedFlow(3.0)
    assert make_process("vp") == ContinuousVP()
    assert make_process("vp-0.2-10") == ContinuousVP(0.2, 10.0)


@settings(deadline=None)
@given(st.data())
def test_a_subsampled_chain_has_the_long_one_s_levels(data):
    betas = data.draw(st.lists(st.floats(1e-6, 0.6), min_size=1, max_size=200))
    steps = data.draw(st.integers(1, min(len(betas), 60)))
    long = DiscreteVP(betas)
    try:
        short = long.subsampled(steps)
    except ValueError as error:
        assert "too few" in str(error)
        assert long.abar[-1] < 1e-15
        return
    times = [round(k * len(betas) / steps) for k in range(steps + 1)]
    assert len(set(times)) == short.t_max + 1 == steps + 1
    torch.testing.assert_close(short.abar, long.abar[times], rtol=0, atol=1e-15)
    torch.testing.assert_close(
        short.betas, 1 - long.abar[times[1:]] / long.abar[times[:-1]], rtol=0, atol=1e-13
    )
    torch.testing.assert_close(
        DiscreteVP(betas).subsampled(len(betas)).betas, long.betas, rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("name", ["linear-1000/10", "cosine-1000/7", "sigmoid-1000/1000"])
def test_named_chains_are_subsampled(name):
    long, steps = name.split("/")
    long, short = make_process(long), make_process(name)
    assert short == long.subsampled(int(steps))
    assert NoiseProcess.from_config(short.to_config()) == short
    visited = Schedule.trailing(long, int(steps)).times.flip(0).long()
    # Each noising rounds 1 - beta, its quotient and its product, all at most 1.
    tolerance = 2 * int(steps) * torch.finfo(torch.float64).eps
    torch.testing.assert_close(short.abar, long.abar[visited], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("linear-10/11", "a chain of 10 noisings has no 11 to visit"),
        ("linear-1000/", "as in 'linear-1000'; got 'linear-1000/'"),
        ("linear-1000/0", "perhaps with how many of them to visit"),
        ("linear-/10", "perhaps with how many of them to visit"),
        ("linear-1000/10/2", "perhaps with how many of them to visit"),
        ("linear-20000/1", "1 of 20000 noisings are too few"),
        ("liner-1000", "unknown noise process 'liner'; did you mean 'linear'"),
        ("linear", "as in 'linear-1000'; got 'linear'"),
        ("cosine-0", "needs its number of noisings"),
        ("cosine-1.5", "needs its number of noisings"),
        ("ve-80", "two noise levels or none"),
        ("ve-", "two noise levels or none"),
        ("ve-a-b", "two noise levels or none"),
        ("ve-80-0.002", "sigma_min < sigma_max"),
        ("flow-", "as in 'flow-3'; got 'flow-'"),
        ("vp-20", "two betas or none"),
        ("linear-1000-zero", "as in 'linear-1000'"),
    ],
)
def test_bad_names_are_refused(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_process(name)


@pytest.mark.parametrize("process", [DiscreteVP.linear(100), VE()])
def test_levels_are_remembered_and_right(process, monkeypatch):
    times = [process.t_max, 0.37 * process.t_max, process.t_min, 0.0]
    for t in times:
        assert process.levels(t) == (float(process.alpha(t)), float(process.sigma(t)))
    known = {t: process.levels(t) for t in times}
    monkeypatch.setattr(process, "alpha", None)  # looked up no more
    assert {t: process.levels(t) for t in times} == known
    assert process.to_config() == type(process).from_config(process.to_config()).to_config()
