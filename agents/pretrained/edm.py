"""EDM's networks as denoisers: those that come with their preconditioning inside.

A network without it is a body with prediction "edm".
"""

from __future__ import annotations

from torch import Tensor, nn

from ...common.arguments import checked
from ...envs.processes import VE
from ..denoisers.denoiser import Denoiser


@checked
def from_edm(module: nn.Module, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Denoiser:
    """Make a denoiser of a network that is preconditioned already, as NVlabs' EDMPrecond is.

    It is sampled, distilled and fine-tuned like any other. Only a `UNet2D` can be exported to
    diffusers; one of those with EDM's preconditioning is `Denoiser(unet, VE(), "edm")`.

    Args:
        module: `module(x, sigma)` with x (N, *shape) and noise levels sigma (N,), returning the
            clean sample D(x; sigma) (N, *shape).
        sigma_min: least noise level, > 0.
        sigma_max: noise level that sampling starts from.

    Returns:
        A denoiser on `VE(sigma_min, sigma_max)` with prediction "sample".

    Raises:
        ValueError: not 0 < sigma_min < sigma_max < inf.
    """
    return Denoiser(EDMBody(module), VE(sigma_min, sigma_max), "sample")


class EDMBody(nn.Module):
    """A preconditioned network D(x; sigma) as a body; its times are noise levels.

    `Denoiser.load(path, body=EDMBody(module))` reads what a denoiser of `from_edm` saved.

    Args:
        module: see `from_edm`.

    Raises:
        TypeError: no module.
    """

    @checked
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the clean sample (N, *shape) behind samples (N, *shape) at noise levels (N,)."""
        return self.module(sample, time)
