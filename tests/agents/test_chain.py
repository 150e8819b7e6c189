"""Log-densities and the Gaussian chain behind them."""

import math

import numpy as np
import pytest
import torch

from fewstep.agents.samplers.gaussian import GaussianChain, gaussian_log_density
from fewstep.agents.samplers.tableau import Tableau
from fewstep.agents.solvers import ancestral, ddim
from fewstep.envs import Schedule

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
@pytest.mark.parametrize("kind", ["number", "scalar", "row", "full"])
def test_log_density_is_that_of_torch(shape, kind, generator):
    rng = generator()
    sample, mean = torch.randn(2, 5, *shape, generator=rng, dtype=torch.float64)
    std = {
        "number": 0.3,
        "scalar": torch.tensor(0.3, dtype=torch.float64),
        "row": torch.rand(5, *[1] * len(shape), generator=rng, dtype=torch.float64) + 0.1,
        "full": torch.rand(5, *shape, generator=rng, dtype=torch.float64) + 0.1,
    }[kind]
    expected = torch.distributions.Normal(mean, std).log_prob(sample).flatten(1)
    total = gaussian_log_density(sample, mean, std)
    assert total.shape == (5,)
    torch.testing.assert_close(total, expected.sum(1), rtol=1e-13, atol=1e-12)
    average = gaussian_log_density(sample, mean, std, "mean")
    torch.testing.assert_close(average, expected.mean(1), rtol=1e-13, atol=1e-12)


@pytest.fixture
def chain(make_denoiser, process):
    return GaussianChain(
        make_denoiser(), ancestral(Schedule.uniform(process, 4), "beta"), learn_std=True
    )


def test_one_step_for_all_equals_a_step_for_each(chain, generator):
    sample = torch.randn(7, 2, generator=generator())
    for step in range(chain.steps):
        mean, std = chain.distribution(sample, step)
        means, stds = chain.distribution(sample, torch.full((7,), step))
        torch.testing.assert_close(means, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stds.expand_as(means), std.expand_as(mean), rtol=0, atol=0)


def test_mixed_steps_are_each_their_own(chain, generator):
    sample, after = torch.randn(2, 4, 2, generator=generator())
    order = torch.tensor([3, 0, 2, 1])
    together = chain.log_density(after, sample, order)
    for row, step in enumerate(order.tolist()):
        alone = chain.log_density(after[row : row + 1], sample[row : row + 1], step)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_the_mean_is_the_tableau_without_its_noise(chain, generator):
    sample = torch.randn(5, 2, generator=generator())
    table = chain.tableau
    for j in range(chain.steps):
        epsilon = chain.denoiser.epsilon(sample, float(table.times[j]))
        expected = float(table.scale[j]) * sample + float(table.weights[j, j]) * epsilon
        mean, std = chain.distribution(sample, j)
        torch.testing.assert_close(mean, expected)
        assert float(std.detach()) == pytest.approx(table.noise[j], rel=1e-6)


def test_the_network_is_told_the_times_that_the_tableau_asks_at(chain, generator):
    """The steps are found by the times of the states all the same."""
    plain = chain.tableau
    table = plain.replace(asked_times=np.array([3.0, 2.0, 1.0, 2.0]))
    told = GaussianChain(chain.denoiser, table)
    # A new network says the same at all times.
    for parameter in chain.denoiser.parameters():
        parameter.data.normal_(std=0.5, generator=generator(1))
    sample = torch.randn(5, 2, generator=generator())
    still = table.replace(noise=0 * table.noise)
    for j in range(told.steps):
        output = table.evaluate(told.denoiser, sample, j)
        expected = still.advance(j, {j: sample}, {j: output})
        for step in (j, torch.full((5,), j)):
            torch.testing.assert_close(told.distribution(sample, step)[0], expected)
        assert not torch.allclose(chain.distribution(sample, j)[0], expected)
    assert told.steps_at(torch.tensor(table.times[:-1])).tolist() == [0, 1, 2, 3]
    assert told.export().asked_times.tolist() == table.asked_times.tolist()


def test_gradient_of_the_standard_deviation(chain, generator):
    """d log N / d log s = z^2 - 1 a dimension, and only for the step that was taken."""
    sample, after = torch.randn(2, 1, 2, generator=generator())
    chain.log_density(after, sample, 2).sum().backward()
    mean, std = chain.distribution(sample, 2)
    z = ((after - mean) / std).detach()
    expected = torch.zeros(4)
    expected[2] = (z.square() - 1).sum()
    torch.testing.assert_close(chain.log_std.grad, expected)


def test_learned_deviations_are_exported(chain):
    with torch.no_grad():
        chain.log_std += math.log(2)
    np.testing.assert_allclose(chain.export().noise, 2 * chain.tableau.noise, rtol=1e-6)
    np.testing.assert_array_equal(chain.export().weights, chain.tableau.weights)


@pytest.mark.parametrize("grad", [False, True])
def test_the_chain_moves_by_the_transition_it_scores(chain, grad, play, generator):
    noise = torch.randn(20_000, 2, generator=generator())
    with torch.set_grad_enabled(grad):
        states = play(chain, noise, generator(1))
    assert states.shape == (5, 20_000, 2)
    assert torch.equal(states[0], noise)
    assert states.requires_grad == grad
    for j in range(4):
        mean, std = chain.distribution(states[j], j)
        z = ((states[j + 1] - mean) / std).detach()
        assert z.mean().abs() < 0.03
        assert z.std() == pytest.approx(1, abs=0.02)


def test_samplers_without_a_density_are_refused(make_denoiser, process):
    schedule = Schedule.uniform(process, 4)
    for table in (ddim(schedule), ancestral(schedule, "small")):
        with pytest.raises(ValueError, match=r"no noise in .* last_std=0\.001"):
            GaussianChain(make_denoiser(), table)
    plain = ancestral(schedule, "beta")
    weights = plain.weights.copy()
    weights[2, 0] = 0.1
    for change in ({"weights": weights}, {"anchors": np.array([0, 0, 2, 3])}):
        parts = {"weights": plain.weights, "anchors": None, **change}
        memory = Tableau("memory", process, plain.times, plain.scale, noise=plain.noise, **parts)
        with pytest.raises(ValueError, match="earlier states or outputs"):
            GaussianChain(make_denoiser(), memory)
