"""Exact denoisers of mixtures against the score of their density, by autograd."""

import pytest
import torch

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.exact import MixtureBody, mixture
from fewstep.envs import VE, DiscreteVP

pytestmark = pytest.mark.numeric

MEANS = torch.tensor([[1.0, -0.5], [-2.0, 0.3], [0.4, 1.5]], dtype=torch.float64)
WEIGHTS = [0.5, 0.2, 0.3]


def log_density(sample, alpha, sigma):
    """log p_t of the mixture, written with torch.distributions."""
    components = torch.distributions.Independent(
        torch.distributions.Normal(alpha * MEANS, ((alpha * 0.3) ** 2 + sigma**2) ** 0.5), 1
    )
    shares = torch.distributions.Categorical(torch.tensor(WEIGHTS, dtype=torch.float64))
    return torch.distributions.MixtureSameFamily(shares, components).log_prob(sample)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize(
    ("process", "times"),
    [(DiscreteVP.linear(1000), [1000.0, 431.7, 3.0]), (VE(0.01, 20), [20.0, 0.7, 0.01])],
)
def test_the_prediction_is_the_score(process, times, prediction, generator):
    denoiser = Denoiser(MixtureBody(process, MEANS, 0.3, prediction, WEIGHTS), process, prediction)
    for t in times:
        alpha, sigma = process.levels(t)
        sample = 2 * torch.randn(7, 2, generator=generator(), dtype=torch.float64)
        sample.requires_grad_()
        (score,) = torch.autograd.grad(log_density(sample, alpha, sigma).sum(), sample)
        sample = sample.detach()
        torch.testing.assert_close(denoiser.epsilon(sample, t), -sigma * score)
        clean = (sample + sigma**2 * score) / alpha
        torch.testing.assert_close(denoiser.denoised(sample, t), clean, rtol=1e-6, atol=1e-6)
        each = torch.full((7,), t, dtype=torch.float64)
        torch.testing.assert_close(denoiser.epsilon(sample, each), denoiser.epsilon(sample, t))


def test_the_target_is_the_mixture():
    denoiser, target = mixture(VE(), components=4, dimension=3, std=0.1, seed=5)
    away = torch.cdist(target.samples.double(), denoiser.body.means).min(dim=1)
    assert away.values.square().mean() == pytest.approx(3 * 0.1**2, rel=0.05)
    assert away.indices.bincount(minlength=4).min() > 0.2 * len(target.samples)


@pytest.mark.parametrize(
    "arguments", [(MEANS[0], 0.3), (MEANS, 0.0), (MEANS, 0.3, "v"), (MEANS, float("nan"))]
)
def test_what_is_no_mixture_is_refused(arguments):
    with pytest.raises(ValueError, match=r"mixture"):
        MixtureBody(VE(), *arguments)
