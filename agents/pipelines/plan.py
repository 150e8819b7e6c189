"""How many network calls a distillation takes, counted before the network is asked.

The same agents learn from a formula in place of the network, on samples of few numbers: how often
they ask does not depend on the answers. One timed call then says how long it will take.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoisers.denoiser import Denoiser
from .body import PipelineBody
from .families import Family, Rows

# More numbers a sample than this change no count: what looks at their size asks for fewer samples
# of large ones, and has come to the fewest.
_NUMBERS = 1000
# Evaluations that the timed calls are repeated for.
_REPEATS = 3


@dataclass(frozen=True)
class Plan:
    """Evaluations of the network for single samples.

    Attributes:
        plain: without a gradient.
        graph: with one: asked twice, and its gradient once.
    """

    plain: int
    graph: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.plain + self.graph

    def seconds(self, plain: float, graph: float) -> float:
        """Return how long it will take, from the seconds of one evaluation of each kind."""
        return self.plain * plain + self.graph * graph


class _Formula(PipelineBody):
    """A body that answers by a formula, smooth in its time."""

    def __init__(self, family: Family, rows: Rows | None) -> None:
        super().__init__(family, rows, micro_batch=2**30)
        self.place = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        few = min(torch.Size(family.shape).numel(), _NUMBERS)
        self.config = {"shape": [few]}

    def _ask(self, sample: Tensor, time: Tensor, prompts: Tensor | None) -> Tensor:
        wave = (time.to(sample) * 1e-3).sin().view(-1, *[1] * (sample.ndim - 1))
        return sample * (0.5 + 0.1 * wave)


def counted(denoiser: Denoiser, work: Callable[[Denoiser], object]) -> Plan:
    """Count the evaluations of the network that a piece of work takes.

    Args:
        denoiser: of a pipeline; its network is not asked.
        work: is given a denoiser that stands for it, on the CPU.
    """
    body = denoiser.body
    assert isinstance(body, PipelineBody)
    stand_in = denoiser.view()
    stand_in.body = _Formula(body.family, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a formula learns
        work(stand_in)
    return Plan(*stand_in.body.calls)


def timed(denoiser: Denoiser, with_graph: bool) -> tuple[float, float]:
    """Measure one evaluation of the network, of full calls; with a gradient if that will be due.

    Args:
        denoiser: one under its prompts.
        with_graph: whether there will be gradients.

    Returns:
        Seconds of an evaluation without a gradient, and with one (0 if there will be none).
    """
    body = denoiser.body
    assert isinstance(body, PipelineBody)
    device = body.place.device
    time_of = denoiser.process.t_max / 2
    # Two calls, so that what is repeated under a gradient is measured as well.
    sample = torch.randn(2 * body.micro_batch, *body.family.shape, device=device)
    before = list(body.calls)

    def seconds(ask: Callable[[], object], kind: int) -> float:
        ask()  # the first call plans and allocates
        _wait(device)
        began, asked = time.perf_counter(), body.calls[kind]
        for _ in range(_REPEATS):
            ask()
        _wait(device)
        return (time.perf_counter() - began) / (body.calls[kind] - asked)

    def plain() -> None:
        with torch.no_grad():
            denoiser(sample, time_of)

    def graph() -> None:
        asked = sample.clone().requires_grad_()
        with torch.enable_grad():
            denoiser(asked, time_of).sum().backward()

    try:
        return seconds(plain, 0), seconds(graph, 1) if with_graph else 0.0
    finally:
        body.calls = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
