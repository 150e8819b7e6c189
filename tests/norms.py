"""Comparing what arithmetic of another order gives: single entries may cancel, norms do not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def assert_close_by_norm(
    found: Iterable[Tensor], expected: Iterable[Tensor], rtol: float = 1e-5
) -> None:
    """Each tensor is as another, to a part of the norm of all of them."""
    pairs = list(zip(found, expected, strict=True))
    whole = torch.stack([other.norm() for _, other in pairs]).norm()
    assert float(whole) > 0, "nothing is compared"
    for index, (one, other) in enumerate(pairs):
        miss = float((one - other).norm() / whole)
        assert miss <= rtol, f"tensor {index} is off by {miss:.1e} of the norm of all"
