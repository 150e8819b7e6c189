"""SFD: the network follows its fine solver's path, step by step (MATH.md 6.1).

Zhou et al. (2024), "Simple and Fast Distillation of Diffusion Models". From each noise the teacher
leaves its states y_1 .. y_K at the student's times, once. The student takes its own steps,

    z_{j+1} = p_j z_{a(j)} + q_j z_j + sum_{k<j} W_jk O_k + W_jj O_theta(z_j, t_j)

and after each one moves theta to bring z_{j+1} closer to y_{j+1}. Then z_{j+1} is detached: one
call's graph is alive at a time, so memory does not grow with K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..samplers.tableau import Tableau
from .agent import NetworkDistillation
from .held_out import pieces
from .settings import SFDSettings


class SFD(NetworkDistillation):
    """Train the network to follow its own fine solver in few steps (Zhou et al. 2024).

    A round draws a batch of noise, takes it where the teacher takes it, and then takes one gradient
    step after each step of the student. It needs no data. The student samples with any
    deterministic table: a solver's, with or without AFS, or a learned one, `tableau=...`.

    Args:
        env: the environment; its schedule is the student's unless a table is given.
        denoiser: the network, trained in place.
        settings: see `SFDSettings`.
        tableau: a finished table, such as `SolverLearning` or `DODE` leave.
        arguments: single settings by name, and `Agent`'s remaining arguments.

    Raises:
        ValueError: see `NetworkDistillation`; two different tables are given; or no step of the
            student asks the network.
    """

    name = "sfd"
    takes_tableau = True

    settings: SFDSettings
    Settings = SFDSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        settings: SFDSettings | None = None,
        *,
        tableau: Tableau | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(env, denoiser, settings, tableau=tableau, **arguments)

    def _train(self) -> dict[str, Tensor]:
        """Take the student's steps, with a gradient step after each."""
        size = self.settings.batch_size
        goals, condition = self._trajectories(self.fine, size, self.generator)
        student, table = self.denoiser.under(condition), self._tableau
        states: dict[int, Tensor] = {0: goals[0]}
        outputs: dict[int, Tensor] = {}
        losses, norms = [], []
        for j in range(table.steps):
            self.optimizer.zero_grad()
            loss = goals.new_zeros(())
            moved, answers = [], []
            for rows in pieces(size, self.settings.execution.micro_batch_size):
                before = {i: state[rows] for i, state in states.items()}
                answer = table.evaluate(student.at(rows), before[j], j)
                asked = {k: output[rows] for k, output in outputs.items()} | {j: answer}
                after = table.advance(j, before, asked)
                part = self.distance(after, goals[j + 1][rows]).sum() / size
                if part.requires_grad:
                    part.backward()
                loss += part.detach()
                moved.append(after.detach())
                answers.append(answer.detach())
            if table.row(j).asked:
                norms.append(self._descend(self.optimizer, self._rate))
            losses.append(loss)
            states[j + 1], outputs[j] = torch.cat(moved), torch.cat(answers)
            for kept, unread in zip((states, outputs), table.unread, strict=True):
                for index in unread[j]:
                    kept.pop(index)
        return {"loss": torch.stack(losses).mean(), "grad_norm": torch.stack(norms).mean()}

    def distance(self, states: Tensor, goal: Tensor) -> Tensor:
        """Return the distances (N,) of states (N, *shape) from the teacher's, per coordinate."""
        missed = (states - goal).flatten(1)
        return missed.abs().mean(1) if self.settings.distance == "l1" else missed.square().mean(1)
