"""PipelineBody: a pipeline's network as a body that `Denoiser` asks, a prompt as a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .families import Family, Rows


class PipelineBody(nn.Module):
    """A pipeline's network, `body(sample, time)` or `body(sample, time, prompts)`.

    Samples and answers are float32, the network runs in the pipeline's type. Where they are more
    than `micro_batch` it is asked about some after the others. Under a gradient each of several
    calls is repeated when its own gradient is due, so that one call's graph is alive at a time.

    The network's weights are the pipeline's. They are no parameters of this module: nothing trains
    them, moves them, or saves them with what was learned.

    Args:
        family: of the pipeline.
        rows: (P + 1, ...) what the network is told of P prompts, and last of none; None for an
            unconditional network.
        micro_batch: samples of a call, at least 1; guided, each asks two of them.

    Attributes:
        calls: how many single samples the network was asked about without a gradient, and with one.
    """

    def __init__(self, family: Family, rows: Rows | None, micro_batch: int = 8) -> None:
        super().__init__()
        self._family = family
        self.rows = rows
        self.micro_batch = micro_batch
        self.calls = [0, 0]
        self.on_call: Any = None
        # Says where samples live, and of which type they are.
        device = family.network.device
        self.place = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        self.config: dict[str, Any] = {"shape": list(family.shape)}

    @property
    def family(self) -> Family:
        """The family of the pipeline."""
        return self._family

    def forward(self, sample: Tensor, time: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Return answers (N, *shape) float32 about samples, under the prompts' rows (N,)."""
        graph = torch.is_grad_enabled() and (sample.requires_grad or time.requires_grad)
        answers = []
        for first in range(0, len(sample), self.micro_batch):
            part = slice(first, first + self.micro_batch)
            asked = sample[part], time[part], None if prompts is None else prompts[part]
            if graph and len(sample) > self.micro_batch:
                answers.append(checkpoint(self._ask, *asked, use_reentrant=False))
            else:
                answers.append(self._ask(*asked))
            self._count(len(asked[0]), graph)
        return torch.cat(answers)

    def _ask(self, sample: Tensor, time: Tensor, prompts: Tensor | None) -> Tensor:
        network = self._family.network
        rows = {}
        if prompts is not None and self.rows is not None:
            index = prompts.cpu()
            rows = {name: row[index].to(sample.device) for name, row in self.rows.items()}
        answer = self._family.ask(sample.to(network.dtype), time, rows)
        return answer.to(sample.dtype)

    def _count(self, samples: int, graph: bool) -> None:
        self.calls[graph] += samples
        if self.on_call is not None:
            self.on_call(samples, graph)
