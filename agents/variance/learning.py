"""VarianceLearning: what a pretrained network leaves open, measured on data, makes its noise right.

The mean of a reverse transition is the network's; the best variance follows from how much of the
clean sample x_t does not tell. Three ways to know that (MATH.md 1.11 and 1.12), each with its
sampler:

    "gamma"  Gamma_n = E ||epsilon_theta(x_n, n)||^2 / d, a number a noising          analytic-dpm
    "sn"     h minimises E (eps^2 - h(x_t))^2, a number a pixel                       sn-ddpm
    "npr"    g minimises E ((eps - epsilon_theta(x_t))^2 - g(x_t))^2, likewise        npr-ddpm

The network itself stays as it is; "sn" and "npr" train a second head on its last features.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...common.portions import portions
from ..base import Agent
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..report import Report
from ..samplers.tableau import Tableau
from ..solvers import ancestral
from .head_training import HeadTraining
from .held_out import Noised, held_out_samples
from .learner import LEARNED, VarianceLearner
from .settings import VarianceSettings
from .sums import GammaSums

SOLVER_OF: dict[str, str] = {"gamma": "analytic-dpm", "sn": "sn-ddpm", "npr": "npr-ddpm"}


class VarianceLearning(Agent):
    """Give a denoiser its Gamma, or a second head, for samplers with the best variance.

    One round is one batch of data: of the sums behind Gamma, or one gradient step of the head. The
    denoiser given gets `gamma` or `head`; what it had before is replaced, unless it is the better
    one.

    What was given is the Gamma or the head that the denoiser had, or else DDPM's variance, and that
    of Gaussian data. What is learned takes its place if its loss, the squares above, is less on
    held-out samples, and not by chance (`fewstep.agents.selection`): Gamma's when
    all samples were met, a head's now and then. Both are compared when `learn` ends.

    Timesteps are the calls on the samples that are learned from.

    Args:
        env: the environment; its target gives the data, its process the noise.
        denoiser: the pretrained network, which is not trained.
        *args: the settings, see `VarianceSettings`.
        **arguments: single settings by name, and `Agent`'s remaining arguments.

    Attributes:
        errors: the losses of both and of what is "returned", mean squares per coordinate (of Gamma
            per sample), on samples that were neither learned on nor chosen by; empty before the end
            of `learn`.

    Raises:
        ValueError: a setting unknown or out of range, another solver, "gamma" on another process
            than a `DiscreteVP`, "sn" or "npr" on one that leaves no signal at its last time, or a
            network whose last features a head cannot read.
    """

    name = "variance"

    settings: VarianceSettings
    Settings = VarianceSettings

    def __init__(self, env: Environment, denoiser: Denoiser, *args: Any, **arguments: Any) -> None:
        super().__init__(env, denoiser, *args, **arguments)
        # What is learned is the caller's from the first round on, not before.
        self._callers, self.denoiser = self.denoiser, self.denoiser.view()
        self.errors: dict[str, float] = {}
        learner = GammaSums if self.settings.kind == "gamma" else HeadTraining
        self._learner: VarianceLearner = learner(self.mdp, self.denoiser, self.settings, self.seed)
        # Bad options of the solver show now, not after the training.
        self.tableau_on(self.schedule)

    def _solver(self) -> str:
        kind, solver = self.settings.kind, self.settings.solver
        if solver not in (None, SOLVER_OF[kind]):
            raise ValueError(
                f"kind '{kind}' is learned for solver '{SOLVER_OF[kind]}', not '{solver}'."
            )
        return SOLVER_OF[kind]

    @property
    def tableau(self) -> Tableau:
        """The sampler with the variances known so far."""
        return self.tableau_on(self.schedule)

    def starting_tableau(self, denoiser: Denoiser) -> Tableau:
        """Return DDPM's own chain with its small variance, what there is to improve on."""
        clip = bool(self.solver_options.get("clip", True))
        return ancestral(self.mdp.schedule, "small", clip=clip)

    def step_sizes(self) -> list[str]:
        """Return the learning rate of a head; Gamma is a mean, and has none."""
        return [] if self.settings.kind == "gamma" else super().step_sizes()

    @property
    def timesteps_per_round(self) -> int:
        """One call on each sample of the batch."""
        return self.settings.batch_size

    @property
    def budget(self) -> int:
        """The rounds of a head, or those that all samples of Gamma's noisings take."""
        return self._learner.rounds

    @property
    def finished(self) -> bool:
        """Whether Gamma has had all its samples; a head can always go on."""
        return self._learner.complete

    @property
    def returned(self) -> str:
        """Whether the denoiser has what was "given" or what is "learned"."""
        return self._learner.returned

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why."""
        what = f"the {self.returned} {self._learner.learned}"
        if not self.errors:
            return f"Training is not over; so far there is {what}."
        return (
            f"Returned, as the best on held-out samples: {what}. Loss: "
            f"{self.errors['returned']:.3e}, of what was given {self.errors['given']:.3e}."
        )

    def report(self) -> Report:
        """Return what was compared."""
        return Report(self.verdict, {"errors": self.errors, "returned": self.returned})

    # -- learning ------------------------------------------------------------------------------

    def train_round(self) -> dict[str, Tensor]:
        """Learn from a batch; now and then, and at the end, keep what is better."""
        learner = self._learner
        drawn = self.mdp.target.draw(self.settings.batch_size, self.generator, self.mdp.kind)
        clean, condition = drawn
        noise = torch.empty_like(clean).normal_(generator=self.generator)
        metrics = learner.learn(clean, noise, self.generator, self.progress, condition)
        ends = learner.complete or self.last_round
        if ends or learner.judges_after(self.rounds + 1):
            learner.choose(self._losses(0))
        if ends:
            self.errors = {name: float(loss.mean()) for name, loss in self._losses(1).items()}
            metrics |= {f"train/{name}_loss": torch.tensor(e) for name, e in self.errors.items()}
            metrics["train/returned"] = torch.tensor(float(self.returned == LEARNED))
        self.num_timesteps += self.timesteps_per_round
        self._hand_over()
        return metrics

    @cached_property
    def _held_out(self) -> tuple[Noised, Noised]:
        """Samples to choose by, and others to report on."""
        learner = self._learner
        return held_out_samples(self.mdp, learner.held_out, learner.draw_times, self.seed)

    def _losses(self, which: int) -> dict[str, Tensor]:
        """Return the losses (N,) on the samples to choose by (0) or to report on (1)."""
        pieces = portions(self._held_out[which], self.settings.batch_size)
        parts = [self._learner.losses(Noised(*piece)) for piece in pieces]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _hand_over(self) -> None:
        """Give the caller's denoiser what has been learned."""
        self._callers.gamma, self._callers.head = self.denoiser.gamma, self.denoiser.head

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what the learner remembers, and what was compared."""
        return {"returned": self.returned, "errors": self.errors, **self._learner.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.errors = dict(state["errors"])
        self._learner.load_state(state, state["returned"])
        self._hand_over()
