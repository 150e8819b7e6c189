"""A table of its own for each episode, as a policy of `DiffusionMDP.rollout`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...denoisers.denoiser import Denoiser
from ...samplers.table_chain import TableChain
from ...samplers.tableau import Tableau
from ..joint.family import Numbers


class ManyTables(TableChain):
    """A table of its own for each of N episodes: p, W and the times told differ, the rest is one's.

    Args:
        denoiser: the network.
        table: what they share; its full lower rows are read.
        numbers: (N, ...) of the tables.
        moves: whether the network is told other times.
    """

    def __init__(self, denoiser: Denoiser, table: Tableau, numbers: Numbers, moves: bool) -> None:
        # Rows read what any of the tables reads: all outputs so far.
        full = np.tril(np.ones((table.steps, table.steps)))
        super().__init__(denoiser, table.replace(weights=full))
        device = next(denoiser.parameters()).device
        self._times = self._times_of(numbers).to(device, torch.float32) if moves else None
        self._scale, self._weights, self._current = (
            part.to(device, torch.float32)
            for part in (numbers.scale, numbers.weights, numbers.current)
        )

    def _times_of(self, numbers: Numbers) -> Tensor:
        """Return the times (N, K) that the network is told."""
        process = self.tableau.process
        ends = [float(-process.log_snr(t)) for t in (process.t_min, process.t_max)]
        times = process.time_of_log_snr(-numbers.asked.clamp(*ends))
        # The first call is told the time of the noise, which is everyone's.
        times[:, 0] = float(self.tableau.evaluation_times[0])
        return times

    def _answer(self, denoiser: Denoiser, sample: Tensor, step: int) -> Tensor:
        if self._times is None or not self.tableau.row(step).asked:
            return super()._answer(denoiser, sample, step)
        return self.tableau.output_at(denoiser, sample, self._times[:, step])

    def _moved(self, step: int) -> Tensor:
        states, row = self._states, self.tableau.row(step)
        shape = (-1, *[1] * (states[step].ndim - 1))
        moved = self._scale[:, step].view(shape) * states[row.anchor]
        if bool((self._current[:, step] != 0).any()):
            moved = torch.addcmul(moved, self._current[:, step].view(shape), states[step])
        for k, output in self._outputs.items():
            moved = torch.addcmul(moved, self._weights[:, step, k].view(shape), output)
        return moved
