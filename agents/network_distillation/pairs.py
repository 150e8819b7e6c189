"""Pairs of states on one trajectory of the teacher's, at two times: what PD and CD learn from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..denoisers.denoiser import Denoiser
from .agent import NetworkDistillation
from .held_out import Trajectories, pieces


class Pair(NamedTuple):
    """Two states of a path, for each of n samples.

    Attributes:
        start: (n, *shape).
        end: (n, *shape), where the teacher goes from there.
        first: (n,) which of the grid's times the start has.
        last: (n,) which the end has.
    """

    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor


class PairSource(Protocol):
    """What pairs are drawn from."""

    condition: Tensor | None

    def pair(self, first: Tensor, last: Tensor, rows: slice) -> Pair:
        """Return the pairs of some rows (n,) of the batch at these indices of times (n,)."""


class OnTrajectories:
    """Pairs on the teacher's own trajectories: both states are there already.

    Args:
        trajectories: the states at all times of the grid.
    """

    def __init__(self, trajectories: Trajectories) -> None:
        self._states, self.condition = trajectories

    def pair(self, first: Tensor, last: Tensor, rows: slice) -> Pair:
        """See `PairSource`."""
        which = torch.arange(self._states.shape[1], device=first.device)[rows]
        return Pair(self._states[first, which], self._states[last, which], first, last)


class OnData:
    """Pairs that begin with noised data, from where the teacher moves.

    Args:
        clean: (N, *shape) data.
        noise: (N, *shape).
        condition: (N, ...) or None.
        noised: (data, indices of times, noise) -> states.
        move: (states, indices of their times, those of the times to go to, conditions) -> states.
    """

    def __init__(
        self,
        clean: Tensor,
        noise: Tensor,
        condition: Tensor | None,
        noised: Callable[[Tensor, Tensor, Tensor], Tensor],
        move: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self._clean, self._noise, self.condition = clean, noise, condition
        self._noised, self._move = noised, move

    @torch.no_grad()
    def pair(self, first: Tensor, last: Tensor, rows: slice) -> Pair:
        """See `PairSource`."""
        start = self._noised(self._clean[rows], first, self._noise[rows])
        under = None if self.condition is None else self.condition[rows]
        return Pair(start, self._move(start, first, last, under), first, last)


def ddim_step(denoiser: Denoiser, states: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take a DDIM step in data prediction, finite where no signal is left (MATH.md 0.2).

    Args:
        denoiser: the network.
        states: (N, *shape).
        t: (N,) their times.
        s: (N,) the times to go to, below t.
    """
    process = denoiser.process
    clean = denoiser.denoised(states, t)
    alpha, sigma = process.levels_for(states, t)
    alpha_s, sigma_s = process.levels_for(states, s)
    return alpha_s * clean + sigma_s * (states - alpha * clean) / sigma


class PairDistillation(NetworkDistillation):
    """Base of the agents that learn from pairs of states at two times of a grid.

    A round draws a batch of trajectories, and takes as many gradient steps as the grid has first
    times: each step sees every one of the batch at a time of its own, and in a round each pair
    once. On data, each step draws its own.
    """

    @property
    @abstractmethod
    def _times(self) -> Tensor:
        """The grid (T + 1,), descending."""

    @property
    def _gap(self) -> int:
        """How many intervals of the grid lie between the two states of a pair."""
        return 1

    @abstractmethod
    def _trajectories_on_grid(self) -> Trajectories:
        """Draw a batch of the teacher's trajectories, with all states of the grid."""

    @abstractmethod
    def _move(
        self, states: Tensor, first: Tensor, last: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Take noised data (n, *shape) from times of the grid to later ones, by the teacher."""

    @abstractmethod
    def losses(self, student: Denoiser, pair: Pair) -> Tensor:
        """Return the loss (n,) of each pair, with its gradient by the student's weights."""

    def _train(self) -> dict[str, Tensor]:
        """Take one gradient step for each first time of the grid."""
        size, count, times = self.settings.batch_size, self.processes.count, len(self._times) - 1
        of_data = getattr(self.settings, "states", "teacher") == "data"
        source: PairSource | None = (
            None if of_data else OnTrajectories(self._trajectories_on_grid())
        )
        # Each trajectory's first times in an order of its own.
        drawn = torch.rand(times, size * count, generator=self.generator, device=self.device)
        losses, norms = [], []
        for first in self.processes.share(drawn.argsort(0), dim=1):
            pairs = self._on_data() if source is None else source
            last = (first + self._gap).clamp(max=times)
            student = self.denoiser.under(pairs.condition)
            self.optimizer.zero_grad()
            loss = torch.zeros((), device=self.device)
            for rows in pieces(size, self.settings.execution.micro_batch_size):
                pair = pairs.pair(first[rows], last[rows], rows)
                part = self.losses(student.at(rows), pair).sum() / size
                part.backward()
                loss += part.detach()
            norms.append(self._descend(self.optimizer, self._rate))
            losses.append(loss)
        return {"loss": torch.stack(losses).mean(), "grad_norm": torch.stack(norms).mean()}

    def _on_data(self) -> PairSource:
        """Draw data and noise for all processes, and keep this one's share."""
        everyone = self.settings.batch_size * self.processes.count
        clean, given = self.mdp.target.draw(everyone, self.generator, self.mdp.kind)
        noise = torch.empty_like(clean).normal_(generator=self.generator)
        share = self.processes.share
        condition = None if given is None else share(given)

        def noised(clean: Tensor, first: Tensor, noise: Tensor) -> Tensor:
            return self.mdp.process.add_noise(clean, self._at(first), noise)

        return OnData(share(clean), share(noise), condition, noised, self._move)

    def _at(self, index: Tensor) -> Tensor:
        """Return the grid's times (n,) at these indices."""
        return self._times.to(self.device)[index]

    def _levels(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at the grid's times, float64 that broadcasts against samples."""
        process, times = self.mdp.process, self._at(index)
        return column(process.alpha(times), like), column(process.sigma(times), like)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Return values (n,) so that they broadcast against samples (n, *shape), of their own type."""
    return values.view(-1, *[1] * (like.ndim - 1))
