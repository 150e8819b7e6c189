"""Denoisers in other units than their network's, against exact mixtures."""

import math

import pytest
import torch
from conditioning import rounding
from torch import nn

from fewstep.agents import (
    DODE,
    SFTPG,
    BehaviorCloning,
    CheckpointError,
    Denoiser,
    ScheduleLearning,
    SolverPolicy,
    VarianceLearning,
)
from fewstep.agents.denoisers.exact import MixtureBody
from fewstep.agents.denoisers.networks import MLP, SmallUNet, UNet2D
from fewstep.agents.pretrained import save_pretrained
from fewstep.agents.solvers import make_solver
from fewstep.envs import VE, DiffusionMDP, DiscreteVP, RectifiedFlow, Schedule, Target
from fewstep.envs.mdp import no_reward

pytestmark = pytest.mark.numeric

VP = DiscreteVP.linear(1000)
MEANS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STD = 0.2
UNITS = [(0.5, 0.5), (-2.0, 0.3), (1.0, -1.0)]


class Preconditioned(nn.Module):
    """F of EDM's preconditioning whose D is the exact denoiser of a mixture."""

    def __init__(self, means, std, sigma_data):
        super().__init__()
        self.exact = MixtureBody(VE(), means, std, "sample")
        self.sigma_data = sigma_data

    def forward(self, scaled, time):
        sigma = (4 * time).exp().view(-1, 1)
        root = (sigma**2 + self.sigma_data**2).sqrt()
        sample = scaled * root
        clean = self.exact(sample, sigma[:, 0].contiguous())
        skip, out = self.sigma_data**2 / root**2, sigma * self.sigma_data / root
        return (clean - skip * sample) / out


def network_of(process, prediction, scale, shift):
    """The exact denoiser of y = scale x + shift for the mixture's x."""
    means, std = scale * MEANS + shift, abs(scale) * STD
    if prediction == "edm":
        return Denoiser(Preconditioned(means, std, 0.7), process, "edm", sigma_data=0.7)
    return Denoiser(MixtureBody(process, means, std, prediction), process, prediction)


@pytest.mark.parametrize(("scale", "shift"), UNITS)
@pytest.mark.parametrize(
    ("theirs", "prediction", "ours"),
    [
        (VP, "epsilon", None),
        (VP, "sample", None),
        (DiscreteVP.sigmoid(10), "sample", None),
        (VE(), "sample", None),
        (VE(), "edm", None),
        (VE(), "edm", DiscreteVP.linear(100)),
        (VP, "sample", VE(0.01, 50)),
        (RectifiedFlow(3.0, 1000.0), "sample", None),
        (VP, "sample", DiscreteVP.linear(100)),
    ],
)
def test_it_is_the_exact_denoiser_of_the_rescaled_data(
    theirs, prediction, ours, scale, shift, generator
):
    """E[x_0 | x_t] and E[eps | x_t] of the mixture in its own units, to rounding."""
    rescaled = network_of(theirs, prediction, scale, shift).rescaled(scale, shift, process=ours)
    process = rescaled.process
    # E[x_0 | x_t] as the network itself says it: no digits are lost in a conversion.
    exact = Denoiser(MixtureBody(process, MEANS, STD, "sample"), process, "sample")
    clean, noise = torch.randn(2, 4, 3, generator=generator(), dtype=torch.float64)
    times = [process.t_min, 0.37 * process.t_max + 0.25, process.t_max / 2]
    for t in times:
        each = torch.full((4,), float(t), dtype=torch.float64)
        sample = process.add_noise(MEANS + STD * clean, each, noise)
        for time in (t, each, torch.tensor(t, requires_grad=True, dtype=torch.float64)):
            close = {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(
                rescaled.denoised(sample, time), exact.denoised(sample, time), **close
            )
            # The noise is the small difference of sample and clean sample, over sigma.
            close["atol"] = 1e-12 / float(process.sigma(t))
            torch.testing.assert_close(
                rescaled.epsilon(sample, time), exact.epsilon(sample, time), **close
            )


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_what_the_body_should_predict_is_in_its_own_units(prediction, generator):
    network = Denoiser(MLP((3,), 1000), VP, prediction)
    rescaled = network.rescaled(-0.5, 0.25)
    clean, noise = torch.randn(2, 5, 3, generator=generator(), dtype=torch.float64)
    for t in (400.0, torch.tensor([1, 3, 40, 500, 1000])):
        expected = network.training_target(-0.5 * clean + 0.25, -noise, t)
        torch.testing.assert_close(rescaled.training_target(clean, noise, t), expected)


@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_the_levels_are_the_network_s_divided_by_the_scale(scale):
    rescaled = Denoiser(MLP((3,), 1000), VP).rescaled(scale, 0.5)
    times = torch.arange(1, 1001)
    ratio = lambda process: process.sigma(times) / process.alpha(times)  # noqa: E731
    torch.testing.assert_close(ratio(rescaled.process), ratio(VP) / abs(scale), rtol=1e-12, atol=0)
    assert [rescaled.network_time(float(t)) for t in times] == list(range(1000))
    levels = Denoiser(MLP((3,), 1000), VE()).rescaled(scale).process
    assert (levels.t_min, levels.t_max) == (0.002 / abs(scale), 80 / abs(scale))


class Table(nn.Module):
    """An embedding table: it takes whole indices only."""

    def __init__(self, levels):
        super().__init__()
        self.table = nn.Embedding(levels, 3)

    def forward(self, sample, time):
        assert time.dtype == torch.int64
        assert time.shape == sample.shape[:1]
        self.stride = time.stride(0)
        return sample * self.table(time)


def test_whole_noisings_stay_whole(generator):
    """Rounding would otherwise ask an embedding table at 398.9999999."""
    network = Denoiser(Table(1000), VP)
    rescaled = network.rescaled(0.7, 0.1)
    sample = torch.randn(1000, 3, generator=generator(), dtype=torch.float32)
    times = torch.arange(1, 1001)
    for each in (times, times.float(), times.double()):
        torch.testing.assert_close(
            rescaled(sample, each) / sample, rescaled(sample, times) / sample
        )
    for t in (1, 2.0, 999.0, 1000.0):
        rescaled(sample[:2], t)
        assert network.body.stride == 0


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_gradient_by_the_time_is_that_of_the_exact_denoiser(scale, generator):
    """Between noisings, and at one towards the later noisings, as of any denoiser."""
    process = DiscreteVP([0.1, 0.3, 0.5, 0.55])
    body = MixtureBody(process, scale * MEANS + 0.5, scale * STD, "sample")
    rescaled = Denoiser(body, process, "sample").rescaled(scale, 0.5)
    exact = Denoiser(
        MixtureBody(rescaled.process, MEANS, STD, "sample"), rescaled.process, "sample"
    )
    sample = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    for t in (1.0, 2.0, 3.0, 4.0, 1.5, 2.75):
        slopes = []
        for denoiser in (rescaled, exact):
            time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
            value = denoiser.denoised(sample, time).sum()
            slopes.append(torch.autograd.grad(value, time)[0])
        torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


# In these units the chain ends with less signal than solvers in log-SNR like.
@pytest.mark.filterwarnings("ignore:.*its first step is so long")
@pytest.mark.filterwarnings("ignore:Sampling ends at time")
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver-3", "dpm-solver++-2m"])
@pytest.mark.parametrize("theirs", [VP, VE()], ids=["VP", "VE"])
def test_solvers_policies_and_distillation_take_it(solver, theirs, tmp_path, generator):
    """The samples, and what D-ODE fits, are those of the exact denoiser in the data's units."""
    rescaled = network_of(theirs, "sample", 0.5, 0.5).rescaled(0.5, 0.5)
    process = rescaled.process
    exact = Denoiser(MixtureBody(process, MEANS, STD, "sample"), process, "sample")
    schedule = (
        Schedule.karras(process, 6, append_zero=False)
        if theirs != VP
        else Schedule.uniform(process, 6, end=1.0)
    )
    tableau = make_solver(solver, schedule)
    noise = process.prior_sample((20, 3), generator(), t=process.t_max, dtype=torch.float64)
    ours = SolverPolicy(tableau, rescaled).sample(20, noise=noise)
    torch.testing.assert_close(
        ours, SolverPolicy(tableau, exact).sample(20, noise=noise), rtol=1e-9, atol=1e-9
    )
    rescaled.save(tmp_path / "rescaled.safetensors")
    loaded = Denoiser.load(tmp_path / "rescaled.safetensors", body=rescaled.body)
    assert torch.equal(SolverPolicy(tableau, loaded).sample(20, noise=noise), ours)
    if solver == "ddim":
        fits = [
            DODE.without_data(d, schedule, (3,), solver=solver, batch_size=30, check_teacher=False)
            for d in (rescaled, exact)
        ]
        for agent in fits:
            agent.learn()
        # The samples of both tables: where the first steps have next to nothing to correct, the
        # lambdas themselves are lost in the rounding of float32.
        first, second = (agent.tableau.sample(exact, noise) for agent in fits)
        assert all(agent.returned == "distilled" for agent in fits)
        # The fit is on noise and answers in float32: five roundings of each term of the table.
        single = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
        share = single * rounding(fits[1].tableau, exact, noise) / 10
        tolerance = share * max(1.0, float(first.abs().max()))
        torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


def test_a_network_of_images_in_0_to_1_learns_in_an_environment_of_minus_1_to_1(
    tmp_path, generator
):
    """The recipe: the network goes on training on what it was trained on, and is saved as it is."""
    images = torch.rand(64, 1, 8, 8, generator=generator()) * 2 - 1
    network = Denoiser(SmallUNet((1, 8, 8), width=8), VP)
    denoiser = network.rescaled(0.5, 0.5)
    mdp = DiffusionMDP(
        Target.from_samples(images, "Images"),
        denoiser.process,
        Schedule.uniform(denoiser.process, 3),
    )
    seen = []
    network.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    cloning = BehaviorCloning(mdp, denoiser, batch_size=64, seed=1)
    cloning.learn(cloning.timesteps_per_round)
    # Data in [0, 1] under the noise of the network's own process.
    source = generator(1)
    clean = mdp.target.sample(64, source)
    t = torch.randint(1, 1001, (64,), generator=source)
    expected = VP.add_noise((clean + 1) / 2, t, torch.randn(64, 1, 8, 8, generator=source))
    torch.testing.assert_close(seen[0], expected)
    agent = SFTPG(mdp, denoiser, batch_size=4, minibatch_size=4, ema=0.9)
    agent.learn(agent.timesteps_per_round)
    agent.save(tmp_path / "agent.safetensors")
    again = SFTPG.load(tmp_path / "agent.safetensors", mdp)
    noise = torch.randn(2, 1, 8, 8, generator=generator())
    first, second = (a.sample(2, noise=noise, generator=generator(5)) for a in (agent, again))
    assert torch.equal(first, second)
    network.body.load_state_dict(agent.denoiser.body.state_dict())
    sample = torch.randn(2, 1, 8, 8, generator=generator())
    alpha, theirs = (float(p.alpha(500)) for p in (denoiser.process, VP))
    with torch.no_grad():
        torch.testing.assert_close(
            agent.denoiser.epsilon(sample, 500),
            network.epsilon(theirs * (0.5 * sample / alpha + 0.5), 500),
        )


@pytest.mark.parametrize(("scale", "shift"), [(0, 0), (math.nan, 0), (math.inf, 0), (1, math.nan)])
def test_impossible_units_are_refused(scale, shift):
    with pytest.raises(ValueError, match="other than 0"):
        Denoiser(MLP((3,), 1000), VP).rescaled(scale, shift)


def test_what_cannot_be_is_refused(tmp_path):
    network = Denoiser(MLP((3,), 1000), VP)
    with pytest.raises(ValueError, match="rescaled already"):
        network.rescaled(2.0).rescaled(2.0)
    narrow = network.rescaled(2.0, process=VP)
    sample = torch.zeros(2, 3)
    narrow.epsilon(sample, 500.0)
    for t in (1000.0, torch.tensor([10.0, 1000.0])):
        with pytest.raises(ValueError, match="was trained up to 157"):
            narrow.epsilon(sample, t)
    with pytest.raises(ValueError, match="was trained up to 80"):
        Denoiser(MLP((3,), 64, time_range=(-2, 2)), VE(), "edm").rescaled(
            2.0, process=VE()
        ).epsilon(sample, 50.0)
    network.gamma = torch.ones(1000, dtype=torch.float64)
    assert torch.equal(network.rescaled(2.0).gamma, network.gamma)
    with pytest.raises(ValueError, match="Gamma"):
        network.rescaled(2.0, process=VE(0.01, 10))
    unet = Denoiser(UNet2D((1, 8, 8), preset="tiny"), VP).rescaled(2.0)
    with pytest.raises(ValueError, match="is rescaled"):
        save_pretrained(unet, tmp_path / "pipeline")
    Denoiser(Table(1000), VP).rescaled(2.0).save(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="foreign"):
        Denoiser.load(tmp_path / "foreign.safetensors")


# Its schedule ends at time 1 of a short chain: what is compared needs no clean samples.
@pytest.mark.filterwarnings("ignore:Sampling ends at time")
def test_what_agents_learn_of_it_is_what_they_learn_of_the_exact_denoiser():
    """Gamma counts noise, which has no units; a learned schedule lies on the data's own levels."""
    rescaled = network_of(DiscreteVP.linear(20), "sample", 0.5, 0.5).rescaled(0.5, 0.5)
    process = rescaled.process
    body = MixtureBody(process, MEANS, STD, "sample")
    exact = Denoiser(body, process, "sample", sigma_data=rescaled.sigma_data)
    samples = (MEANS + 0.0).float().repeat(10, 1)
    schedule = Schedule.uniform(process, 5)
    found = []
    for denoiser in (rescaled, exact):
        mdp = DiffusionMDP(Target.from_samples(samples, "Mixture"), process, schedule, no_reward)
        agent = VarianceLearning(mdp, denoiser, batch_size=20, samples_per_time=20)
        agent.learn()
        few = {"schedule_rounds": 3, "tuning_rounds": 0, "batch_size": 10, "start": "environment"}
        learner = ScheduleLearning.without_data(
            denoiser, Schedule.uniform(process, 4, end=1.0), (3,), solver="ddim", **few
        )
        learner.learn()
        found.append((agent.denoiser.gamma, learner.schedule.times))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)
    assert found[0][1].unique().numel() == 5


def test_a_second_head_of_it_survives_its_file(tmp_path, generator):
    network = Denoiser(MLP((3,), 20), DiscreteVP.linear(20))
    denoiser = network.rescaled(0.5, 0.5, clip=True)
    mdp = DiffusionMDP(
        Target.from_samples(MEANS.float()), denoiser.process, Schedule.uniform(denoiser.process, 5)
    )
    agent = VarianceLearning(mdp, denoiser, kind="sn", batch_size=8)
    agent.learn(2 * agent.timesteps_per_round)
    trained = agent.denoiser
    trained.save(tmp_path / "head.safetensors")
    loaded = Denoiser.load(tmp_path / "head.safetensors")
    assert loaded.clip and loaded.process == denoiser.process
    sample = torch.randn(4, 3, generator=generator())
    with torch.no_grad():
        ours, theirs = (d.outputs_with_covariance(sample, 7.0) for d in (trained, loaded))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    with pytest.raises(ValueError, match="second head"):
        network.head = trained.head
        network.rescaled(2.0)
