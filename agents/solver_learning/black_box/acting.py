"""Tables as policies of `DiffusionMDP.rollout`: one for all episodes, or one for each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ....envs.mdp import Draw, Observation
from ...denoisers.denoiser import Denoiser
from ...samplers.tableau import Tableau
from ..joint.family import Numbers


class TablePolicy:
    """A table that acts step by step; its past states and outputs are its memory.

    Args:
        table: the sampler, whose noise does not depend on the state.
        denoiser: the network.
    """

    def __init__(self, table: Tableau, denoiser: Denoiser) -> None:
        self.table, self.denoiser = table, denoiser
        # Noise comes from the rollout's own source.
        self._mean = table.replace(noise=np.zeros(table.steps))
        self._states: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}

    def act(self, observation: Observation, step: int, draw: Draw) -> Tensor:
        """Return the next samples (N, *shape); see `fewstep.envs.mdp.Policy`."""
        if step == 0:
            self._states, self._outputs = {}, {}
        sample, denoiser = observation["sample"], self.denoiser.under(observation.get("condition"))
        self._states[step] = sample
        self._outputs[step] = self._answer(denoiser, sample, step)
        action = self._moved(step)
        if self.table.row(step).noise:
            action = torch.add(action, draw(sample), alpha=self.table.row(step).noise)
        for memory, unread in zip((self._states, self._outputs), self.table.unread, strict=True):
            for index in unread[step]:
                del memory[index]
        return action

    def _answer(self, denoiser: Denoiser, sample: Tensor, step: int) -> Tensor:
        return self.table.evaluate(denoiser, sample, step)

    def _moved(self, step: int) -> Tensor:
        """Return the next state without noise."""
        return self._mean.advance(step, self._states, self._outputs)


class ManyTables(TablePolicy):
    """A table of its own for each of N episodes: p, W and the times told differ, the rest is one's.

    Args:
        table: what they share; its full lower rows are read.
        denoiser: the network.
        numbers: (N, ...) of the tables.
        moves: whether the network is told other times.
    """

    def __init__(self, table: Tableau, denoiser: Denoiser, numbers: Numbers, moves: bool) -> None:
        # Rows read what any of the tables reads: all outputs so far.
        full = np.tril(np.ones((table.steps, table.steps)))
        super().__init__(table.replace(weights=full), denoiser)
        device = next(denoiser.parameters()).device
        self._times = self._times_of(numbers).to(device, torch.float32) if moves else None
        self._scale, self._weights, self._current = (
            part.to(device, torch.float32)
            for part in (numbers.scale, numbers.weights, numbers.current)
        )

    def _times_of(self, numbers: Numbers) -> Tensor:
        """Return the times (N, K) that the network is told."""
        process = self.table.process
        ends = [float(-process.log_snr(t)) for t in (process.t_min, process.t_max)]
        times = process.time_of_log_snr(-numbers.asked.clamp(*ends))
        # The first call is told the time of the noise, which is everyone's.
        times[:, 0] = float(self.table.evaluation_times[0])
        return times

    def _answer(self, denoiser: Denoiser, sample: Tensor, step: int) -> Tensor:
        if self._times is None or not self.table.row(step).asked:
            return super()._answer(denoiser, sample, step)
        return self.table.output_at(denoiser, sample, self._times[:, step])

    def _moved(self, step: int) -> Tensor:
        states, row = self._states, self.table.row(step)
        shape = (-1, *[1] * (states[step].ndim - 1))
        moved = self._scale[:, step].view(shape) * states[row.anchor]
        if bool((self._current[:, step] != 0).any()):
            moved = torch.addcmul(moved, self._current[:, step].view(shape), states[step])
        for k, output in self._outputs.items():
            moved = torch.addcmul(moved, self._weights[:, step, k].view(shape), output)
        return moved
