"""One call of a network: in how many pieces it is asked, and what one of whole times refuses."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

# Numbers in the samples that a network on a CPU is asked about at once. Layers of more than some
# ten megabytes fit no cache, and the C library asks the system for each of them anew.
AT_ONCE = 2**17


def ask(body: nn.Module, sample: Tensor, time: Tensor, *condition: Tensor) -> Tensor:
    """Return a network's raw answer, in pieces where that is faster: on a CPU, without a graph.

    Args:
        body: the network.
        sample: what it reads (N, *shape).
        time: its own times (N,).
        condition: the conditions (N, ...), if it takes any.
    """
    whole = sample.device.type != "cpu" or torch.is_grad_enabled() or sample.numel() <= AT_ONCE
    # A compiled network would be compiled anew for the last piece.
    if whole or getattr(body, "_compiled_call_impl", None) is not None:
        return body(sample, time, *condition)
    size = max(1, AT_ONCE // sample[0].numel())
    pieces = (each.split(size) for each in (sample, time, *condition))
    return torch.cat([body(*piece) for piece in zip(*pieces, strict=True)])


def wants_whole_times(error: Exception) -> bool:
    """Whether this is what an embedding table says of a time between two noisings."""
    return re.search(r"\blong, int", str(error), re.IGNORECASE) is not None
