"""TableChain: any table as a policy of `DiffusionMDP.rollout`, its past as its memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...common.arguments import checked
from ...envs.mdp import Draw, Observation
from ..denoisers.denoiser import Denoiser
from .tableau import Tableau


class TableChain(nn.Module):
    """A table that acts step by step; its past states and outputs are its memory.

    Unlike a `GaussianChain` it has no density, so it may be deterministic, and its steps may read
    what came before.

    Args:
        denoiser: the network theta.
        tableau: the sampler.
        micro_batch_size: most samples that the network sees at once when it acts without gradients;
            None shows it all of them.
        checkpointing: recompute a step's activations in the backward pass through `act`, instead of
            keeping them.

    Raises:
        ValueError: a denoiser of another noise process than the tableau's, or noise whose standard
            deviation depends on the state.
    """

    @checked
    def __init__(
        self,
        denoiser: Denoiser,
        tableau: Tableau,
        micro_batch_size: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        tableau.check_process(denoiser)
        if tableau.covariance is not None and tableau.covariance.any():
            raise ValueError(
                f"'{tableau.name}' has steps whose noise depends on the state; here it has to be "
                "of a fixed standard deviation, or none."
            )
        self.micro_batch_size, self.checkpointing = micro_batch_size, checkpointing
        self.denoiser, self.tableau, self.steps = denoiser, tableau, tableau.steps
        # Noise comes from the rollout's own source.
        self._mean = tableau.replace(noise=np.zeros(tableau.steps))
        self._states: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that training changes: not those of a second head."""
        head = self.denoiser.head
        left_out = set() if head is None else set(head.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in left_out]

    def act(self, observation: Observation, step: int, draw: Draw) -> Tensor:
        """Return the next samples (N, *shape); see `fewstep.envs.mdp.Policy`."""
        # One that reads its own state alone may begin anywhere.
        if step == 0 or self.tableau.one_step:
            self._states, self._outputs = {}, {}
        sample, denoiser = observation["sample"], self.denoiser.under(observation.get("condition"))
        self._states[step] = sample
        self._outputs[step] = self._output(denoiser, sample, step)
        action = self._moved(step)
        if self.tableau.row(step).noise:
            action = torch.add(action, draw(sample), alpha=self.tableau.row(step).noise)
        for memory, unread in zip((self._states, self._outputs), self.tableau.unread, strict=True):
            for index in unread[step]:
                memory.pop(index, None)
        return action

    def _output(self, denoiser: Denoiser, sample: Tensor, step: int) -> Tensor:
        """Ask the network, within the bounds of memory."""
        if torch.is_grad_enabled():
            if self.checkpointing:
                return checkpoint(self._answer, denoiser, sample, step, use_reentrant=False)
            return self._answer(denoiser, sample, step)
        size = self.micro_batch_size or len(sample)
        rows = [slice(first, first + size) for first in range(0, len(sample), size)]
        answers = [self._answer(denoiser.at(part), sample[part], step) for part in rows]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _answer(self, denoiser: Denoiser, sample: Tensor, step: int) -> Tensor:
        return self.tableau.evaluate(denoiser, sample, step)

    def _moved(self, step: int) -> Tensor:
        """Return the next state without noise."""
        return self._mean.advance(step, self._states, self._outputs)
