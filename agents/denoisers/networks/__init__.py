"""Networks that a denoiser may hold, `body(sample, time)`: small ones of ours, and diffusers'."""

from .configs import BODIES, body_from_config
from .default import make_body
from .dit import DiT
from .mlp import MLP
from .residual_mlp import ResidualMLP
from .small_unet import SmallUNet
from .unet import PRESETS, UNet2D

__all__ = [
    "BODIES",
    "MLP",
    "PRESETS",
    "DiT",
    "ResidualMLP",
    "SmallUNet",
    "UNet2D",
    "body_from_config",
    "make_body",
]
