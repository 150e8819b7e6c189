"""The families of pipelines: a new one is a file beside this one, and a line here."""

from .base import Family, LatentFamily, Rows
from .classes import DiT, Pixels
from .flux import Flux
from .pixart import PixArt
from .sd3 import StableDiffusion3
from .sdxl import SDXL
from .stable_diffusion import StableDiffusion

_FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    SDXL,
    StableDiffusion3,
    Flux,
    PixArt,
    DiT,
    Pixels,
)
FAMILIES: dict[str, type[Family]] = {
    pipeline: family for family in _FAMILIES for pipeline in family.pipelines
}

__all__ = ["FAMILIES", "Family", "LatentFamily", "Rows"]
