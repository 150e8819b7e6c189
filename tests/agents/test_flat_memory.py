"""Memory that does not grow with the calls: what graphs hold at once, counted, not timed."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from rounds import learn_rounds
from schedule_worlds import EDM, network, world

from fewstep.agents import RDPO, SFD, SolverLearning
from fewstep.envs import Schedule

FEW, MANY = 4, 16
SMALL = {"batch_size": 16, "batches": 1, "scale": 1, "check_teacher": False}


class Held:
    """Numbers that live graphs hold to differentiate through, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def add(self, count):
        self.now += count
        self.most = max(self.most, self.now)


class Packed:
    """A tensor in a graph; it is let go with the graph."""

    def __init__(self, tensor):
        self.tensor = tensor


@contextmanager
def counted():
    """Count the numbers that each graph saves, until the graph goes."""
    held = Held()

    def pack(tensor):
        packed = Packed(tensor)
        held.add(tensor.numel())
        weakref.finalize(packed, held.add, -tensor.numel())
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        yield held


def schedule(steps):
    return Schedule.karras(EDM, steps, append_zero=False)


def unrolled(steps):
    agent = SolverLearning(world(schedule(steps)), network(), solver="euler", **SMALL)
    noise = agent.make_batches()[0].noise.requires_grad_()
    with counted() as held:
        agent.base.sample(agent.denoiser, noise).sum().backward()
    return held.most


def solver_learning(steps, **settings):
    settings = {**SMALL, "start": "given", **settings}
    agent = SolverLearning(world(schedule(steps)), network(), **settings)
    with counted() as held:
        agent.slope(agent.make_batches()[:1])
    return held.most


def sfd(steps, **settings):
    few = {"batch_size": 16, "held_out_size": 4, "scale": 1, "check": False, "rounds": 1}
    agent = SFD(world(schedule(steps)), network(), **few, **settings)
    with counted() as held:
        learn_rounds(agent, 1)
    return held.most


def rdpo(steps):
    """Of the network: the distribution's own graph grows with the numbers of a table."""
    settings = {"batch_size": 16, "held_out": 4, "rounds": 1, "learn_weights": False}
    agent = RDPO(world(schedule(steps)), network(), solver="euler", **settings)
    agent._learner.update = lambda *_: {}
    with counted() as held:
        learn_rounds(agent, 1)
    return held.most


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "of",
    [
        lambda steps: solver_learning(steps, solver="euler"),
        lambda steps: solver_learning(steps, form="noise", solver="euler"),
        sfd,
        lambda steps: sfd(steps, solver="ipndm"),
        rdpo,
    ],
    ids=["solver learning", "from the noise", "SFD", "SFD of a multistep", "RDPO"],
)
def test_graphs_do_not_grow_with_the_calls(of):
    few, many = of(FEW), of(MANY)
    assert many <= 1.1 * few


def test_the_unrolled_chain_s_graph_does():
    assert unrolled(MANY) >= 0.9 * MANY / FEW * unrolled(FEW) > 0
