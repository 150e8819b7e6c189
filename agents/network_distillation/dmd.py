"""DMD: the student's samples get the distribution of the teacher's (MATH.md 6.4).

Yin et al. (2024), "Improved Distribution Matching Distillation". Not paths are compared but
distributions: a sample x of the student is noised to x_tau, and moves along the difference of two
scores there, of the real distribution by the teacher and of the student's own by a network that
learns it all the while, until both agree:

    g = (D_fake(x_tau) - D_real(x_tau)) / (mean |x - D_real(x_tau)| + 1e-6),
    loss = 1/2 mean (x - sg(x - g))^2  +  adversarial * softplus(-f(x))

f is our learned critic, which tells x from data.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.checkpoint import CheckpointError
from ...common.optimisation import adam, learning_rate, seeded, set_learning_rate
from ...critics import IPMCritic
from ...critics.energy import EnergyDistance
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..policy_gradient.critic import learned_critic
from ..samplers.tableau import Tableau
from ..solvers import build_solver
from .agent import NetworkDistillation, without_guidance
from .held_out import Trajectories, pieces
from .pairs import column
from .settings import DMDSettings


class Begun(NamedTuple):
    """Where the student's chain is, each sample before a step of its own.

    Attributes:
        states: (N, *shape).
        times: (N,) theirs.
        condition: (N, ...) or None.
    """

    states: Tensor
    times: Tensor
    condition: Tensor | None

    def at(self, rows: slice) -> Begun:
        """Return some of them."""
        condition = None if self.condition is None else self.condition[rows]
        return Begun(self.states[rows], self.times[rows], condition)


class Noising(NamedTuple):
    """How samples are noised, to be compared.

    Attributes:
        times: (N,) tau.
        noise: (N, *shape), standard normal.
    """

    times: Tensor
    noise: Tensor

    def at(self, rows: slice) -> Noising:
        """Return some of them."""
        return Noising(self.times[rows], self.noise[rows])


class DMD(NetworkDistillation):
    """Match the distribution of the student's samples with the teacher's (Yin et al. 2024).

    Three networks: the student, the teacher, and a copy that learns to denoise the student's
    samples; all start from the one that is given. A round trains the copy (and the critic) a few
    times, and the student once. The student samples with a table whose steps read their own state
    only. It learns where its own chain comes along: the chain runs without gradient to a random
    step, and the predicted clean sample there is x. Without `adversarial` no data is needed.

    Guidance is the teacher's alone: the student is asked with the condition.

    `errors` are energy distances between finished samples and others from other noise: the fine
    solver's, or real ones if there is a critic. Of conditional samples, between their distributions
    with the conditions.

    Args:
        env: the environment; its schedule is the sampler's.
        denoiser: the network, trained in place.
        settings: see `DMDSettings`.
        arguments: single settings by name, and `Agent`'s remaining arguments.

    Attributes:
        fake: the network that denoises the student's samples.
        fake_optimizer: its Adam.
        critic: f, if there is an adversarial term.

    Raises:
        ValueError: a sampler with memory or with steps that do not ask the network, a critic where
            there is no data; see also `NetworkDistillation`.
    """

    name = "dmd"
    follows_paths = False

    settings: DMDSettings
    Settings = DMDSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: DMDSettings | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, **arguments)
        self.fake = copy.deepcopy(self.denoiser)
        if _is_guided(self.fake):
            self.fake = without_guidance(self.fake)
        self.fake_optimizer = adam(self.fake.parameters(), self.settings.optimizer.betas)
        self.critic: IPMCritic | None = None
        if self.settings.adversarial:
            with seeded(self.seed):
                self.critic = learned_critic(self.mdp, self.settings.critic, self.denoiser)
        # Processes that train together draw the noise of the steps together.
        self._quiet = self._tableau.replace(noise=np.zeros(self._tableau.steps))

    def step_sizes(self) -> list[str]:
        """Return the learning rates of the student, the network of its samples and the critic."""
        sizes = super().step_sizes()
        if self.settings.fake_learning_rate is not None:
            sizes.append("fake_learning_rate")
        return sizes if self.critic is None else [*sizes, "critic.learning_rate"]

    def _check_sampler(self) -> None:
        table = self._tableau
        table.check_process(self.denoiser)
        rows = [table.row(j) for j in range(table.steps)]
        if not table.one_step or any(not row.asked or row.covariance for row in rows):
            raise ValueError(
                f"Distribution matching needs a sampler whose steps ask the network and read their "
                f"own state only, such as consistency, ddim or ancestral; not '{table.name}'."
            )
        if self.settings.adversarial and not self.mdp.target.has_samples:
            raise ValueError(
                "adversarial > 0 compares with real samples, and there are none here: take "
                "adversarial=0."
            )

    @property
    def _absorbs(self) -> bool:
        return self.settings.absorb_guidance and _is_guided(self.denoiser)

    @property
    def _rival(self) -> Tableau:
        return build_solver("ddim", self.mdp.schedule)

    def networks(self) -> list[nn.Module]:
        """Return the networks whose calls are counted."""
        return [*super().networks(), self.fake]

    # -- learning --------------------------------------------------------------------------------

    def _train(self) -> dict[str, Tensor]:
        """Let the fake network and the critic follow the student; then move the student."""
        followed = [self._follow() for _ in range(self.settings.n_fake)]
        metrics = {
            name: torch.stack([each[name] for each in followed]).mean() for name in followed[0]
        }
        begun = self._begun()
        noising = self._noising(begun.states)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for rows in self._pieces():
            part = self.losses(begun.at(rows), noising.at(rows)).sum() / self.settings.batch_size
            part.backward()
            loss += part.detach()
        norm = self._descend(self.optimizer, self._rate)
        return {"loss": loss, "grad_norm": norm, **metrics}

    def _follow(self) -> dict[str, Tensor]:
        """Take a step of the fake network, and one of the critic, on new samples."""
        settings, begun = self.settings, self._begun()
        with torch.no_grad():
            samples = torch.cat([self.generated(begun.at(rows)) for rows in self._pieces()])
        noising = self._noising(samples)
        self.fake_optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for rows in self._pieces():
            part = self.denoising_losses(samples[rows], noising.at(rows), begun.at(rows).condition)
            piece = part.sum() / settings.batch_size
            piece.backward()
            loss += piece.detach()
        peak = settings.fake_learning_rate or settings.optimizer.learning_rate
        schedule = settings.optimizer.lr_schedule
        self._descend(self.fake_optimizer, learning_rate(peak, schedule, self._share_done))
        return {"fake_loss": loss, **self._criticise(samples, begun.condition)}

    def _criticise(self, samples: Tensor, condition: Tensor | None) -> dict[str, Tensor]:
        if self.critic is None:
            return {}
        count, its = self.processes.count, self.settings.critic
        everyone = self.settings.batch_size * count
        real, given = self.mdp.target.draw(everyone, self.generator, self.mdp.kind)
        conditions = None
        if condition is not None and given is not None:
            conditions = self.processes.share(given), condition
        rate = learning_rate(its.learning_rate, its.lr_schedule, self._share_done)
        set_learning_rate(self.critic.optimizer, rate)
        told = self.critic.update(self.processes.share(real), samples, conditions=conditions)
        return {name: told[name] for name in ("critic_loss", "critic_real", "critic_fake")}

    def generated(self, begun: Begun) -> Tensor:
        """Return the student's samples x (N, *shape), what it predicts where its chain is."""
        student = self.denoiser.under(begun.condition)
        return student.denoised(begun.states, begun.times)

    def direction(self, samples: Tensor, noising: Noising, condition: Tensor | None) -> Tensor:
        """Return g (N, *shape), against which samples (N, *shape) move."""
        with torch.no_grad():
            noisy = self.mdp.process.add_noise(samples, *noising)
            fake, real = (
                network.under(condition).denoised(noisy, noising.times)
                for network in (self.fake, self.teacher)
            )
            size = (samples - real).abs().flatten(1).mean(1)
            return (fake - real) / column(size + 1e-6, samples)

    def losses(self, begun: Begun, noising: Noising) -> Tensor:
        """Return the student's losses (N,), with their gradient by its weights."""
        samples = self.generated(begun)
        goal = samples.detach() - self.direction(samples.detach(), noising, begun.condition)
        loss = 0.5 * (samples - goal).flatten(1).square().mean(1)
        if self.critic is None:
            return loss
        under = () if begun.condition is None else (begun.condition,)
        return loss + self.settings.adversarial * F.softplus(-self.critic(samples, *under))

    def denoising_losses(
        self, samples: Tensor, noising: Noising, condition: Tensor | None
    ) -> Tensor:
        """Return the fake network's losses (N,): cloning's, on the student's samples."""
        fake = self.fake.under(condition)
        noisy = self.mdp.process.add_noise(samples, *noising)
        target = fake.training_target(samples, noising.noise, noising.times)
        return (fake(noisy, noising.times) - target).flatten(1).square().mean(1)

    @torch.no_grad()
    def _begun(self) -> Begun:
        """Run the student's chain, each sample to a step of its own."""
        table, everyone = self._quiet, self.settings.batch_size * self.processes.count
        share, source = self.processes.share, self.generator
        condition = self.mdp.episodes(everyone, source).condition
        states = share(self.mdp.initial(everyone, source))
        stops = torch.randint(table.steps, (everyone,), generator=source, device=self.device)
        stops, condition = share(stops), None if condition is None else share(condition)
        student = self.denoiser.under(condition)
        most = self.settings.execution.micro_batch_size or len(states)
        for j in range(table.steps - 1):
            noise = None
            if self._tableau.row(j).noise:
                noise = self._tableau.row(j).noise * self.processes.noise(states, source)
            going = (stops > j).nonzero().flatten()
            if not len(going):  # `split` would return a part without samples
                continue
            for rows in going.split(most):
                answer = table.evaluate(student.at(rows), states[rows], j)
                moved = table.advance(j, {j: states[rows]}, {j: answer})
                states[rows] = moved if noise is None else moved + noise[rows]
        times = torch.tensor(table.evaluation_times, device=self.device)[stops]
        return Begun(states, times, condition)

    def _noising(self, like: Tensor) -> Noising:
        """Draw times and noise, as a denoiser is trained at."""
        everyone = self.settings.batch_size * self.processes.count
        times = self.mdp.process.draw_times(everyone, self.generator, self.device)
        return Noising(self.processes.share(times), self.processes.noise(like, self.generator))

    def _pieces(self) -> list[slice]:
        size = self.settings.batch_size
        return list(pieces(size, self.settings.execution.micro_batch_size))

    # -- what is returned --------------------------------------------------------------------------

    def _hold_out(self, size: int, generator: torch.Generator) -> Trajectories:
        """Draw noise, and samples of the wanted distribution that have nothing to do with it."""
        found = super()._hold_out(size, generator)
        goal, condition = found.states[-1], found.condition
        if self.critic is not None:
            goal, condition = self.mdp.target.draw(size, generator, self.mdp.kind)
        noise = self.mdp.initial(size, generator)
        return Trajectories(torch.stack([noise, goal.to(noise)]), condition)

    def _errors_of(self, denoiser: Denoiser, held_out: Trajectories) -> Tensor:
        # All networks get the same noise on the way.
        fresh = torch.Generator(self.device).manual_seed(self.seed + 1)
        return self._distances(self._ends(denoiser, held_out, fresh), held_out)

    def _distances(self, ends: Tensor, held_out: Trajectories) -> Tensor:
        """Return the shares of the energy distance between finished samples and the goals."""
        points = None if self.mdp.conditions is None else self.mdp.conditions.points
        to_goal = EnergyDistance(held_out.states[-1], held_out.condition, points)
        return to_goal.shares(ends, held_out.condition)

    def _judge_teacher(self) -> float:
        """Warn of a fine solver that is none; return the energy distance of its own samples."""
        super()._judge_teacher()
        held_out = self._held_out.reported
        assert held_out is not None
        noise = held_out.states[0]
        under = self.teacher.under(held_out.condition)
        rows = pieces(len(noise), self.settings.execution.micro_batch_size)
        ends = torch.cat([self.fine.states(under.at(r), noise[r])[-1] for r in rows])
        return float(self._distances(ends, held_out).mean())

    def _comparison(self) -> str:
        returned, given = self.errors["returned"], self.errors["given"]
        return f"Energy distance: {returned:.2e}, of what was given {given:.2e}."

    # -- checkpoints -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what training changed."""
        return {
            **super().state(),
            "fake": self.fake.body.state_dict(),
            "fake_optimizer": self.fake_optimizer.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def _restore(self, tree: dict[str, Any], origin: str) -> None:
        """Refuse training with a critic where there is none here, and the other way round."""
        if (self.critic is None) != (tree["state"]["critic"] is None):
            raise CheckpointError(
                f"Of the training of {origin} and this one only one has a critic: take "
                f"adversarial{'>' if self.critic is None else '='}0 for both."
            )
        super()._restore(tree, origin)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        self.fake.body.load_state_dict(state["fake"])
        self.fake_optimizer.load_state_dict(state["fake_optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])


def _is_guided(denoiser: Denoiser) -> bool:
    terms = denoiser.conditioning
    return terms is not None and terms.guidance != 1
