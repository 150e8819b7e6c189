"""`evaluate`: score whatever samples against real ones, and the report that comes of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import check_seed, checked
from ...common.conditions import Conditional
from ..checks import check_samples
from .distances import Samples
from .evaluation import Distances, Evaluation, Metric, Real, Sampler, check_target
from .features import FeatureExtractor
from .fidelity import FeatureDistances


@dataclass(frozen=True)
class Score(Metric):
    """What a sampler scores on one metric, and what real samples do.

    Attributes:
        name: of the metric.
        samples: how many it was measured on.
        floor: what as many real samples score.
        higher_is_better: which way is up.
        value: the sampler's score.
    """

    value: float = math.nan


@dataclass(frozen=True)
class Report(Mapping[str, Score]):
    """The scores of a sampler by the metric's name; printed, they are a table.

    Attributes:
        scores: name of the metric -> score.
        nfe: network evaluations a sample costs; None if the sampler does not say.
    """

    scores: dict[str, Score]
    nfe: int | None = None

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        width = max(map(len, self.scores))
        head = f"{'metric':<{width}}  {'score':>9}  {'floor':>9}  samples"
        rows = [
            f"{name:<{width}}  {score.value:>9.2e}  {score.floor:>9.2e}  {score.samples:>7}"
            for name, score in self.scores.items()
        ]
        cost = [] if self.nfe is None else [f"network calls a sample: {self.nfe}"]
        return "\n".join([head, *rows, *cost])


@checked
def evaluate(
    sampler: Any,
    target: Real | Samples,
    n: int = 10_000,
    *,
    features: FeatureExtractor | None = None,
    seed: int = 0,
    nfe: int | None = None,
    distances: Distances = FeatureDistances,
    conditional: Conditional | None = None,
) -> Report:
    """Score a sampler against real samples; each metric has its sampling floor beside it.

        report = evaluate(agent, mdp.target)
        print(report)
        report["mmd"].value, report["mmd"].floor, report.nfe

    Args:
        sampler: what samples: an agent or policy, a function `(n, generator) -> (n, *shape)`, or
            samples that are there already, (N, *shape) tensor or array.
        target: the real distribution, a `Target`; or real samples (M, *shape), tensor or array, of
            which one half is compared with, and the other says the floors: M >= 4.
        n: most samples for any metric, at least 2; of given samples all. See `Evaluation`.
        features: in whose space images are compared, too; see `Evaluation`.
        seed: of the sampler's noise.
        nfe: network evaluations a sample costs; by default what the sampler says, `sampler.nfe`.
        distances: see `Evaluation`.
        conditional: see `Evaluation`; by default as the sampler's environment is.

    Raises:
        ValueError: too few samples, samples of another shape or that are not finite, or features of
            vectors.
        TypeError: nothing that samples.
    """
    check_seed(seed)
    real: Real = _Halves(target) if _is_array(target) else target  # type: ignore[arg-type,assignment]
    check_target(real)
    given = torch.as_tensor(sampler).to(real.device) if _is_array(sampler) else None
    if conditional is None:
        known = hasattr(real, "sample_conditions")
        conditional = known and getattr(getattr(sampler, "mdp", None), "conditional", False)
    evaluation = Evaluation(
        real, n if given is None else len(given), features, distances, conditional
    )
    if given is None:
        with torch.no_grad():
            drawing, device = _drawing(sampler, real.shape), getattr(sampler, "device", None)
            values = evaluation(drawing, seed, device)
    else:
        values = evaluation.score(given)
    scores = {}
    for metric in evaluation.metrics:
        fields = asdict(metric)
        if given is not None:
            fields["samples"] = min(metric.samples, len(given))
        scores[metric.name] = Score(**fields, value=values[metric.name])
    return Report(scores, getattr(sampler, "nfe", None) if nfe is None else nfe)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _drawing(sampler: Any, shape: torch.Size) -> Sampler:
    """Return a function `(n, generator) -> (n, *shape)` of an agent, a policy or a function."""
    method = getattr(sampler, "sample", None)
    if not callable(method):
        if not callable(sampler):
            raise TypeError(
                "A sampler is an agent or a policy with a method `sample`, a function (n, "
                f"generator) -> (n, *shape), or samples; got {type(sampler).__name__}."
            )
        return sampler
    # A policy of a solver does not know the shape of its samples.
    also = {"shape": tuple(shape)} if "shape" in inspect.signature(method).parameters else {}
    return lambda n, generator, **under: method(n, generator=generator, **also, **under)


class _Halves:
    """Real samples that are there already: every second one is compared with."""

    name = "the real samples"

    def __init__(self, real: Samples) -> None:
        samples = torch.as_tensor(real)
        check_samples("target", samples)
        if len(samples) < 4:
            raise ValueError(f"target must hold at least 4 real samples, got {len(samples)}.")
        self._training, self._fresh = samples[::2].float(), samples[1::2].float()
        self.shape, self.device = torch.Size(samples.shape[1:]), samples.device
        self.fresh_limit = len(self._fresh)

    def __len__(self) -> int:
        return len(self._training)

    def take(self, n: int) -> Tensor:
        return self._training[:n]

    def sample_fresh(self, n: int, seed: int) -> Tensor:
        rows = torch.randperm(len(self._fresh), generator=torch.Generator().manual_seed(seed))
        return self._fresh[rows[:n].to(self.device)]
