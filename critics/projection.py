"""What a condition adds to a critic or a baseline, by projection (Miyato & Koyama 2018).

It is the product of the condition's embedding with the features of the sample, and starts at 0,
where the network is unconditional.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..common.conditions import Classes, Conditions


class ClassProjection(nn.Embedding):
    """The projection of classes: a table of their embeddings."""

    def reset_parameters(self) -> None:
        """Start at 0."""
        nn.init.zeros_(self.weight)

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:  # type: ignore[override]
        """Return (..., N) for features (..., N, width) under classes (N,).

        Raises:
            ValueError: no classes.
        """
        return (features * super().forward(_given(condition))).sum(-1)


class Projection(nn.Module):
    """The projection of other conditions, by a network of its own.

    Args:
        conditions: which there are.
        width: of the features.
    """

    def __init__(self, conditions: Conditions, width: int) -> None:
        super().__init__()
        self.embedder = conditions.embedder(width)
        last = [layer for layer in self.embedder.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:
        """Return (..., N) for features (..., N, width) under conditions (N, ...).

        Raises:
            ValueError: no conditions.
        """
        return (features * self.embedder(_given(condition))).sum(-1)


def projection(conditions: Conditions | None, width: int) -> ClassProjection | Projection | None:
    """Return a new projection for features of this width; None without conditions."""
    if conditions is None:
        return None
    if isinstance(conditions, Classes):
        return ClassProjection(conditions.count, width)
    return Projection(conditions, width)


def is_conditional(network: object) -> bool:
    """Tell whether a critic or a baseline takes conditions: it says `conditions` or `classes`."""
    said = (getattr(network, name, None) for name in ("conditions", "classes"))
    return any(each is not None for each in said)


def _given(condition: Tensor | None) -> Tensor:
    if condition is None:
        raise ValueError(
            "This network is conditional: give the conditions (N, ...) of the samples."
        )
    return condition
