"""What a cell is measured on: an environment under a seed, and the scores of its samplers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...agents import Denoiser, Tableau
from ...agents.denoisers.exact import mixture
from ...agents.samplers.sampling import sampler_of
from ...agents.selection import coordinate_errors
from ...agents.solvers import make_solver
from ...common.conditions import Conditional, kind_of
from ...critics.metrics.evaluation import Evaluation
from ...critics.metrics.features import FeatureExtractor
from ...envs import DiffusionMDP, Schedule, Target, make_target
from ...envs.mdp import no_reward
from ...envs.processes import NoiseProcess, make_process
from ..reports.features import features_for, real_distances
from ..settings.benchmark import BenchmarkSettings
from ..settings.train import resolve_device
from .engine import locked

# The environment whose denoiser is exact instead of cloned; the noisings of a long process.
MIXTURE, LONG = "Mixture", 1000
# Added to a cell's seed: noise that no fit has seen.
HELD_OUT_SEED = 20_001


@dataclass(frozen=True)
class Scoring:
    """How samplers are scored.

    Attributes:
        samples: most samples of a metric of the distance to real data; 0 leaves these metrics out.
        held_out: how many noises the error is measured on, the mean square of a coordinate of what
            a sampler and the pretrained network's ODE make of the same noise; 0 leaves it out.
        reference_steps: of Heun's method, which solves the ODE.
        before: whether what the learners were given is scored, too.
        own_noise: whether each seed scores samples of noise of its own.
        conditional: whether samplers are asked for the classes of the data, or which conditions.
        timeline: whether learners are scored on the way, too: quality against time.
    """

    samples: int = 200_000
    held_out: int = 0
    reference_steps: int = 1000
    before: bool = True
    own_noise: bool = True
    conditional: Conditional = False
    timeline: bool = False


@dataclass(frozen=True)
class World:
    """An environment under a seed: its data, and what samples should be."""

    env: str
    seed: int
    scoring: Scoring
    settings: BenchmarkSettings
    _references: dict[tuple[str, float, float], Tensor] = field(default_factory=dict, compare=False)

    @cached_property
    def target(self) -> Target:
        """The data."""
        if self.env == MIXTURE:
            return mixture(make_process(f"linear-{LONG}"), seed=self.seed)[1]
        device = resolve_device(self.settings.device)
        captions = kind_of(self.scoring.conditional) == "captions"
        given = self.settings
        # Of several workers one downloads.
        with locked(given.folder / "locks" / "data") if given.download else nullcontext():
            return make_target(
                self.env,
                device=device,
                data_dir=given.data_dir,
                download=given.download,
                image_size=given.image_size,
                captions=captions,
            )

    @cached_property
    def evaluation(self) -> Evaluation:
        """The metrics of the distance to the data."""
        samples = self.settings.evaluation_samples or self.scoring.samples
        conditional = self.scoring.conditional
        return Evaluation(self.target, samples, self.features, real_distances, conditional)

    @cached_property
    def features(self) -> FeatureExtractor | None:
        """What images are compared in."""
        given = self.settings
        return features_for(
            self.target, inception_weights=given.inception_weights, data_dir=given.data_dir
        )

    def mdp(
        self,
        process: NoiseProcess,
        schedule: Schedule | None = None,
        conditional: Conditional = False,
    ) -> DiffusionMDP:
        """Return the environment, with a reward that costs nothing; agents bring their own."""
        times = schedule or Schedule.uniform(process, 10)
        return DiffusionMDP(self.target, process, times, no_reward, conditional)

    def score(
        self, origin: str, pretrained: Denoiser, tableau: Tableau, denoiser: Denoiser
    ) -> dict[str, float]:
        """Score a sampler.

        Args:
            origin: name of the pretrained network.
            pretrained: that network, to whose ODE the error is measured.
            tableau: the sampler's table.
            denoiser: what the table asks.
        """
        scores: dict[str, float] = {}
        if self.scoring.held_out:
            start, end = float(tableau.times[0]), float(tableau.times[-1])
            with torch.no_grad():
                view = denoiser.under(self._conditions(denoiser))
                fresh = torch.Generator(self.target.device).manual_seed(HELD_OUT_SEED + self.seed)
                noise = self._noise(pretrained, start)
                samples = tableau.sample(view, noise, generator=fresh)
                goal = self._reference(origin, pretrained, start, end)
            scores["error"] = float(coordinate_errors(samples, goal).mean())
        if self.scoring.samples:
            mdp = None
            if denoiser.is_open:
                mdp = self.mdp(denoiser.process, conditional=denoiser.waits_for)
            draw = sampler_of(tableau, denoiser, tuple(self.target.shape), mdp)
            scores |= self.evaluation(draw, self.seed if self.scoring.own_noise else 0)
        return scores

    def _noise(self, denoiser: Denoiser, start: float) -> Tensor:
        """Return noise at time `start` that no fit has seen, (N, *shape)."""
        generator = torch.Generator(self.target.device).manual_seed(HELD_OUT_SEED + self.seed)
        shape = (self.scoring.held_out, *self.target.shape)
        return denoiser.process.prior_sample(shape, generator, t=start, device=self.target.device)

    def _conditions(self, denoiser: Denoiser) -> Tensor | None:
        """Return the conditions of that noise, drawn from the data; None without any."""
        kind = denoiser.waits_for
        if not kind:
            return None
        generator = torch.Generator(self.target.device).manual_seed(HELD_OUT_SEED + self.seed)
        return self.target.sample_conditions(self.scoring.held_out, generator, kind)[0]

    def _reference(self, origin: str, denoiser: Denoiser, start: float, end: float) -> Tensor:
        """Return what the ODE of a denoiser makes of that noise, by many steps of Heun's method."""
        process, steps = denoiser.process, self.scoring.reference_steps
        key = (origin, start, end)
        if key not in self._references:
            if process.grid == "karras":
                schedule = Schedule.karras(process, steps, append_zero=end == 0, start=start)
            else:
                ramp = torch.linspace(start, end, steps + 1, dtype=torch.float64)
                schedule = Schedule(process, ramp)
            noise, view = self._noise(denoiser, start), denoiser.under(self._conditions(denoiser))
            self._references[key] = make_solver("heun", schedule).sample(view, noise)
        return self._references[key]
