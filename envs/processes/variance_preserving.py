"""What variance-preserving processes share: sigma and the log-SNR follow from log alpha."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import NoiseProcess


class VariancePreserving(NoiseProcess):
    """A process with `alpha^2 + sigma^2 = 1`: a subclass says what `log alpha` is."""

    variance_preserving = True

    @abstractmethod
    def _log_alpha(self, t: float | Tensor) -> Tensor:
        """`log alpha(t)`, float64, shaped as `t`; `ValueError` outside `[0, t_max]`."""

    def alpha(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.alpha`."""
        return self._log_alpha(t).exp()

    def sigma(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.sigma`."""
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def log_snr(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.log_snr`."""
        log_alpha = self._log_alpha(t)
        return log_alpha - 0.5 * (-torch.expm1(2 * log_alpha)).log()
