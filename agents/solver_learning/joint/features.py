"""A feature extractor that a loss can be differentiated through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....common.shapes import is_image
from ....critics.metrics.features import NetworkFeatures

Extractor = Callable[[Tensor], Tensor]


def features_of(
    extractor: Extractor | None, shape: Sequence[int], device: torch.device | str
) -> SampleFeatures | None:
    """Return the features that samples are compared in; None of images, which get some later.

    Raises:
        ValueError: there are none for samples of this shape, or what `SampleFeatures` raises.
    """
    if extractor is not None:
        return SampleFeatures(extractor, shape, device)
    if not is_image(shape):
        raise ValueError(
            f"loss.compared='features' needs features=, since there are none of our own for "
            f"samples of shape {tuple(shape)}: only for images."
        )
    return None


class SampleFeatures:
    """Features of samples, differentiable in them.

    Args:
        extractor: samples (N, *shape) -> features (N, d); of `NetworkFeatures`, which take images
            and record no gradient, the network itself is asked.
        shape: of one sample.
        device: where the samples are.

    Attributes:
        name: of the extractor.
        probed: (2, d) on the CPU, the features of two samples that are always the same.

    Raises:
        ValueError: it does not take samples of this shape, returns no features (N, d), or has no
            gradient.
    """

    def __init__(
        self, extractor: Extractor, shape: Sequence[int], device: torch.device | str
    ) -> None:
        self._extractor = extractor
        if isinstance(extractor, NetworkFeatures):
            extractor.to(device)
        name = self.name = getattr(extractor, "name", type(extractor).__name__)
        probe = torch.linspace(-0.5, 0.5, 2 * torch.Size(shape).numel(), device=device)
        probe = probe.view(2, *shape).requires_grad_()
        wanted = getattr(extractor, "shape", None)
        if wanted is not None and tuple(wanted) != tuple(shape):
            raise ValueError(
                f"The features {name!r} are of samples of shape {tuple(wanted)}, these have "
                f"{tuple(shape)}."
            )
        try:
            with torch.enable_grad():
                found = self(probe)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"The features {name!r} do not take samples of shape {tuple(shape)}: {reason}"
            ) from None
        if found.ndim != 2 or len(found) != 2:
            raise ValueError(
                f"The features {name!r} must be (N, d) for N samples; of 2 they are "
                f"{tuple(found.shape)}."
            )
        if not found.requires_grad:
            raise ValueError(
                f"The features {name!r} have no gradient by the samples; a loss needs one, such as "
                "`ClassifierFeatures` have."
            )
        self.probed = found.detach().cpu()

    def are(self, probed: Tensor) -> bool:
        """Tell whether features of the same two samples are these, as far as devices agree."""
        return probed.shape == self.probed.shape and torch.allclose(
            probed.double(),
            self.probed.double(),
            rtol=1e-2,
            atol=1e-3 * float(self.probed.abs().max()),
        )

    def __call__(self, samples: Tensor) -> Tensor:
        """Return features (N, d)."""
        if isinstance(self._extractor, NetworkFeatures):
            # As the extractor itself does, without stopping the gradient.
            return self._extractor.features(samples.float().clamp(-1, 1))
        return self._extractor(samples)
