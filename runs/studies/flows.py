"""Studies of rectified flows beside diffusion models: the same network, budget and solvers."""

from __future__ import annotations

from .agents import FINE_GRAIN
from .contenders import Contender, Grid
from .engine import Study
from .guidance import LEARNED, SOLVERS, at_own_times
from .stages import SMALL_UNET, Clone, Sample, Stage, fine_tune
from .world import Scoring

PROCESSES = {"diffusion": "linear-1000", "flow": "flow"}
FINE_TUNED = {
    "SwissRoll": (Sample("ancestral", {}, "uniform"), fine_tune("sft-v", 0)),
    "FashionMNIST": (FINE_GRAIN, fine_tune("sft", 0)),
}


def _study(env: str, title: str, scoring: Scoring, columns: tuple[str, ...]) -> Study:
    body = SMALL_UNET if env in ("MNIST", "FashionMNIST") else {}
    chains: dict[str, tuple[Stage, ...]] = {label: (each,) for label, each in SOLVERS.items()}
    chains |= LEARNED | {"fine-tuned": FINE_TUNED[env]}
    clones = {name: Clone(process, seed=0, **body) for name, process in PROCESSES.items()}
    contenders = tuple(
        Contender(label, (clone, *at_own_times(clone, stages)), name)
        for name, clone in clones.items()
        for label, stages in chains.items()
    )
    return Study(title, Grid((env,), contenders, (5, 10), (0,), scoring), columns)


_CLASSIFIER = "fashionmnist-classifier"
STUDIES = {
    "flows": _study(
        "SwissRoll",
        "A flow of the roll beside its diffusion model: solvers, what is learned, fine-tuning",
        Scoring(20_000, held_out=2000, before=False),
        ("error", "sliced_wasserstein_fresh", "seconds"),
    ),
    "flows-fashion": _study(
        "FashionMNIST",
        "A flow of Fashion-MNIST beside its diffusion model",
        Scoring(2000, held_out=256, reference_steps=100, before=False),
        (
            "error",
            *(f"{name}[{_CLASSIFIER}]" for name in ("frechet_distance", "precision", "recall")),
            "seconds",
        ),
    ),
}
