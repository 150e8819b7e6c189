"""Behaviour cloning: the DDPM loss falls, and the averaged network samples."""

import statistics

import pytest
import torch
from torch import nn

from fewstep.agents import BehaviorCloning, Denoiser
from fewstep.agents.denoisers.networks import MLP
from fewstep.agents.denoisers.parameterisations import time_range_of
from fewstep.critics.metrics.distances import sliced_wasserstein
from fewstep.envs import VE, DiffusionMDP, Schedule, Target

pytestmark = pytest.mark.numeric


def test_it_learns_to_sample_the_target(mdp, make_denoiser):
    real, ratios, after = mdp.target.sample_fresh(2000), [], []
    for seed in range(3):
        agent = BehaviorCloning(
            mdp, make_denoiser(), batch_size=256, solver_options={"variance": "small"}, seed=seed
        )
        losses = []
        assert sliced_wasserstein(agent.sample(2000), real) > 0.5
        agent.learn(
            600 * 256,
            lambda local, _, seen=losses: (
                seen.append(float(local["metrics"]["train/loss"])) or True
            ),
        )
        ratios.append(statistics.mean(losses[-100:]) / statistics.mean(losses[:10]))
        after.append(sliced_wasserstein(agent.sample(2000), real))
    assert statistics.median(ratios) < 0.5
    assert statistics.median(after) < 0.2


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_the_loss_is_the_mean_squared_error_of_the_prediction(prediction, mdp, process):
    """A body that answers 0 has loss E target^2, known from the second moment of the data."""

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, sample, time):
            return self.scale * sample

    denoiser = Denoiser(Silent(), process, prediction)
    agent = BehaviorCloning(mdp, denoiser, batch_size=50_000, learning_rate=0.0)
    second = mdp.target.samples.square().mean()
    times = torch.arange(1, 5)
    alpha2, sigma2 = process.alpha(times) ** 2, process.sigma(times) ** 2
    expected = {"epsilon": 1.0, "sample": second, "v": (alpha2 + sigma2 * second).mean()}
    loss = float(agent.train_round()["train/loss"])
    assert loss == pytest.approx(float(expected[prediction]), rel=0.02)


def test_the_average_is_exponential_and_samples(mdp, make_denoiser, generator):
    agent = BehaviorCloning(mdp, make_denoiser(), batch_size=32, ema=0.9)
    average = [p.detach().clone() for p in agent.denoiser.parameters()]
    for _ in range(4):
        agent.train_round()
        for mine, live in zip(average, agent.denoiser.parameters(), strict=True):
            mine.mul_(0.9).add_(live.detach(), alpha=0.1)
    torch.testing.assert_close(list(agent.sampling_denoiser.parameters()), average)
    noise = torch.randn(5, 2, generator=generator())
    drawn = agent.sample(5, noise=noise, generator=generator())
    for denoiser, same in ((agent.sampling_denoiser, True), (agent.denoiser, False)):
        by_hand = agent.tableau.sample(denoiser, noise, generator=generator())
        assert torch.equal(drawn, by_hand) == same


def test_the_gradient_is_clipped_and_its_norm_reported(mdp, make_denoiser):
    agent = BehaviorCloning(mdp, make_denoiser(), batch_size=32, max_grad_norm=1e-3)
    reported = agent.train_round()["train/grad_norm"]
    norm = torch.stack([p.grad.norm() for p in agent.denoiser.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert reported > 1e-2


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_schedules(name, factors, mdp, make_denoiser):
    agent = BehaviorCloning(
        mdp, make_denoiser(), batch_size=8, learning_rate=0.01, lr_schedule=name
    )
    rates = []
    agent.learn(32, lambda *_: rates.append(agent.optimizer.param_groups[0]["lr"]) or True)
    assert rates == pytest.approx([0.01 * factor for factor in factors], rel=1e-5)


def test_every_level_is_visited(mdp, make_denoiser, count_calls):
    seen = []
    denoiser = make_denoiser()
    denoiser.body.register_forward_hook(lambda _body, arguments, _out: seen.append(arguments[1]))
    BehaviorCloning(mdp, denoiser, batch_size=4000).train_round()
    counts = torch.bincount(seen[0].long(), minlength=4)
    assert len(counts) == 4
    assert (counts - 1000).abs().max() < 150


def test_a_variance_exploding_process_is_cloned_too(mdp):
    """Times are then uniform in log-SNR."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, sample, time):
            times.append(time.detach())
            return self.layer(sample)

    times = []
    process = VE(0.01, 10)
    mdp = DiffusionMDP(mdp.target, process, Schedule.karras(process, 4), mdp.reward)
    agent = BehaviorCloning(mdp, Denoiser(Body(), process), batch_size=4000)
    agent.train_round()
    position = (times[0].log() - torch.tensor(0.01).log()) / torch.tensor(1000.0).log()
    assert position.min() >= -1e-6
    assert position.max() <= 1 + 1e-6
    quantiles = torch.quantile(position, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.04)
    assert agent.sample(3).shape == (3, 2)


@pytest.fixture
def make_edm(reward):
    """EDM on a 2-D Gaussian of mean (0.5, -0.5) and standard deviation 0.4, sigma_data 0.5."""

    def gaussian(n, seed):
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
        return 0.4 * noise + torch.tensor([0.5, -0.5])

    def make(sigma_data=0.5, **settings):
        process = VE(0.01, 10)
        schedule = Schedule.karras(process, 6)
        mdp = DiffusionMDP(Target.from_sampler(gaussian, "G", 4000), process, schedule, reward)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = MLP(
                (2,),
                8,
                hidden=32,
                layers=2,
                input_gain=1.0,
                time_range=time_range_of("edm", process),
            )
        denoiser = Denoiser(body, process, "edm", sigma_data)
        return BehaviorCloning(mdp, denoiser, **{"solver": "ddim", **settings})

    return make


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_an_edm_denoiser_approaches_the_exact_one(seed, make_edm, generator):
    agent = make_edm(batch_size=512, learning_rate=1e-2, seed=seed)
    process, mean = agent.mdp.process, torch.tensor([0.5, -0.5])
    clean = agent.mdp.target.sample_fresh(2000)

    def worst_error():
        errors = []
        for sigma in (0.1, 0.5, 2.0, 8.0):
            noise = torch.randn(clean.shape, generator=generator())
            noisy = process.add_noise(clean, sigma, noise)
            exact = (0.4**2 * noisy + sigma**2 * mean) / (0.4**2 + sigma**2)
            with torch.no_grad():
                denoised = agent.sampling_denoiser.denoised(noisy, sigma)
            errors.append(float((denoised - exact).square().mean().sqrt()))
        return max(errors)

    before = worst_error()
    agent.learn(500 * 512)
    assert worst_error() < 0.06 < 0.3 < before
    sample = agent.sample(4000)
    torch.testing.assert_close(sample.mean(0), mean, rtol=0, atol=0.05)


def test_edm_draws_log_normal_levels_within_the_range(make_edm):
    agent = make_edm(batch_size=20_000, p_mean=-0.5, p_std=2.0)
    seen = []
    agent.denoiser.register_forward_hook(lambda _, arguments, _out: seen.append(arguments[1]))
    agent.train_round()
    log_sigma = seen[0].log()
    assert float(seen[0].min()) == agent.mdp.process.t_min
    assert float(seen[0].max()) == agent.mdp.process.t_max
    quantiles = torch.quantile(log_sigma, torch.tensor([0.1587, 0.5, 0.8413]).double())
    torch.testing.assert_close(
        quantiles, torch.tensor([-2.5, -0.5, 1.5]).double(), rtol=0, atol=0.08
    )


def test_an_edm_agent_comes_back_and_goes_on(make_edm, tmp_path):
    agent = make_edm(sigma_data=0.8, batch_size=32, p_mean=-0.7, p_std=1.0)
    agent.learn(3 * 32)
    agent.save(tmp_path / "agent")
    again = BehaviorCloning.load(tmp_path / "agent", agent.mdp)
    assert (again.settings.p_mean, again.settings.p_std) == (-0.7, 1.0)
    assert (again.denoiser.prediction, again.denoiser.sigma_data) == ("edm", 0.8)
    assert torch.equal(agent.train_round()["train/loss"], again.train_round()["train/loss"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"p_std": 0.0}, "p_std must be above 0"),
        ({"p_mean": float("nan")}, "p_mean must be finite, got nan"),
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"ema": -0.1}, "ema must be at least 0 and below 1"),
        ({"solver": "ddmi"}, "did you mean 'ddim'"),
        ({"solver_options": {"varianc": "small"}}, "did you mean 'variance'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, complaint, mdp, make_denoiser):
    with pytest.raises(ValueError, match=complaint):
        BehaviorCloning(mdp, make_denoiser(), **settings)
