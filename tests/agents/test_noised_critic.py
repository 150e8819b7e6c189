"""NoisedCritic: what it shows the denoiser's body, and what is trained."""

import copy
import math

import pytest
import torch
from torch import nn

from fewstep.agents import SFT, Denoiser
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.denoisers.networks import MLP, ResidualMLP, SmallUNet
from fewstep.agents.policy_gradient.noised_critic import NoisedCritic
from fewstep.critics import IPMCritic
from fewstep.envs import make_mdp
from fewstep.envs.processes import make_process

SHAPE = (1, 8, 8)
SETTINGS = {
    "critic_network": "denoiser",
    "objective": "logistic",
    "regularizer": "none",
    "gradient_steps": 2,
    "batch_size": 8,
    "n_critic": 1,
    "critic_passes": 2,
    "solver_options": {"last_std": 0.05},
}


class Mirror(nn.Module):
    """A body whose representation is what it was asked, and the time beside it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.asked = []

    def forward(self, sample, time):
        return self.weight * sample

    def representation(self, sample, time):
        self.asked.append((sample.detach(), time.detach()))
        return self.weight * sample


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("linear-1000", (0.05, 1.5)),
        ("linear-1000/10", (0.1, 8.0)),
        ("flow", (0.2, 3.0)),
        ("ve", (0.5, 2.0)),
    ],
)
def test_samples_are_noised_to_levels_between_the_two(name, levels):
    process, n = make_process(name), 4000
    critic = NoisedCritic(Denoiser(Mirror(), process, "sample"), SHAPE, levels)
    body = critic.denoiser.body
    body.asked.clear()
    x = torch.linspace(-1, 1, n).view(n, 1, 1, 1).expand(n, *SHAPE)
    critic(x)
    ((noised, asked),) = body.asked
    t = process.time_of_network(asked.double())
    alpha, sigma = process.alpha(t).float(), process.sigma(t).float()
    ratio = sigma / alpha
    assert levels[0] * (1 - 1e-5) <= float(ratio.min()) and float(ratio.max()) <= levels[1] * (
        1 + 1e-5
    )
    noise = (noised - alpha.view(-1, 1, 1, 1) * x) / sigma.view(-1, 1, 1, 1)
    # 256,000 normal numbers: the mean to five, the variance to five standard errors.
    assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / noise.numel())
    # Uniform in time: the mean is in the middle, to five standard errors.
    middle, width = (critic.low + critic.high) / 2, critic.high - critic.low
    width += float(process.discrete)
    assert abs(float(t.mean()) - middle) < 5 * width / math.sqrt(12 * n)
    critic(x)
    assert not torch.equal(body.asked[1][0], noised)
    if process.discrete:
        kinds = torch.arange(critic.low, critic.high + 1, dtype=torch.float64)
        assert set(t.unique().tolist()) == set(kinds.tolist())


@pytest.mark.parametrize(
    "body", [SmallUNet(SHAPE, 8), ResidualMLP(SHAPE, 16, 1)], ids=["small-unet", "residual-mlp"]
)
def test_it_learns_on_a_copy_and_its_gradient_reaches_the_samples(body, generator):
    denoiser = Denoiser(body, make_process("linear-1000"), "sample")
    before = copy.deepcopy(denoiser.state_dict())
    network = NoisedCritic(denoiser, SHAPE, (0.05, 0.5))
    critic = IPMCritic(network, "none", objective="logistic", learning_rate=1e-3)
    real = torch.randn(64, *SHAPE, generator=generator()).sign()
    fake = 0.2 * torch.randn(64, *SHAPE, generator=generator(1))
    assert (critic(real) == 0).all()  # it begins without an opinion
    for _ in range(100):
        metrics = critic.update(real, fake)
    assert metrics["critic_loss"] < 0.5 < 2 * math.log(2)
    assert critic(real).mean() > 1 > -1 > critic(fake).mean()
    fake.requires_grad_()
    (gradient,) = torch.autograd.grad(critic(fake).sum(), fake)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    after = denoiser.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    encoder = [n for n, p in network.denoiser.named_parameters() if p.grad is not None]
    assert len(encoder) > 4


@pytest.mark.parametrize("conditional", [False, True])
def test_a_run_resumes_with_the_critics_next_draw(conditional, tmp_path):
    mdp = make_mdp("Digits", steps=4, conditional=conditional)

    def agent():
        return SFT(mdp, new_denoiser(mdp), **SETTINGS)

    first, second = agent(), agent()
    assert first.critic.conditional == conditional
    first.train_round()
    first.save(tmp_path / "agent.safetensors")
    second.resume(tmp_path / "agent.safetensors")
    ours, theirs = first.train_round(), second.train_round()
    assert {k: float(v) for k, v in ours.items()} == {k: float(v) for k, v in theirs.items()}


def test_a_conditional_critic_asks_its_body_under_the_condition():
    mdp = make_mdp("Digits", steps=4, conditional=True)
    agent = SFT(mdp, new_denoiser(mdp), **SETTINGS)
    for _ in range(4):  # the network's modulations start at 0
        agent.train_round()
    network, x = agent.critic.network, torch.zeros(1, *mdp.shape)
    values = []
    for label in (0, 0, 7):
        network.set_extra_state(torch.tensor([1, 0]))  # the same noise
        values.append(float(network(x, torch.tensor([label])).detach()))
    assert values[0] == values[1] != values[2]
    with pytest.raises(ValueError, match="give the conditions"):
        agent.critic(x)


def test_diffusers_unets_have_a_representation(generator):
    pytest.importorskip("diffusers")
    from fewstep.agents.denoisers.networks.unet import UNet2D

    body = UNet2D(SHAPE, "tiny").eval()
    sample, time = torch.randn(3, *SHAPE, generator=generator()), torch.tensor([5, 500, 900])
    maps = []
    hook = body.unet.up_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: maps.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    found = body.representation(sample, time)
    hook.remove()
    assert torch.equal(found, maps[0])  # what the decoder is given


def test_what_cannot_be_a_critic_is_refused():
    process = make_process("linear-1000")
    with pytest.raises(ValueError, match="MLP has no `representation`"):
        NoisedCritic(Denoiser(MLP((2,), 1000), process), (2,))
    body = SmallUNet(SHAPE, 8)
    with pytest.raises(ValueError, match=r"no noise level from 0.5 to 0.6 sigma / alpha"):
        NoisedCritic(Denoiser(body, make_process("linear-1000/10"), "sample"), SHAPE, (0.5, 0.6))
    mdp = make_mdp("Digits", steps=4)
    for levels in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="critic levels must be two noise levels"):
            SFT(mdp, new_denoiser(mdp), **SETTINGS, levels=levels)
    with pytest.raises(ValueError, match="unknown network 'denoisr'"):
        SFT(mdp, new_denoiser(mdp), **{**SETTINGS, "critic_network": "denoisr"})
