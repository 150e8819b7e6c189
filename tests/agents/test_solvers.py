"""Coefficients of the solvers against formulas written anew, and against diffusers."""

from itertools import pairwise

import diffusers.schedulers.scheduling_ddim as diffusers_ddim
import diffusers.schedulers.scheduling_ddpm as diffusers_ddpm
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.solvers import ancestral, ddim, make_solver
from fewstep.envs import VE, DiscreteVP, Schedule

pytestmark = pytest.mark.numeric

TIMES = [1000, 731, 400, 90.5, 7, 0]


@pytest.fixture
def schedule(wave):
    return Schedule(wave.process, TIMES)


def abar(betas):
    return np.concatenate([[1.0], np.cumprod(1 - betas.numpy())])


def posterior(process, t, s):
    """q(x_s | x_t, x_0) by conditioning the joint Gaussian: (on x_t, on x_0, variance)."""
    alpha_t, sigma_t, alpha_s, sigma_s = (
        float(level(time)) for time in (t, s) for level in (process.alpha, process.sigma)
    )
    # x_s = alpha_s x_0 + sigma_s e and x_t = (alpha_t / alpha_s) x_s + fresh noise.
    covariance = alpha_t / alpha_s * sigma_s**2
    on_x_t = covariance / sigma_t**2
    return on_x_t, alpha_s - on_x_t * alpha_t, sigma_s**2 - covariance**2 / sigma_t**2


@pytest.mark.parametrize("process", [DiscreteVP.linear(1000), VE(0.002, 1000)])
def test_ancestral_is_the_posterior(process):
    table = ancestral(Schedule(process, TIMES), "small")
    large = ancestral(Schedule(process, TIMES), "large")
    for j, (t, s) in enumerate(pairwise(TIMES)):
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        on_x_t, on_x_0, variance = posterior(process, t, s)
        # x_0 is replaced by (x_t - sigma_t e) / alpha_t.
        assert table.scale[j] == pytest.approx(on_x_t + on_x_0 / alpha, rel=1e-10)
        assert table.weights[j, j] == pytest.approx(-on_x_0 * sigma / alpha, rel=1e-8)
        assert table.noise[j] ** 2 == pytest.approx(max(variance, 0), rel=1e-8, abs=1e-12)
        ratio = alpha / float(process.alpha(s))
        added = sigma**2 - ratio**2 * float(process.sigma(s)) ** 2
        assert large.noise[j] ** 2 == pytest.approx(added if s else 0.0, rel=1e-9)
    assert table.noise[-1] == large.noise[-1] == 0
    np.testing.assert_array_equal(table.weights, np.diag(np.diag(table.weights)))
    np.testing.assert_array_equal(table.times, TIMES)


def test_beta_variance_is_the_betas_where_every_step_is_visited():
    process = DiscreteVP.sigmoid(10)
    table = ancestral(Schedule.uniform(process, 10), "beta")
    np.testing.assert_allclose(table.noise**2, process.betas.numpy()[::-1], rtol=1e-9)
    large = ancestral(Schedule.uniform(process, 10), "large")
    np.testing.assert_array_equal(large.noise[:-1], table.noise[:-1])
    assert large.noise[-1] == 0


def test_variances_of_a_schedule_that_stops_before_clean_data(wave):
    schedule = Schedule(wave.process, [1000, 500, 1])
    assert (ancestral(schedule, "small").noise > 0).all()
    np.testing.assert_array_equal(
        ancestral(schedule, "large").noise, ancestral(schedule, "beta").noise
    )


def test_last_std_changes_the_last_transition_only(schedule):
    plain, changed = ancestral(schedule), ancestral(schedule, last_std=0.001)
    assert changed.noise[-1] == 0.001
    np.testing.assert_array_equal(changed.noise[:-1], plain.noise[:-1])
    np.testing.assert_array_equal(changed.weights, plain.weights)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_is_diffusers_ddpm(variance, clip, wave, generator):
    indices = [999, 730, 400, 123, 7, 0]  # 0-based: time t is index t - 1
    process = wave.process
    scheduler = diffusers_ddpm.DDPMScheduler(
        trained_betas=process.betas.numpy(), clip_sample=clip, variance_type=f"fixed_{variance}"
    )
    scheduler.set_timesteps(timesteps=indices)
    scheduler.alphas_cumprod = torch.from_numpy(abar(process.betas)[1:])  # float64
    noise = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    state, rng = noise, generator(1)
    for n in indices:
        epsilon = wave.body(state, torch.full((5,), n)).detach()
        state = scheduler.step(epsilon, n, state, generator=rng).prev_sample
    table = ancestral(Schedule(process, [n + 1 for n in indices] + [0]), variance, clip=clip)
    with torch.no_grad():
        ours = table.sample(wave, noise, generator=generator(1))
    torch.testing.assert_close(ours, state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers_ddim(eta, clip, wave, generator):
    scheduler = diffusers_ddim.DDIMScheduler(
        trained_betas=wave.process.betas.numpy(),
        clip_sample=clip,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        steps_offset=0,
    )
    scheduler.set_timesteps(8)
    scheduler.alphas_cumprod = torch.from_numpy(abar(wave.process.betas)[1:])
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    indices = scheduler.timesteps.tolist()
    assert indices == list(range(875, -1, -125))
    noise = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    state, rng = noise, generator(1)
    for n in indices:
        epsilon = wave.body(state, torch.full((5,), n)).detach()
        state = scheduler.step(epsilon, n, state, eta=eta, generator=rng).prev_sample
    table = ddim(Schedule(wave.process, [n + 1 for n in indices] + [0]), eta, clip=clip)
    with torch.no_grad():
        ours = table.sample(wave, noise, generator=generator(1))
    torch.testing.assert_close(ours, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [ancestral, ddim, lambda s, clip: ddim(s, 0.6, clip=clip)])
def test_a_clip_that_does_not_bite_changes_nothing(build, schedule, generator):
    class Inside(nn.Module):
        def forward(self, sample, time):
            return sample.tanh()

    denoiser = Denoiser(Inside(), schedule.process, "sample")
    noise = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    one, other = (
        build(schedule, clip=clip).sample(denoiser, noise, generator=generator(1))
        for clip in (False, True)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_ddim_on_any_grid_is_diffusers_dpm_solver_1(wave, generator):
    times = [1000, 731.25, 400, 90.5, 7]
    process = wave.process
    alpha = np.exp(-0.5 * np.interp(times, np.arange(1001), -np.log(abar(process.betas))))
    sigma = np.sqrt(1 - alpha**2)
    scheduler = DPMSolverSinglestepScheduler(
        trained_betas=process.betas.numpy(),
        solver_order=1,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(4)
    scheduler.sigmas = torch.from_numpy(sigma / alpha)
    noise = torch.randn(5, 2, 1, 1, generator=generator(), dtype=torch.float64)
    state = noise
    for t, timestep in zip(times, scheduler.timesteps, strict=False):
        time = torch.full((5,), t - 1, dtype=torch.float64)
        epsilon = wave.body(state.flatten(1), time).detach()
        state = scheduler.step(epsilon.view_as(state), timestep, state).prev_sample
    with torch.no_grad():
        ours = ddim(Schedule(process, times)).sample(wave, noise.flatten(1))
    torch.testing.assert_close(ours, state.flatten(1), rtol=1e-12, atol=1e-12)


def test_ddim_with_eta_1_is_ancestral_small(schedule):
    one, other = ddim(schedule, eta=1), ancestral(schedule, "small")
    for part in ("scale", "weights", "noise"):
        np.testing.assert_allclose(getattr(one, part), getattr(other, part), rtol=0, atol=1e-12)


def test_ddim_of_a_gaussian_has_the_value_of_the_appendix():
    """MATH.md A.1: data N(0, 0.25), x = 1 at log-SNR -3, three equal steps to log-SNR 2."""

    class Exact(nn.Module):
        def forward(self, sample, time):
            alpha, sigma = process.alpha(time + 1), process.sigma(time + 1)
            return sample * (sigma / (0.25 * alpha**2 + sigma**2)).unsqueeze(-1)

    process = DiscreteVP.linear(1000)
    log_snr = torch.linspace(-3, 2, 4, dtype=torch.float64)
    schedule = Schedule(process, process.time_of_log_snr(log_snr))
    start = torch.ones(1, 1, dtype=torch.float64)
    value = ddim(schedule).sample(Denoiser(Exact(), process), start)
    assert float(value) == pytest.approx(0.347735411852, abs=1e-11)
    # ... and it converges to the exact solution by its order, 1: four times the steps leave a
    # quarter of the error, to a share of the larger step, 5 / 100.
    errors = []
    for steps in (100, 400):
        log_snr = torch.linspace(-3, 2, steps + 1, dtype=torch.float64)
        fine = ddim(Schedule(process, process.time_of_log_snr(log_snr)))
        value = float(fine.sample(Denoiser(Exact(), process), start))
        errors.append(0.513789060102 - value)
    assert errors[0] / errors[1] == pytest.approx(4, rel=5 / 100)


def test_solvers_by_name(schedule):
    by_name = make_solver("ancestral", schedule, variance="large", last_std=0.5)
    assert by_name.to_json() == ancestral(schedule, "large", 0.5).to_json()
    with pytest.raises(ValueError, match="unknown solver 'ddmi'; did you mean 'ddim'"):
        make_solver("ddmi", schedule)
    with pytest.raises(ValueError, match=r"unknown option of solver 'ddim' 'etta'.*eta"):
        make_solver("ddim", schedule, etta=1)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda s: ddim(s, eta=1.1), "eta"),
        (lambda s: ddim(s, eta=-0.1), "eta"),
        (lambda s: ddim(s, eta=float("nan")), "eta"),
        (lambda s: ancestral(s, "smal"), "did you mean 'small'"),
        (lambda s: ancestral(s, last_std=-1.0), "last_std"),
        (lambda s: ancestral(s, last_std=float("nan")), "last_std"),
        (lambda s: ancestral(s, last_std=float("inf")), "last_std"),
    ],
)
def test_options_that_make_no_sense_are_refused(build, complaint, schedule):
    with pytest.raises(ValueError, match=complaint):
        build(schedule)
