"""NetworkDistillation: what the agents share that distil a fine solver into the network."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...common.arguments import check_value
from ...common.checkpoint import counter
from ...common.distributed import ALONE
from ...common.optimisation import Averaged, adam, learning_rate, set_learning_rate
from ..denoisers.conditioning import Conditioning
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..finished_table import TakesTable, on_times_of
from ..policy_gradient.execution import Execution, as_executed
from ..report import Panel, Report
from ..samplers.tableau import Tableau
from ..selection import coordinate_errors
from ..solver_learning.agent import SolverAgent, comparison
from ..solver_learning.best import BestNetwork
from ..solver_learning.distillation.teacher import Teacher, judge_teacher, make_teacher
from .held_out import HeldOut, Trajectories, draw_trajectories, pieces
from .settings import DistillationSettings

GIVEN, DISTILLED = "given", "distilled"
_NETWORKS = {GIVEN: "the network as it was given", DISTILLED: "the distilled network"}


class NetworkDistillation(TakesTable, SolverAgent):
    """Base of the agents that train the network for a few steps, by its own fine solver.

    A copy of the network stays as it was given: the teacher. On noise that is not trained on, the
    agent compares the averaged network with the best one so far, and in the end returns the best,
    or the network as it was given unless another errs less, not by chance
    (`fewstep.agents.selection`).

    Timesteps are all network calls on single samples, those of the teacher and those that only
    measure among them.

    Args:
        env: the environment; its schedule is the student's, its process gives the noise.
        denoiser: the network, trained in place.
        settings: see the agent's `Settings`.
        arguments: single settings by name, `tableau` where the agent takes one (see `TakesTable`;
            its times replace the environment's), and `Agent`'s remaining arguments.

    Attributes:
        follows_paths: whether each finished sample has a goal of its own; else only their
            distribution has.
        teacher: the network that the student learns from.
        fine: the fine solver that judges, with the states at the student's times.
        averaged: the average of the weights in training.
        optimizer: Adam.
        returned: which network samples: the "given" one, or a "distilled" one.
        errors: mean squared errors per coordinate against the fine solver, on noise that was
            neither trained on nor chosen by: of the network as it was "given", of the last
            ("distilled") and of what is "returned"; and the fine solver's own from a finer one's
            ("teacher").

    Raises:
        ValueError: a sampler that adds noise or clamps its predictions, never asks the network or
            is of another process; a tableau for an agent that has its own; or guidance to absorb
            where there is none.
    """

    data_parallel = True
    obeys_transitions = False
    takes_tableau = False
    follows_paths: ClassVar[bool] = True

    settings: DistillationSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: Any = None,
        **arguments: Any,
    ) -> None:
        self._given_terms = check_value("denoiser", denoiser, Denoiser).conditioning
        super().__init__(env, denoiser, settings, **arguments)
        self._check_sampler()
        self.mdp = on_times_of(self.mdp, self._tableau)
        optimizer = self.settings.optimizer
        self.teacher = copy.deepcopy(self.denoiser).requires_grad_(False)
        if self._absorbs:
            self.denoiser = without_guidance(self.denoiser)
        self.fine = self._new_fine_solver()
        self.optimizer = adam(self.denoiser.parameters(), optimizer.betas)
        self.averaged = Averaged(self.denoiser, optimizer.ema)
        self.execution = Execution(self.denoiser, self.settings.execution)
        self.errors = {}
        self._updates = 0
        self._best = BestNetwork(self.averaged, by_lead=self.follows_paths)
        self._held_out = HeldOut()

    # -- what a subclass says --------------------------------------------------------------------

    @abstractmethod
    def _train(self) -> dict[str, Tensor]:
        """Take the gradient steps of one round; return 0-d tensors to log, without "train/"."""

    def _check_sampler(self) -> None:
        """Raise ValueError for a sampler that the agent cannot train the network for."""
        self._tableau.check_process(self.denoiser)
        if self._tableau.nfe == 0:
            raise ValueError(
                f"'{self._tableau.name}' never asks the network: nothing can be distilled into it."
            )
        if not self._tableau.linear:
            raise ValueError(
                f"The solver '{self._tableau.name}' adds noise or clamps its predictions; a "
                "network is distilled for a deterministic one, such as ddim, euler or ipndm."
            )

    def _check_states(self) -> None:
        """Raise ValueError where the student is to be taught on data, and there is none."""
        if getattr(self.settings, "states", "teacher") == "data" and not (
            self.mdp.target.has_samples
        ):
            raise ValueError(
                "states='data' needs real samples, and there are none here: take states='teacher'."
            )

    @property
    def _rival(self) -> Tableau:
        """The deterministic table that the fine solver has to be better than."""
        return self._tableau

    @property
    def _judging(self) -> bool:
        """Whether the network in training is one for the sampler already."""
        return True

    def _errors_of(self, denoiser: Denoiser, held_out: Trajectories) -> Tensor:
        """Return a network's errors (N,) on held-out noise: those of the finished samples."""
        return coordinate_errors(self._ends(denoiser, held_out), held_out.states[-1])

    def _ends(
        self, denoiser: Denoiser, held_out: Trajectories, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the student's finished samples (N, *shape) from held-out noise, made in pieces."""
        under, noise = denoiser.under(held_out.condition), held_out.states[0]
        rows = pieces(len(noise), self.settings.execution.micro_batch_size)
        parts = [self._tableau.sample(under.at(r), noise[r], generator=generator) for r in rows]
        return torch.cat(parts)

    def _hold_out(self, size: int, generator: torch.Generator) -> Trajectories:
        """Draw noise to judge by, and what should become of it: the last states."""
        return self._trajectories(self.fine, size, generator, alone=True)

    @property
    def _absorbs(self) -> bool:
        """Whether the student is asked with the condition alone."""
        return self.settings.absorb_guidance

    # -- what there is ---------------------------------------------------------------------------

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The averaged denoiser."""
        return self.averaged.module

    def networks(self) -> list[nn.Module]:
        """Return the networks whose calls are counted; the teacher's is one of its own."""
        return [*super().networks(), self.teacher]

    def smaller(self) -> str:
        """See `Agent.smaller`."""
        half = max((self.settings.execution.micro_batch_size or self.settings.batch_size) // 2, 1)
        return f"Take micro_batch_size={half}, the same gradient in more pieces."

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._updates >= self.budget

    @property
    def done(self) -> bool:
        """Whether it is `finished`: learning anew does not begin anew."""
        return self.finished

    @property
    def returned(self) -> str:
        """Which network samples: the "given" one, or a "distilled" one."""
        return DISTILLED if self._best.improved else GIVEN

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why."""
        if "returned" not in self.errors:
            return "Training is not over; nothing was chosen yet."
        what = _NETWORKS[self.returned]
        return f"Returned, as the best on held-out noise: {what}. {self._comparison()}"

    def _comparison(self) -> str:
        return comparison(self.errors)

    # -- learning --------------------------------------------------------------------------------

    @as_executed
    def train_round(self) -> dict[str, Tensor]:
        """Train for a round; compare on held-out noise now and then, and choose at the end."""
        metrics: dict[str, Tensor] = {}
        if self._held_out.chosen is None:
            self._begin()
        before = self.num_timesteps
        metrics |= self._train()
        self.averaged.update()
        # With those of the other processes, which may have done more or less.
        done = torch.tensor(self.num_timesteps - before, device=self.device).double()
        everyone = self.processes.mean({"calls": done})["calls"] * self.processes.count
        self.num_timesteps = before + round(float(everyone))
        self._updates += 1
        interval = max(self.settings.rounds // self.settings.held_out.looks, 1)
        if self._judging and (self.finished or self._updates % interval == 0):
            errors = self._held_out_errors()
            self._best.judge(errors)
            metrics["held_out_error"] = errors.mean()
        if self.finished:
            self._end()
            metrics |= {f"{name}_error": torch.tensor(e) for name, e in self.errors.items()}
            metrics["returned"] = torch.tensor(float(list(_NETWORKS).index(self.returned)))
        return {f"train/{key}": value for key, value in metrics.items()}

    def _begin(self) -> None:
        """Make what is held out; measure the teacher, and the network as it was given."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        size = self.settings.held_out.size
        self._held_out.chosen, self._held_out.reported = (
            self._hold_out(size, generator) for _ in range(2)
        )
        if self.settings.fine.check:
            self.errors["teacher"] = self._judge_teacher()
        self._best.begin(self._held_out_errors())
        self.errors[GIVEN] = self._reported_error()

    def _end(self) -> None:
        """Take the best network."""
        self.errors[DISTILLED] = self._reported_error()
        self._best.finish(self.optimizer)
        self.errors["returned"] = self._reported_error()

    def _judge_teacher(self) -> float:
        """Return the fine solver's error; warn if it is no better than the student at the start."""
        fine, held_out = self.settings.fine, self._held_out.chosen
        assert held_out is not None
        return judge_teacher(
            self.fine,
            self._rival,
            self.mdp.schedule,
            fine.scale,
            self.teacher,
            held_out.states[0],
            fine.integer_times,
            held_out.condition,
            self.settings.execution.micro_batch_size,
        )

    @torch.no_grad()
    def _held_out_errors(self) -> Tensor:
        assert self._held_out.chosen is not None
        return self._errors_of(self.sampling_denoiser, self._held_out.chosen)

    @torch.no_grad()
    def _reported_error(self) -> float:
        assert self._held_out.reported is not None
        return float(self._errors_of(self.sampling_denoiser, self._held_out.reported).mean())

    def _new_fine_solver(self) -> Teacher:
        fine = self.settings.fine
        return make_teacher(
            self._tableau,
            self.mdp.schedule,
            fine.solver,
            fine.options or {},
            fine.scale,
            integer=fine.integer_times,
        )

    def _trajectories(
        self, teacher: Teacher, n: int, generator: torch.Generator, alone: bool = False
    ) -> Trajectories:
        """Draw noise, and take it where a solver takes it with the teacher's network.

        Args:
            teacher: the solver.
            n: how many of each process.
            generator: source of the noise.
            alone: all processes draw the same.
        """
        return draw_trajectories(
            self.mdp,
            teacher,
            self.teacher,
            n,
            generator,
            ALONE if alone else self.processes,
            self.settings.execution.micro_batch_size,
        )

    @property
    def _rate(self) -> float:
        """The learning rate now."""
        optimizer = self.settings.optimizer
        return learning_rate(optimizer.learning_rate, optimizer.lr_schedule, self._share_done)

    @property
    def _share_done(self) -> float:
        """The share of the training that the learning rate falls over."""
        return self._updates / self.budget

    def _descend(self, optimizer: torch.optim.Optimizer, rate: float) -> Tensor:
        """Take a clipped step along the gradient; return the norm before."""
        parameters = optimizer.param_groups[0]["params"]
        self.processes.average_gradients(parameters)
        clip = self.settings.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        return norm

    # -- what a run shows ------------------------------------------------------------------------

    def report(self) -> Report:
        """Return the errors, and how they fell."""
        logged = {
            "loss": "train/loss",
            "error on held-out noise": "train/held_out_error",
        }
        panels = [Panel("distillation", "round", logged=logged, scale="log")]
        results = {"errors": self.errors, "returned": self.returned}
        return Report(self.verdict, results, figures={"distillation.png": panels})

    # -- checkpoints -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what training changed."""
        terms = self.teacher.conditioning
        return {
            "optimizer": self.optimizer.state_dict(),
            **self._best.state(),
            "updates": self._updates,
            "errors": self.errors,
            "held_out": self._held_out.state(),
            "teacher": self.teacher.body.state_dict(),
            "teacher_given": None if terms is None else terms.to_config(),
            "given": None if self._given_terms is None else self._given_terms.to_config(),
            "tableau": self.table_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._best.load_state(state)
        self._updates = counter(state, "updates", "the checkpoint")
        self.errors = dict(state["errors"])
        self._held_out.load_state(state["held_out"], self.device)
        self.teacher.body.load_state_dict(state["teacher"])
        if state["teacher_given"] is not None:
            terms = Conditioning.from_config(state["teacher_given"])
            self.teacher.conditioning = terms.on(self.device)

    @classmethod
    def _remembered(cls, state: Mapping[str, Any], denoiser: Denoiser) -> dict[str, Any]:
        """Return the table that a file's training had; its guidance is given to the denoiser."""
        if state["given"] is not None:
            denoiser.conditioning = Conditioning.from_config(state["given"])
        return super()._remembered(state, denoiser)


def without_guidance(denoiser: Denoiser) -> Denoiser:
    """Return the view that is asked with the condition alone.

    Raises:
        ValueError: there is no guidance.
    """
    if denoiser.conditioning is None or denoiser.conditioning.guidance == 1:
        raise ValueError(
            "absorb_guidance needs a guided network, denoiser.given(guidance=...): this one has no "
            "guidance to absorb."
        )
    view = denoiser.view()
    view.conditioning = replace(denoiser.conditioning, guidance=1.0)
    return view
