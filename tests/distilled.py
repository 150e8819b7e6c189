"""A small smooth world in which networks are distilled, and how their gradients are seen."""

import torch
from rounds import learn_rounds
from torch import nn

from fewstep.agents import Denoiser
from fewstep.envs import DiffusionMDP, RectifiedFlow, Schedule, Target
from fewstep.envs.mdp import no_reward

FEW = {"batch_size": 16, "rounds": 4, "size": 16, "looks": 2, "learning_rate": 1e-3, "ema": 0.5}


class Smooth(nn.Module):
    """A small network in float64, smooth in its sample and in its time, conditional on request."""

    def __init__(self, classes=None):
        super().__init__()
        source = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return nn.Parameter(torch.randn(*shape, generator=source, dtype=torch.float64))

        self.first, self.phase, self.last = drawn(2, 8), drawn(8), drawn(8, 2)
        self.embedding = drawn(classes + 1, 8) if classes else None

    def forward(self, sample, time, label=None):
        hidden = sample.double() @ self.first / 2 + (2 * time.double()).unsqueeze(1) * self.phase
        if label is not None:
            hidden = hidden + self.embedding[label] / 2
        return torch.tanh(hidden) @ self.last / 3


def cluster(n, seed):
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([0.2, 0.3]) + torch.tensor([0.5, -0.5])


def world(process=None, steps=4, prediction="flow", conditional=False, **ends):
    """A decision process and a denoiser, both small and smooth."""
    process = process or RectifiedFlow()
    target = Target.from_sampler(cluster, "Cluster", 300)
    if conditional:
        labels = torch.arange(300) % 3
        target = Target("Cluster", cluster(300, 0), labels=labels)
    schedule = Schedule.uniform(process, steps, **ends)
    mdp = DiffusionMDP(target, process, schedule, no_reward, conditional=conditional)
    known = {"classes": 3, "drops": True} if conditional else {}
    return mdp, Denoiser(Smooth(3 if conditional else None), process, prediction, **known)


def in_float64(monkeypatch):
    """Let noise come in float64, for gradients to many digits."""
    initial = DiffusionMDP.initial
    monkeypatch.setattr(DiffusionMDP, "initial", lambda *a, **k: initial(*a, **k).double())


def gradients_of(agent, monkeypatch):
    """The gradients at each optimizer step of a round, with the weights held."""
    seen = []

    def keep(*_):
        seen.append([weight.grad.clone() for weight in agent.denoiser.parameters()])

    monkeypatch.setattr(agent.optimizer, "step", keep)
    learn_rounds(agent, 1)
    return seen


def weights_of(denoiser):
    return torch.cat([weight.detach().flatten() for weight in denoiser.parameters()])
