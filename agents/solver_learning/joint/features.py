"""A feature extractor that a loss can be differentiated through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....common.arguments import given
from ....common.shapes import is_image
from ....critics.metrics.features import NetworkFeatures, check_takes

# Samples as far away come of a table that diverges; their cubes still fit into float32.
_RAN_AWAY = 1e12

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
        TypeError: it returns no tensor.
        ValueError: it does not take samples of this shape, returns no features (N, d) or ones that
            are not finite, or has no gradient.
    """

    def __init__(
        self, extractor: Extractor, shape: Sequence[int], device: torch.device | str
    ) -> None:
        self._extractor = extractor
        self.name = getattr(extractor, "name", type(extractor).__name__)
        if isinstance(extractor, NetworkFeatures):
            extractor.to(device)
        probe = torch.linspace(-0.5, 0.5, 2 * torch.Size(shape).numel(), device=device)
        probe = probe.view(2, *shape).requires_grad_()
        check_takes(extractor, shape)
        try:
            with torch.enable_grad():
                found = self._asked(probe)
        except Exception as error:
            # Whatever it is that an extractor of one's own raises, it is about these samples.
            kind, reason = type(error).__name__, str(error).partition("\n")[0]
            raise ValueError(
                f"The features {self.name!r} do not take samples of shape {tuple(shape)}: {kind}: "
                f"{reason}"
            ) from error
        if not isinstance(found, Tensor):
            raise TypeError(
                f"The features {self.name!r} must be a tensor (N, d) for N samples, got "
                f"{given(found)}."
            )
        if found.ndim != 2 or len(found) != 2:
            raise ValueError(
                f"The features {self.name!r} must be (N, d) for N samples; of 2 they are "
                f"{tuple(found.shape)}."
            )
        if not found.requires_grad:
            raise ValueError(
                f"The features {self.name!r} have no gradient by the samples; a loss needs one, "
                "such as `ClassifierFeatures` have."
            )
        self._check_finite(found, probe)
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
        """Return features (N, d).

        Raises:
            ValueError: they are not finite, and the samples are.
        """
        found = self._asked(samples)
        self._check_finite(found, samples)
        return found

    def _check_finite(self, found: Tensor, samples: Tensor) -> None:
        # What is said of samples that ran away is not the features' fault.
        if not found.isfinite().all() and samples.abs().max() < _RAN_AWAY:
            raise ValueError(
                f"The features {self.name!r} hold NaN or infinity for samples that are finite: a "
                "loss needs finite ones."
            )

    def _asked(self, samples: Tensor) -> Tensor:
        if isinstance(self._extractor, NetworkFeatures):
            # As the extractor itself does, without stopping the gradient.
            return self._extractor.features(samples.float().clamp(-1, 1))
        return self._extractor(samples)
