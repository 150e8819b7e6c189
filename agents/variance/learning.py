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

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ...common.optimisation import (
    Averaged,
    adam,
    learning_rate,
    seeded,
    set_learning_rate,
)
from ...envs import DiscreteVP
from ..base import Agent, Environment
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau
from ..solver_learning.held_out_data import Noised, held_out_samples
from ..solver_learning.selection import is_better
from ..solvers import ancestral
from .head import VarianceHead
from .settings import VarianceSettings

# Rounds of a head's training between two looks at held-out samples.
CHECK_INTERVAL = 50
GIVEN, LEARNED = "given", "learned"
SOLVER_OF: dict[str, str] = {"gamma": "analytic-dpm", "sn": "sn-ddpm", "npr": "npr-ddpm"}


class VarianceLearning(Agent):
    """Give a denoiser its Gamma, or a second head, for samplers with the best variance.

    One round is one batch of data: of the sums behind Gamma, or one gradient step of the head.
    Gamma is known after `planned_rounds`; what is known before is used at any time, with DDPM's
    variance for noisings not met yet. The denoiser given gets `gamma` or `head`; what it had before
    is replaced, unless it is the better one.

    What was given is the Gamma or the head that the denoiser had, or else DDPM's variance, and that
    of Gaussian data. What is learned takes its place if its loss, the squares above, is less on
    held-out samples, and not by chance (`fewstep.agents.solver_learning.selection`): Gamma's when
    all
    samples were met, a head's now and then. Both are compared when `learn` ends.

    Args:
        env: the environment; its target gives the data, its process the noise.
        denoiser: the pretrained network, which is not trained.
        settings: see `VarianceSettings`; the remaining arguments are `Agent`'s.

    Attributes:
        returned: whether the denoiser has what was "given" or what is "learned".
        errors: the losses of both and of what is "returned", mean squares per coordinate (of Gamma
            per sample), on samples that were neither learned on nor chosen by; empty before the end
            of `learn`.

    Raises:
        ValueError: a setting unknown or out of range, another solver, "gamma" on another process,
            or a network whose last features a head cannot read.
    """

    name = "variance"

    settings: VarianceSettings
    Settings = VarianceSettings

    def __init__(self, env: Environment, denoiser: Denoiser, *args: Any, **arguments: Any) -> None:
        super().__init__(env, denoiser, *args, **arguments)
        # What is learned is the caller's from the first round on, not before.
        self._callers, self.denoiser = self.denoiser, _light_copy(self.denoiser)
        self.returned = GIVEN
        self.errors: dict[str, float] = {}
        self._held_out: tuple[Noised, Noised] | None = None
        if self.settings.kind == "gamma":
            self._begin_sums()
        else:
            self._begin_head()
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

    @property
    def timesteps_per_round(self) -> int:
        """One call on each sample of the batch."""
        return self.settings.batch_size

    @property
    def planned_rounds(self) -> int | None:
        """The rounds that all samples of all noisings take; of a head the caller says."""
        if self.settings.kind != "gamma":
            return self.settings.rounds
        return -(-len(self._counts) * self.settings.samples_per_time // self.settings.batch_size)

    @property
    def done(self) -> bool:
        """Whether every noising has had its samples."""
        return (
            self.settings.kind == "gamma"
            and int(self._counts.min()) >= self.settings.samples_per_time
        )

    def train_round(self) -> dict[str, Tensor]:
        """Add a batch to the sums, or take a gradient step of the head."""
        clean = self.mdp.target.sample(self.settings.batch_size, self.generator)
        noise = torch.empty_like(clean).normal_(generator=self.generator)
        metrics = (
            self._add(clean, noise)
            if self.settings.kind == "gamma"
            else self._descend(clean, noise)
        )
        self.num_timesteps += self.timesteps_per_round
        ends = self.done or self.num_timesteps >= self._total_timesteps
        if ends or (self.settings.kind != "gamma" and (self.rounds + 1) % CHECK_INTERVAL == 0):
            self._choose()
        if ends:
            metrics |= self._report()
        self._hand_over()
        return metrics

    def _hand_over(self) -> None:
        """Give the caller's denoiser what has been learned."""
        self._callers.gamma, self._callers.head = self.denoiser.gamma, self.denoiser.head

    # -- the choice ----------------------------------------------------------------------------

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why."""
        what = {"gamma": "Gamma", "sn": "second head", "npr": "second head"}[self.settings.kind]
        if not self.errors:
            return f"Training is not over; so far there is the {self.returned} {what}."
        return (
            f"Returned, as the best on held-out samples: the {self.returned} {what}. Loss: "
            f"{self.errors['returned']:.3e}, of what was given {self.errors['given']:.3e}."
        )

    def _samples(self, which: int) -> Noised:
        """Return the samples to choose by (0) or to report on (1), made once from the seed."""
        if self._held_out is None:
            gamma, count = (
                self.settings.kind == "gamma",
                len(self._counts) if self.settings.kind == "gamma" else 0,
            )

            def times(n: int, generator: torch.Generator) -> Tensor:
                if gamma:
                    return (torch.arange(n) % count + 1).to(self.device)
                return self.mdp.process.draw_times(n, generator, self.device)

            n = max(count, 256) if gamma else max(2 * self.settings.batch_size, 64)
            self._held_out = held_out_samples(self.mdp, n, times, self.seed)
        return self._held_out[which]

    @torch.no_grad()
    def _losses(self, which: int) -> dict[str, Tensor]:
        """Return the losses (N,) of what is given, learned and kept on held-out samples."""
        samples = self._samples(which)
        parts: list[dict[str, Tensor]] = []
        for noisy, t, noise in zip(
            *(each.split(self.settings.batch_size) for each in samples), strict=True
        ):
            if self.settings.kind == "gamma":
                value = self._gamma_values(noisy, t, noise)
                index = t.cpu() - 1
                learned, given = self._estimate()[index], self._given_gamma[index]
                kept = given if self.returned == GIVEN else learned
                answers = {GIVEN: given, LEARNED: learned, "returned": kept}
                parts.append({name: (value - a).square() for name, a in answers.items()})
            else:
                _, read = self.denoiser.head_inputs(noisy, t)
                target = (noise if self.settings.kind == "sn" else noise - read.epsilon).square()
                heads = {GIVEN: self._given, LEARNED: self._averaged.module, "returned": self._best}
                parts.append(
                    {
                        name: (target - head(*read)).double().square().flatten(1).mean(1).cpu()
                        for name, head in heads.items()
                    }
                )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _choose(self) -> None:
        """Keep what was learned if it is better on held-out samples than what is kept."""
        losses = self._losses(0)
        if self.settings.kind == "gamma":
            self.returned = LEARNED if is_better(losses[LEARNED], losses[GIVEN]) else GIVEN
            self.denoiser.gamma = (
                self._given_gamma.clone() if self.returned == GIVEN else self._estimate()
            )
        elif is_better(losses[LEARNED], losses["returned"]):
            self._best.load_state_dict(self._averaged.module.state_dict())
            self.returned = LEARNED

    def _report(self) -> dict[str, Tensor]:
        """Measure on samples that only report."""
        self.errors = {name: float(loss.mean()) for name, loss in self._losses(1).items()}
        logged = {f"train/{name}_loss": torch.tensor(e) for name, e in self.errors.items()}
        return {**logged, "train/returned": torch.tensor(float(self.returned == LEARNED))}

    # -- Gamma ---------------------------------------------------------------------------------

    def _begin_sums(self) -> None:
        process = self.mdp.process
        if not isinstance(process, DiscreteVP):
            raise ValueError(
                f"kind 'gamma' has one number a noising of a DiscreteVP, and this is {process!r}; "
                "'sn' and 'npr' learn on any process."
            )
        levels = torch.arange(len(process.betas), dtype=torch.float64) + 1
        alpha, sigma = process.alpha(levels), process.sigma(levels)
        # Gamma of Gaussian data of the same size: how much ||epsilon||^2 and ||eps||^2, of which
        # the mean is known, vary together.
        gaussian = sigma**2 / ((alpha * self.denoiser.sigma_data) ** 2 + sigma**2)
        self._control = gaussian**2
        gamma = self.denoiser.gamma
        known = gamma is not None and len(gamma) == len(levels)
        self._given_gamma = (
            gamma.clone() if known and gamma is not None else torch.ones_like(levels)
        )
        self._sums = torch.zeros_like(levels)
        self._counts = torch.zeros_like(levels)
        self._know_gamma()

    def _add(self, clean: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Add a batch to the sums, the noisings in turn."""
        first = int(self._counts.sum())
        index = torch.arange(first, first + len(clean)) % len(self._counts)
        t = (index + 1).to(self.device)
        noisy = self.mdp.process.add_noise(clean, t, noise)
        values = self._gamma_values(noisy, t, noise)
        self._sums.index_add_(0, index, values)
        self._counts.index_add_(0, index, torch.ones_like(values))
        self._know_gamma()
        self.returned = LEARNED
        known = self._counts > 0
        gamma = self.denoiser.gamma
        assert gamma is not None
        return {"train/gamma": gamma[known].mean(), "train/samples_per_time": self._counts.min()}

    @torch.no_grad()
    def _gamma_values(self, noisy: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return what each sample says of Gamma at its noising, (N,) float64 on the CPU."""
        epsilon = self.denoiser.epsilon(noisy, t)
        predicted, drawn = (
            value.flatten(1).square().mean(1).cpu().double() for value in (epsilon, noise)
        )
        return predicted - self._control[t.cpu() - 1] * (drawn - 1)

    def _know_gamma(self) -> None:
        """Hand the denoiser what the sums say."""
        self.denoiser.gamma = self._estimate()

    def _estimate(self) -> Tensor:
        """Return Gamma as the sums say; 1, which adds no variance, where they are empty."""
        means = (self._sums / self._counts.clamp_min(1)).clamp_min(0)
        return torch.where(self._counts > 0, means, torch.ones_like(means))

    # -- a second head -------------------------------------------------------------------------

    def _begin_head(self) -> None:
        shape = tuple(self.mdp.shape)
        with torch.no_grad():
            probe = torch.zeros(1, *shape, device=self.device)
            features = self.denoiser.head_inputs(probe, self.mdp.process.t_max)[1].features
        with seeded(self.seed):
            head = VarianceHead.on_features(
                self.settings.kind,
                features,
                shape,
                hidden=self.settings.head.hidden,
                data_std=self.denoiser.sigma_data,
                per_pixel=self.settings.head.per_pixel,
            )
        self._head = head.to(self.device)
        self._averaged = Averaged(self._head, self.settings.optimizer.ema)
        self._optimizer = adam(self._head.parameters())
        # What the denoiser had, if it is of this kind and size, or what says the data are Gaussian.
        had = self.denoiser.head
        given = had if had is not None and had.config == self._head.config else self._head
        self._given = copy.deepcopy(given).requires_grad_(False)
        # The result: whoever goes on to train it finds it trainable.
        self._best = copy.deepcopy(self._given).requires_grad_(True)
        self.denoiser.head = self._best

    def _descend(self, clean: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Take a gradient step of the head on a batch."""
        t = self.mdp.process.draw_times(len(clean), self.generator, self.device)
        noisy = self.mdp.process.add_noise(clean, t, noise)
        with torch.no_grad():
            _, read = self.denoiser.head_inputs(noisy, t)
        target = noise if self.settings.kind == "sn" else noise - read.epsilon
        loss = (target.square() - self._head(*read)).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._head.parameters(), self.settings.optimizer.max_grad_norm or math.inf
        )
        rate = learning_rate(
            self.settings.optimizer.learning_rate,
            self.settings.optimizer.lr_schedule,
            self.progress,
        )
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._averaged.update()
        return {"train/loss": loss.detach(), "train/grad_norm": grad_norm}

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the sums, or the head, its average and its optimizer."""
        kept = {"returned": self.returned, "errors": self.errors}
        if self.settings.kind == "gamma":
            given = self._given_gamma.tolist()
            return {
                "sums": self._sums.tolist(),
                "counts": self._counts.tolist(),
                "given": given,
                **kept,
            }
        return {
            **kept,
            "given": self._given.state_dict(),
            "best": self._best.state_dict(),
            "head": self._head.state_dict(),
            "averaged": self._averaged.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        # Files of before the comparison: what was learned was returned.
        self.returned = state.get("returned", LEARNED)
        self.errors = dict(state.get("errors", {}))
        if self.settings.kind == "gamma":
            self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
            self._counts.copy_(torch.tensor(state["counts"], dtype=torch.float64))
            if "given" in state:
                self._given_gamma = torch.tensor(state["given"], dtype=torch.float64)
            self._know_gamma()
            if self.returned == GIVEN and self._counts.any():
                self.denoiser.gamma = self._given_gamma.clone()
            self._hand_over()
            return
        self._best.load_state_dict(state.get("best", state["averaged"]))
        if "given" in state:
            self._given.load_state_dict(state["given"])
        self._head.load_state_dict(state["head"])
        self._averaged.module.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._hand_over()


def _light_copy(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser with the same body, with a `gamma` and a `head` of its own."""
    light = copy.copy(denoiser)
    light._modules = dict(denoiser._modules)
    return light
