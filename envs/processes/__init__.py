"""Noise processes, the physics of the environments: how data turn into noise."""

from ...common.arguments import checked
from ...common.names import unknown_name
from .base import NoiseProcess
from .continuous_vp import ContinuousVP
from .custom import CustomProcess
from .discrete_vp import DiscreteVP
from .rectified_flow import RectifiedFlow
from .ve import VE

# Each under the first words of its names: a new process is one more class here.
_NAMED: tuple[type[NoiseProcess], ...] = (DiscreteVP, VE, RectifiedFlow, ContinuousVP)
PROCESSES = {name: process for process in _NAMED for name in process.names}


@checked
def make_process(name: str) -> NoiseProcess:
    """Build a noise process by name.

    Args:
        name: `sigmoid-T`, `linear-T` or `cosine-T` for a `DiscreteVP` of `T` noisings
            (`linear-1000`, say), `linear-1000/10` for its `subsampled` chain of 10,
            `linear-1000-zero-snr` for one whose last noising leaves no signal; `ve` for the `VE`
            of EDM, `ve-0.002-80` for one from `sigma_min` to `sigma_max`; `flow` for a
            `RectifiedFlow`, `flow-3` with the shift 3; `vp` for the `ContinuousVP` of score
            networks, `vp-0.1-20` with these betas.

    Raises:
        ValueError: The kind is unknown, its numbers are missing or no numbers, or the process
            refuses them.
    """
    kind = name.partition("-")[0]
    if kind not in PROCESSES:
        raise unknown_name("noise process", kind, PROCESSES)
    return PROCESSES[kind].named(name)


@checked
def as_process(process: NoiseProcess | str) -> NoiseProcess:
    """Return a noise process that is given as such, or by a name for `make_process`."""
    return process if isinstance(process, NoiseProcess) else make_process(process)


__all__ = [
    "PROCESSES",
    "VE",
    "ContinuousVP",
    "CustomProcess",
    "DiscreteVP",
    "NoiseProcess",
    "RectifiedFlow",
    "as_process",
    "make_process",
]
