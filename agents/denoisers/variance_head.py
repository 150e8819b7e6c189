"""VarianceHead: a second head on a frozen network, for the variance that each pixel still has.

Bao et al. 2022, "Estimating the optimal covariance"; MATH.md 1.12. From the features that the
network's last layer reads, the head predicts for every pixel

    h(x_t) ~ E[eps^2 | x_t]                        ("sn", of SN-DDPM), or
    g(x_t) ~ E[(eps - epsilon_theta)^2 | x_t]      ("npr", of NPR-DDPM),

from which follows the variance of the clean sample given x_t, Cov0 = (sigma / alpha)^2 (h -
epsilon^2) or (sigma / alpha)^2 g. It costs no further call of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.arguments import checked
from ...common.names import unknown_name
from ...envs.processes.base import Level

HeadKind = Literal["sn", "npr"]


class HeadInputs(NamedTuple):
    """What a second head reads.

    Attributes:
        features: what the network's last layer read, (N, F) or (N, F, H, W).
        epsilon: the noise that the network predicts, (N, *shape).
        alpha: of the samples' times, a number or (N, 1, ...).
        sigma: likewise, > 0.
    """

    features: Tensor
    epsilon: Tensor
    alpha: Level
    sigma: Level


class VarianceHead(nn.Module):
    """Two small layers on a network's last features.

    Its outputs are >= 0, and at first those that would be right for Gaussian data of standard
    deviation `data_std`: with g = alpha^2 data_std^2 / (alpha^2 data_std^2 + sigma^2), that is g
    for "npr" and epsilon^2 + g for "sn". The layers learn factors on these terms, all 1 at first.

    Args:
        kind: "sn" or "npr".
        shape: of one sample.
        features: number of features F.
        convolutional: the features are maps (N, F, H, W) as large as the images (C, H, W), read by
            3x3 convolutions; else they are (N, F).
        hidden: width of the layer between.
        data_std: standard deviation of the data, > 0.
        per_pixel: False gives every pixel of a sample the mean of its Cov0.

    Attributes:
        config: what `VarianceHead(**config)` rebuilds it from.

    Raises:
        ValueError: unknown kind, or a `data_std` that is not positive and finite.
    """

    @checked
    def __init__(
        self,
        kind: str,
        shape: Sequence[int],
        features: int,
        convolutional: bool,
        hidden: int = 128,
        data_std: float = 0.5,
        per_pixel: bool = True,
    ) -> None:
        super().__init__()
        if kind not in get_args(HeadKind):
            raise unknown_name("kind of variance head", kind, get_args(HeadKind))
        if not 0 < data_std < math.inf:
            raise ValueError(f"data_std must be positive and finite, got {data_std}.")
        self.config: dict[str, Any] = {
            "kind": kind,
            "shape": list(shape),
            "features": features,
            "convolutional": convolutional,
            "hidden": hidden,
            "data_std": float(data_std),
            "per_pixel": per_pixel,
        }
        self.kind, self.per_pixel = kind, per_pixel
        self.shape, self.data_std = tuple(shape), float(data_std)
        # "sn": a factor on epsilon^2, and one on g.
        self.terms = 2 if kind == "sn" else 1
        read = features + _TIME_FEATURES
        layers: list[nn.Module] = (
            [
                nn.Conv2d(read, hidden, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(hidden, self.terms * shape[0], 3, padding=1),
            ]
            if convolutional
            else [
                nn.Linear(read, hidden),
                nn.SiLU(),
                nn.Linear(hidden, self.terms * math.prod(shape)),
            ]
        )
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers)

    @classmethod
    def on_features(
        cls, kind: str, features: Tensor, shape: Sequence[int], **options: Any
    ) -> VarianceHead:
        """Make a head for features like these (N, F) or (N, F, H, W), those of samples (N, *shape).

        Raises:
            ValueError: features of another form.
        """
        convolutional = features.ndim == 4
        fits = features.shape[2:] == torch.Size(shape[1:]) if convolutional else features.ndim == 2
        if not fits:
            raise ValueError(
                f"A variance head reads features (N, F), or (N, F, H, W) of the images' size; the "
                f"last layer reads {tuple(features.shape)} for samples of {tuple(shape)}."
            )
        return cls(kind, shape, features.shape[1], convolutional, **options)

    def forward(self, features: Tensor, epsilon: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return h or g, (N, *shape) >= 0; see `HeadInputs` for the arguments."""
        excess = self._excess(features, epsilon, alpha, sigma)
        return excess if self.kind == "npr" else epsilon.square() + excess

    def covariance(self, features: Tensor, epsilon: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return Cov0 in [0, 1], for data in [-1, 1]: (N, *shape), or (N, 1, ...) if averaged.

        See `HeadInputs` for the arguments.
        """
        excess = self._excess(features, epsilon, alpha, sigma)
        covariance = ((sigma / alpha) ** 2 * excess).clamp(0, 1)
        if self.per_pixel:
            return covariance
        return covariance.mean(tuple(range(1, covariance.ndim)), keepdim=True)

    def _excess(self, features: Tensor, epsilon: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return h - epsilon^2 or g, (N, *shape).

        The difference is not taken: where (sigma / alpha)^2 is large it would be all rounding.
        """
        read = torch.cat([features, _time_features(features, alpha, sigma)], dim=1)
        dtype = next(self.parameters()).dtype
        written = self.layers(read.to(dtype)).to(epsilon.dtype)
        # The factors less one: above -1, and 0 at first.
        changes = F.elu(written).view(len(epsilon), self.terms, *self.shape)
        signal = (alpha * self.data_std) ** 2
        gaussian = signal / (signal + sigma**2) * (1 + changes[:, -1])
        return gaussian if self.kind == "npr" else changes[:, 0] * epsilon.square() + gaussian


_TIME_FEATURES = 3


def _time_features(features: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """Return (N, 3, ...) numbers of unit size that tell the noise level, beside the features."""
    ones = [1] * (features.ndim - 1)

    def column(level: Level) -> Tensor:
        if isinstance(level, Tensor):
            return level.to(features).reshape(-1, *ones)
        return features.new_full((1, *ones), level)

    signal, noise = column(alpha), column(sigma)
    size = torch.hypot(signal, noise)
    numbers = torch.cat([signal / size, noise / size, (signal / noise).log() / 5], dim=1)
    return numbers.expand(len(features), -1, *features.shape[2:])
