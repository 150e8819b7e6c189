"""`MLP`: the network of SFT-PG's toys, for vectors (Fan & Lee 2023, appendix F.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....common.arguments import at_least, checked
from ....common.precision import in_full_precision
from ....common.shapes import check_shape
from .times import check_range, shared, stretched


class MLP(nn.Module):
    """Softplus layers, each multiplied by a learned embedding of the step (Fan & Lee 2023).

    Args:
        shape: shape of one sample; it is flattened.
        levels: number of network times, 0 .. levels - 1. A fractional time interpolates linearly
            between the embeddings of its neighbours.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
        input_gain: the first layer starts this many times as steep as usual. A vector of unit size
            fed to a default layer gives a network that learns only smooth functions and blurs a
            thin manifold; 20 makes the swiss roll sharp. 1 is the usual initialisation.
        time_range: (low, high) of continuous network times; they are mapped linearly onto 0 ..
            levels - 1 (clamped there) and interpolate. None takes times as levels.

    Raises:
        ValueError: an empty shape, a number below 1, or a `time_range` that is not finite and
            increasing.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        levels: int,
        hidden: int = 128,
        layers: int = 3,
        input_gain: float = 20.0,
        time_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_shape(shape)
        at_least(1, levels=levels, hidden=hidden, layers=layers)
        self.config = {
            "kind": "mlp",
            "shape": list(shape),
            "levels": levels,
            "hidden": hidden,
            "layers": layers,
            "input_gain": input_gain,
            "time_range": check_range(time_range),
        }
        self.levels = levels
        self.time_range = check_range(time_range)
        dimension = math.prod(shape)
        widths = [dimension, *[hidden] * layers]
        linears = [nn.Linear(i, o) for i, o in pairwise(widths)]
        embeddings = [nn.Embedding(levels, hidden) for _ in range(layers)]
        for embedding in embeddings:
            nn.init.uniform_(embedding.weight, 0.75, 1.25)
        with torch.no_grad():
            # Biases grow less, which keeps the bends of the units inside the data's range.
            linears[0].weight.mul_(input_gain)
            linears[0].bias.mul_(max(0.6 * input_gain, 1.0))
        self.hidden, self.embeddings = nn.ModuleList(linears), nn.ModuleList(embeddings)
        self.out = nn.Linear(hidden, dimension)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the prediction, shaped like `sample` (N, *shape), at network times (N,)."""
        time = shared(time)
        if self.time_range is not None:
            time = stretched(time.to(sample.dtype), self.time_range, self.levels - 1)
        h = sample.flatten(1)
        for linear, embedding in zip(self.hidden, self.embeddings, strict=True):
            factor = self._embed(embedding, time)
            if len(factor) == 1:
                # One time for all: scaling the weights is cheaper than scaling N activations.
                weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
                h = softplus(F.linear(h, weight * factor.T, bias * factor[0]))
            else:
                h = softplus(linear(h) * factor)
        return in_full_precision(self.out, h).view_as(sample)

    def _embed(self, embedding: nn.Module, time: Tensor) -> Tensor:
        if not time.is_floating_point():
            # As below: a time before the first noising, rounded to -1, is asked as the first.
            return embedding(time.clamp_min(0))
        time = time.clamp(0, self.levels - 1)
        lower = time.floor()
        upper = (lower + 1).clamp(max=self.levels - 1)
        return torch.lerp(
            embedding(lower.long()), embedding(upper.long()), (time - lower).unsqueeze(-1)
        )


class _Softplus(torch.autograd.Function):
    """See `softplus`; composed of PyTorch's functions, its gradient would cost as much again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().neg_().exp_().add_(1).log_().add_(x.clamp_min(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.sigmoid()


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x), shaped like x; on a CPU as max(x, 0) + log(1 + e^-|x|).

    PyTorch's own asks for log1p there, which takes nine tenths of its time and a third of the whole
    network's. In absolute terms this is as accurate, in relative ones not where the result is below
    1e-3; a linear layer follows, to which only the absolute error matters. Half precision has too
    few digits for it.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.softplus(x)
    return _Softplus.apply(x)
