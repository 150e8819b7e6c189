"""A network on a CPU is asked in pieces about many large samples, and answers as at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.asking import AT_ONCE
from fewstep.envs.processes import make_process

SIDE = 64
SHAPE = (1, SIDE, SIDE)
MOST = AT_ONCE // SIDE**2
MANY = 2 * MOST + 3


class Asked(nn.Module):
    """An answer that each sample's own time and condition decide, and how many were asked about."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.out = nn.Identity()

    def forward(self, x, t, condition=None):
        self.sizes.append(len(x))
        given = 0 if condition is None else condition.to(x)
        return self.out(x * (t.to(x) + 10 * given).view(-1, 1, 1, 1))


@pytest.fixture
def samples():
    return torch.randn(MANY, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def times():
    return torch.arange(1, MANY + 1)


def test_pieces_keep_times_and_conditions_in_order(samples, times):
    body = Asked()
    denoiser = Denoiser(body, make_process("linear-1000"), "sample", classes=4, drops=True)
    given = denoiser.given(torch.arange(MANY) % 4, guidance=2.0)
    whole = given(samples, times)  # under a gradient it is asked at once
    assert body.sizes == [2 * MANY]
    with torch.no_grad():
        pieces = given(samples, times)
    assert body.sizes[1:] == [MOST] * 4 + [2 * MANY - 4 * MOST]
    assert torch.equal(pieces, whole)


def test_few_samples_are_asked_about_at_once(samples):
    body = Asked()
    with torch.no_grad():
        Denoiser(body, make_process("linear-1000"))(samples[:MOST], 500)
        Denoiser(body, make_process("linear-1000"))(samples[:0], 500)
    assert body.sizes == [MOST, 0]


def test_one_time_for_all_stays_one_in_each_piece(samples):
    seen = []

    class Body(Asked):
        def forward(self, x, t, condition=None):
            seen.append(t.stride(0))
            return x

    with torch.no_grad():
        Denoiser(Body(), make_process("linear-1000"))(samples, 500)
    assert seen == [0, 0, 0]


def test_a_second_head_reads_the_features_of_all_pieces(samples, times):
    denoiser = Denoiser(Asked(), make_process("linear-1000"))
    whole = denoiser.head_inputs(samples, times)[1].features
    with torch.no_grad():
        pieces = denoiser.head_inputs(samples, times)[1].features
    assert torch.equal(pieces, whole)


def test_a_compiled_network_is_asked_at_once(samples):
    body = Asked()
    body.compile(backend="eager")
    with torch.no_grad():
        Denoiser(body, make_process("linear-1000"))(samples, 500)
    assert MANY in body.sizes
    assert MOST not in body.sizes
