"""GammaSums: Gamma_n = E ||epsilon_theta(x_n, n)||^2 / d of every noising, a running mean each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...envs import DiffusionMDP
from ..denoisers.denoiser import Denoiser
from ..selection import is_better
from .held_out import Noised
from .learner import GIVEN, LEARNED, VarianceLearner
from .settings import VarianceSettings


class GammaSums(VarianceLearner):
    """The sums behind Gamma, to which each batch adds samples of the noisings in turn.

    What is known is used at any time, with DDPM's variance for noisings not met yet. When all
    samples were met it has to be better than the Gamma that the denoiser had, or DDPM's variance.
    """

    learned = "Gamma"

    def __init__(
        self, mdp: DiffusionMDP, denoiser: Denoiser, settings: VarianceSettings, seed: int
    ) -> None:
        super().__init__(mdp, denoiser, settings)
        process, betas = mdp.process, mdp.process.betas
        if betas is None:
            raise ValueError(
                f"kind 'gamma' has one number a noising of a DiscreteVP, and this is {process!r}; "
                "'sn' and 'npr' learn on any process that keeps some signal at its last time."
            )
        levels = torch.arange(len(betas), dtype=torch.float64) + 1
        alpha, sigma = process.alpha(levels), process.sigma(levels)
        # Gamma of Gaussian data of the same size: how much ||epsilon||^2 and ||eps||^2, of which
        # the mean is known, vary together.
        gaussian = sigma**2 / ((alpha * denoiser.sigma_data) ** 2 + sigma**2)
        self._control = gaussian**2
        had = denoiser.gamma
        known = had is not None and len(had) == len(levels)
        self._given = had.clone() if known and had is not None else torch.ones_like(levels)
        self._sums = torch.zeros_like(levels)
        self._counts = torch.zeros_like(levels)
        denoiser.gamma = self._estimate()

    @property
    def rounds(self) -> int:
        """The rounds that all samples of all noisings take."""
        samples = len(self._counts) * self.settings.samples_per_time
        return -(-samples // self.settings.batch_size)

    @property
    def complete(self) -> bool:
        """Whether every noising has had its samples."""
        return int(self._counts.min()) >= self.settings.samples_per_time

    def learn(
        self,
        clean: Tensor,
        noise: Tensor,
        generator: torch.Generator,
        progress: float,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Add a batch to the sums."""
        first = int(self._counts.sum())
        index = torch.arange(first, first + len(clean)) % len(self._counts)
        t = (index + 1).to(clean.device)
        noisy = self.mdp.process.add_noise(clean, t, noise)
        values = self._values(noisy, t, noise, condition)
        self._sums.index_add_(0, index, values)
        self._counts.index_add_(0, index, torch.ones_like(values))
        self.denoiser.gamma = gamma = self._estimate()
        self.returned = LEARNED
        known = self._counts > 0
        return {"train/gamma": gamma[known].mean(), "train/samples_per_time": self._counts.min()}

    @property
    def held_out(self) -> int:
        """A sample of each noising, and no fewer than 256."""
        return max(len(self._counts), 256)

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Return the noisings in turn."""
        return (torch.arange(n) % len(self._counts) + 1).to(self.mdp.device)

    @torch.no_grad()
    def losses(self, samples: Noised) -> dict[str, Tensor]:
        """See `VarianceLearner.losses`."""
        value = self._values(*samples)
        index = samples.t.cpu() - 1
        learned, given = self._estimate()[index], self._given[index]
        answers = {
            GIVEN: given,
            LEARNED: learned,
            "returned": given if self.returned == GIVEN else learned,
        }
        return {name: (value - answer).square() for name, answer in answers.items()}

    def choose(self, losses: dict[str, Tensor]) -> None:
        """Keep what was learned if it is better than what was given."""
        self.returned = LEARNED if is_better(losses[LEARNED], losses[GIVEN]) else GIVEN
        self._hand_over()

    def state(self) -> dict[str, Any]:
        """Return the sums, and what was given."""
        values = {"sums": self._sums, "counts": self._counts, "given": self._given}
        return {name: value.tolist() for name, value in values.items()}

    def load_state(self, state: dict[str, Any], returned: str) -> None:
        """Restore what `state` returned."""
        for mine, name in ((self._sums, "sums"), (self._counts, "counts"), (self._given, "given")):
            mine.copy_(torch.tensor(state[name], dtype=torch.float64))
        self.returned = returned
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the denoiser what is returned: before the first batch what the sums say, ones."""
        keeps = self.returned == GIVEN and bool(self._counts.any())
        self.denoiser.gamma = self._given.clone() if keeps else self._estimate()

    @torch.no_grad()
    def _values(
        self, noisy: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Return what each sample says of Gamma at its noising, (N,) float64 on the CPU."""
        epsilon = self.denoiser.under(condition).epsilon(noisy, t)
        predicted, drawn = (
            value.flatten(1).square().mean(1).cpu().double() for value in (epsilon, noise)
        )
        return predicted - self._control[t.cpu() - 1] * (drawn - 1)

    def _estimate(self) -> Tensor:
        """Return Gamma as the sums say; 1, which adds no variance, where they are empty."""
        means = (self._sums / self._counts.clamp_min(1)).clamp_min(0)
        return torch.where(self._counts > 0, means, torch.ones_like(means))
