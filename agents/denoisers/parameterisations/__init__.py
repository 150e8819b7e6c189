"""Parameterisations: what networks predict, one file each."""

from ....common.arguments import checked
from ....common.names import unknown_name
from ....envs.processes import NoiseProcess
from .base import Parameterisation
from .edm import EDM
from .epsilon import Epsilon
from .flow import Flow
from .sample import Sample
from .score import Score
from .v import Velocity

# A new parameterisation is one more class here.
PARAMETERISATIONS: dict[str, type[Parameterisation]] = {
    kind.name: kind for kind in (Epsilon, Sample, Velocity, Flow, Score, EDM)
}


@checked
def make_parameterisation(
    prediction: str, process: NoiseProcess, sigma_data: float = 0.5
) -> Parameterisation:
    """Build a parameterisation by name.

    Args:
        prediction: a key of `PARAMETERISATIONS`.
        process: the noise process.
        sigma_data: standard deviation of the data, > 0.

    Raises:
        ValueError: an unknown name, or a process or a `sigma_data` that does not suit.
    """
    if prediction not in PARAMETERISATIONS:
        raise unknown_name("prediction", prediction, PARAMETERISATIONS)
    return PARAMETERISATIONS[prediction](process, sigma_data)


def time_range_of(prediction: str, process: NoiseProcess) -> tuple[float, float] | None:
    """Return what a body's `time_range` has to be: see `Parameterisation.time_range`."""
    return make_parameterisation(prediction, process).time_range


__all__ = [
    "PARAMETERISATIONS",
    "Parameterisation",
    "make_parameterisation",
    "time_range_of",
]
