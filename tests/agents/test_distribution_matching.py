"""What DMD promises: its gradients, what it judges by, and that it goes on after a kill."""

import math

import numpy as np
import pytest
import torch
from distilled import FEW, Smooth, gradients_of, in_float64, weights_of, world
from rounds import learn_rounds
from torch import nn
from torch.nn import functional

from fewstep.agents import DMD, Denoiser
from fewstep.agents.network_distillation.dmd import Noising
from fewstep.critics.energy import EnergyDistance

numeric = pytest.mark.numeric
FEW = {**FEW, "n_fake": 2, "scale": 2}


def make(conditional=False, guidance=None, **changes):
    mdp, denoiser = world(conditional=conditional)
    if guidance:
        denoiser = denoiser.given(guidance=guidance)
    return DMD(mdp, denoiser, **{**FEW, **changes})


def same_draws(agent, monkeypatch):
    """Note where the chains begin and how samples are noised, without changing it."""
    noted = []
    begun, noising = agent._begun, agent._noising

    def begin():
        noted.append([begun()])
        return noted[-1][0]

    def noise(like):
        noted[-1].append(noising(like))
        return noted[-1][1]

    monkeypatch.setattr(agent, "_begun", begin)
    monkeypatch.setattr(agent, "_noising", noise)
    return noted


@numeric
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("adversarial", [0.0, 0.3])
def test_the_student_s_gradient_is_that_of_its_loss(adversarial, micro, monkeypatch):
    """By an own implementation on a flow, guided teacher and all, with autograd."""
    in_float64(monkeypatch)
    settings = {"adversarial": adversarial, "micro_batch_size": micro, "max_grad_norm": None}
    agent = make(conditional=True, guidance=3.0, batch_size=7, n_fake=1, **settings)
    if agent.critic is not None:
        agent.critic.double()
    noted = same_draws(agent, monkeypatch)
    (theirs,) = gradients_of(agent, monkeypatch)
    (start, t, label), (tau, noise) = noted[-1]
    tau = tau.double()
    student, teacher, fake = (each.body for each in (agent.denoiser, agent.teacher, agent.fake))

    def clean(body, state, time, label):
        return state - time[:, None] * body(state, time, label)

    x = clean(student, start, t, label)
    with torch.no_grad():
        noisy = (1 - tau[:, None]) * x + tau[:, None] * noise
        without, with_it = (clean(teacher, noisy, tau, y) for y in (torch.full((7,), 3), label))
        real = without + 3 * (with_it - without)
        size = (x - real).abs().mean(1, keepdim=True) + 1e-6
        g = (clean(fake, noisy, tau, label) - real) / size
    loss = (x * g).sum() / 14  # its gradient by x is g / (N d)
    if adversarial:
        loss = loss + adversarial * functional.softplus(-agent.critic(x, label)).mean()
    ours = torch.autograd.grad(loss, list(agent.denoiser.parameters()))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(its, mine, rtol=1e-9, atol=1e-12)


@numeric
def test_the_fake_network_is_cloned_on_the_student_s_samples(monkeypatch):
    in_float64(monkeypatch)
    agent = make(batch_size=7, n_fake=1, max_grad_norm=None)
    noted, seen = same_draws(agent, monkeypatch), []

    def keep(*_):
        seen.append([weight.grad.clone() for weight in agent.fake.parameters()])

    monkeypatch.setattr(agent.fake_optimizer, "step", keep)
    learn_rounds(agent, 1)
    (start, t, _), (tau, noise) = noted[0]
    tau = tau.double()
    body = agent.teacher.body  # all three are alike yet
    with torch.no_grad():
        x = start - t[:, None] * body(start, t)
    noisy = (1 - tau[:, None]) * x + tau[:, None] * noise
    loss = (agent.fake.body(noisy, tau) - (noise - x)).square().mean()
    ours = torch.autograd.grad(loss, list(agent.fake.parameters()))
    for mine, its in zip(ours, seen[0], strict=True):
        torch.testing.assert_close(its, mine, rtol=1e-9, atol=1e-12)


@numeric
def test_samples_are_taken_where_the_student_s_own_chain_is(monkeypatch):
    """With the noise of the steps, by hand; each sample stops at a step of its own."""
    in_float64(monkeypatch)
    agent = make(batch_size=12)
    states, times, _ = agent._begun()
    source = torch.Generator().manual_seed(0)
    state = agent.mdp.initial(12, source)
    stops = torch.randint(4, (12,), generator=source)
    grid = [1.0, 0.75, 0.5, 0.25]
    for j in range(3):
        noise = torch.randn(12, 2, generator=source, dtype=torch.float64)
        with torch.no_grad():
            clean = state - grid[j] * agent.denoiser.body(state, torch.full((12,), grid[j]))
        moved = (1 - grid[j + 1]) * clean + grid[j + 1] * noise
        state = torch.where((stops > j)[:, None], moved, state)
    torch.testing.assert_close(states, state, rtol=1e-12, atol=1e-12)
    assert times.tolist() == [grid[stop] for stop in stops]
    assert len(set(stops.tolist())) == 4


GAUSSIAN = torch.tensor([[0.5, -0.5], [0.3, 0.8]], dtype=torch.float64)


class Posterior(nn.Module):
    """The exact mean of the clean sample on a flow, for data N(mean, std^2)."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, sample, time):
        alpha, sigma = 1 - time.double()[:, None], time.double()[:, None]
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        return self.mean + gain * (sample.double() - alpha * self.mean) + 0 * self.unused


@numeric
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_on_a_gaussian_the_gradient_is_that_of_the_divergence(tau):
    """Expectations by Gauss-Hermite quadrature, exact for these polynomials of degree two."""
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(6))
    u, e = (
        each.flatten()[:, None].expand(-1, 2)
        for each in torch.meshgrid(nodes, nodes, indexing="ij")
    )
    share = (weights[:, None] * weights).flatten() / weights.sum() ** 2
    mdp, _ = world()
    mean, std = GAUSSIAN
    alpha, sigma = 1 - tau, tau
    for shift, factor in ((0.0, 1.0), (0.4, 1.3)):
        m, s = mean + shift, std * factor
        agent = DMD(mdp, Denoiser(Posterior(mean, std), mdp.process, "sample"), **FEW)
        agent.fake = Denoiser(Posterior(m, s), mdp.process, "sample")
        x = m + s * u
        noising = Noising(torch.full((36,), tau, dtype=torch.float64), e)
        g = agent.direction(x, noising, None)
        noisy = alpha * x + sigma * e
        real = agent.teacher.denoised(noisy, noising.times)
        # Without its weight, and as a difference of scores.
        g = g * ((x - real).abs().mean(1, keepdim=True) + 1e-6) * alpha**2 / sigma**2
        by_mean, by_std = (share[:, None] * g).sum(0), (share[:, None] * g * u).sum(0)
        # Of KL(N(alpha m, V) || N(alpha mean, V_real)).
        of_fake, of_real = ((alpha * each) ** 2 + sigma**2 for each in (s, std))
        want_mean = alpha**2 * (m - mean) / of_real
        want_std = alpha**2 * s * (1 / of_real - 1 / of_fake)
        torch.testing.assert_close(by_mean, want_mean.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(by_std, want_std.detach(), rtol=1e-9, atol=1e-12)
        if factor == 1.0:
            assert g.abs().max() == 0


# -- what is returned ------------------------------------------------------------------------------


class Learner(nn.Module):
    """The exact network of a Gaussian at first, that can become another."""

    def __init__(self):
        super().__init__()
        self.exact, self.learned = Posterior(*GAUSSIAN), Smooth()
        nn.init.zeros_(self.learned.last)

    def forward(self, sample, time):
        return self.exact(sample, time) + self.learned(sample, time)


@pytest.mark.slow
def test_dmd_comes_closer_to_the_fine_solver_s_distribution_and_says_so():
    """A mean of clean samples is no sample: given, the sampler's spread is far too small."""
    mdp, _ = world(steps=2)
    settings = {"learning_rate": 3e-3, "fake_learning_rate": 1e-2, "ema": 0.0, "size": 200}
    more = {"rounds": 300, "batch_size": 256, "scale": 8, "n_fake": 5, "lr_schedule": "constant"}
    changes = {**FEW, **settings, **more, "max_grad_norm": None}
    agent = DMD(mdp, Denoiser(Learner(), mdp.process, "sample"), **changes)
    before = weights_of(agent.teacher)
    agent.learn()
    errors = agent.errors
    assert errors["returned"] < errors["given"] / 2 and abs(errors["teacher"]) < 0.02
    assert agent.returned == "distilled" and "Energy distance" in agent.verdict
    assert torch.equal(weights_of(agent.teacher), before)


def test_what_is_reported_is_the_energy_distance_of_the_sampler_s_samples():
    agent = make(seed=3)
    agent.learn()
    noise, goal = agent._held_out.reported.states
    ends = agent.tableau.sample(
        agent.sampling_denoiser, noise, generator=torch.Generator().manual_seed(4)
    )
    assert float(EnergyDistance(goal).shares(ends).mean()) == agent.errors["returned"]


def test_what_makes_it_worse_is_not_returned():
    agent = make(learning_rate=1.0, fake_learning_rate=1e-5, looks=1, rounds=8, size=100)
    before = weights_of(agent.teacher)
    agent.learn()
    assert agent.returned == "given" and agent.errors["distilled"] > agent.errors["given"]
    assert torch.equal(weights_of(agent.sampling_denoiser), before)


def test_with_a_critic_real_samples_judge():
    agent = make(conditional=True, adversarial=0.1)
    learn_rounds(agent, 1)
    held_out = agent._held_out.reported
    data, labels = agent.mdp.target.samples, agent.mdp.target.labels
    for sample, label in zip(held_out.states[1], held_out.condition, strict=True):
        assert ((data == sample).all(1) & (labels == label)).any()
    assert not torch.equal(held_out.states[0], held_out.states[1])


# -- what all promise ------------------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_a_killed_training_goes_on_bit_for_bit(adversarial, tmp_path):
    terms = {"conditional": True, "guidance": 2.0, "adversarial": adversarial}
    whole = make(**terms)
    whole.learn()
    first = make(**terms)
    learn_rounds(first, 2)
    first.save(tmp_path / "agent")
    resumed = make(**terms)
    resumed.resume(tmp_path / "agent")
    loaded = DMD.load(tmp_path / "agent", resumed.mdp, body=Smooth(3))
    for agent in (resumed, loaded):
        agent.learn(reset_num_timesteps=False)
        for name in ("sampling_denoiser", "denoiser", "fake"):
            theirs, ours = (weights_of(getattr(each, name)) for each in (whole, agent))
            assert torch.equal(theirs, ours)
        assert (agent.errors, agent.returned) == (whole.errors, whole.returned)
        assert agent.num_timesteps == whole.num_timesteps
    if adversarial:
        from fewstep.agents import CheckpointError

        with pytest.raises(CheckpointError, match="trained with adversarial"):
            make(**{**terms, "adversarial": 0.0}).resume(tmp_path / "agent")
        with pytest.raises(CheckpointError, match=r"^Of the training of .*agent and this one"):
            DMD.load(tmp_path / "agent", resumed.mdp, body=Smooth(3), adversarial=0.0)


def test_guidance_is_the_teacher_s_alone():
    agent = make(conditional=True, guidance=3.0)
    guided = make(conditional=True, guidance=3.0, absorb_guidance=False)
    assert (agent.nfe, guided.nfe) == (4, 8)
    assert agent.teacher.conditioning.guidance == guided.denoiser.conditioning.guidance == 3
    assert agent.fake.conditioning.guidance == guided.fake.conditioning.guidance == 1
    assert make(conditional=True).nfe == make().nfe == 4


@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_any_sampler_without_memory_is_a_student(solver):
    agent = make(solver=solver)
    agent.learn()
    assert agent.done and math.isfinite(agent.errors["returned"])


def test_bad_input():
    mdp, denoiser = world()
    with pytest.raises(ValueError, match=r"needs a sampler whose steps ask.*; not 'ipndm"):
        DMD(mdp, denoiser, solver="ipndm")
    with pytest.raises(ValueError, match=r"needs a sampler whose steps ask.*; not 'ddim"):
        DMD(*world(start=0.9), solver="ddim", solver_options={"afs": True})
    with pytest.raises(ValueError, match="there are none here: take adversarial=0"):
        DMD.without_data(denoiser, mdp.schedule, (2,), adversarial=0.1)
    with pytest.raises(ValueError, match="baseline regularizer needs"):
        DMD(mdp, denoiser, adversarial=0.1, critic_regularizer="baseline")


def test_no_network_is_asked_about_nothing():
    """Of few samples none may go as far as the last steps."""
    agent = make(batch_size=1, rounds=6)
    asked = []
    for network in (agent.denoiser, agent.fake, agent.teacher):
        network.body.register_forward_pre_hook(lambda _body, given: asked.append(len(given[0])))
    learn_rounds(agent, 5)
    assert min(asked) > 0
