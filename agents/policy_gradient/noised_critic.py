"""NoisedCritic: a critic that looks at noised samples with a copy of the denoiser.

    f(x_0) = head(representation(alpha x_0 + sigma eps, t)),    t uniform between two noise levels

A denoiser had to learn what samples look like behind noise, and noise hides the grain that tells
samples from data at once, so such a critic judges shapes where a small new network judges pixels.
DMD2 (Yin et al. 2024) trains its denoiser's encoder so, LADD (Sauer et al. 2024) a frozen one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...common.distributed import Processes
from ...common.precision import in_full_precision
from ..denoisers.denoiser import Denoiser

# Numbers of draws that processes cannot reach: each has random numbers of its own.
_APART = 2**40


class NoRepresentationError(ValueError):
    """The body of a denoiser cannot judge, as it shows nothing of what it sees on the way."""


class NoisedCritic(nn.Module):
    """Critic f(x_0) of noised samples, for `IPMCritic`.

    Its answer is random: noise level and noise of each sample are drawn anew at each call.
    Several processes draw different ones, so here N of them do not do what one does to the bit.

    Args:
        denoiser: what f begins as a copy of; it is left as it is, the copy learns. Its body has a
            method `representation`, called as its `forward` is, that returns maps (N, C, H, W) or
            vectors (N, C): our networks for images and diffusers' U-Nets do. A conditional one that
            waits for its condition makes a conditional critic.
        shape: of one sample.
        levels: least and greatest noise, sigma / alpha. Least noise shows grain, much hides shapes.

    Raises:
        NoRepresentationError: a body without that, a ValueError.
        ValueError: noise levels between which the process has none.
    """

    def __init__(
        self, denoiser: Denoiser, shape: Sequence[int], levels: tuple[float, float] = (0.05, 1.5)
    ) -> None:
        super().__init__()
        if not callable(getattr(denoiser.body, "representation", None)):
            raise NoRepresentationError(
                f"{type(denoiser.body).__name__} has no `representation`, which a denoiser as "
                "critic needs, as our networks for images and diffusers' U-Nets have: take "
                "critic_network='own'."
            )
        self.denoiser = copy.deepcopy(denoiser).requires_grad_(True)
        process = denoiser.process
        # log(alpha / sigma), the largest noise first.
        log_snr = -torch.tensor(levels, dtype=torch.float64).log().flip(0)
        self.high, self.low = process.time_of_log_snr(log_snr).tolist()
        if process.discrete:
            self.high, self.low = float(int(self.high)), float(max(1, -int(-self.low // 1)))
        if self.low > self.high:
            raise ValueError(
                f"{process!r} has no noise level from {levels[0]:g} to {levels[1]:g} sigma / alpha:"
                " take critic levels that are farther apart."
            )
        sample = torch.zeros(1, *shape, device=next(self.denoiser.parameters()).device)
        # Only the shape of the answer counts: some condition will do.
        known = denoiser.conditions
        some = None if known is None else torch.zeros_like(known.none(1, sample.device))
        with torch.no_grad():
            features = self._ask(sample, torch.full((1,), self.low, device=sample.device), some)
        self.head = _head(features).to(sample.device)
        self._seed, self._draws = int(torch.randint(2**31, ())), 0

    @property
    def conditions(self) -> object:
        """Those that it is asked under, None of an unconditional critic."""
        return self.denoiser.conditions if self.denoiser.is_open else None

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return f (N,) for samples (N, *shape), under conditions if it is conditional."""
        generator = self._next_generator(sample.device)
        process, n = self.denoiser.process, len(sample)
        uniform = torch.rand(n, generator=generator, device=sample.device, dtype=torch.float64)
        if process.discrete:  # the whole noisings, each as often
            t = (self.low + (uniform * (self.high - self.low + 1)).floor()).clamp(max=self.high)
        else:
            t = self.low + uniform * (self.high - self.low)
        noise = torch.empty_like(sample).normal_(generator=generator)
        view = self.denoiser if condition is None else self.denoiser.under(condition)
        given = None
        if view.conditioning is not None:
            given = view.conditioning.rows(n, sample.device)
        features = self._ask(process.add_noise(sample, t, noise), t, given)
        return in_full_precision(self.head, features).flatten(1).mean(1)

    def _ask(self, sample: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        question = self.denoiser.parameterisation.question(sample, t)
        given = () if condition is None else (condition,)
        body: Any = self.denoiser.body
        return body.representation(*question, *given)

    def _next_generator(self, device: torch.device) -> torch.Generator:
        """Return the source of the next call's random numbers."""
        self._draws += 1
        number = self._seed + _APART * Processes.current().rank + self._draws
        return torch.Generator(device).manual_seed(number)

    def get_extra_state(self) -> Tensor:
        """Return what decides the next call's random numbers."""
        return torch.tensor([self._seed, self._draws])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore that."""
        self._seed, self._draws = state.tolist()


def _head(features: Tensor) -> nn.Sequential:
    """Return a new head, which says 0, for features like these (N, C) or (N, C, H, W)."""
    channels = features.shape[1]
    if features.ndim == 2:
        layers: list[nn.Module] = [
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
            nn.LeakyReLU(0.2),
            nn.Linear(channels, 1),
        ]
    else:
        layers = [
            nn.GroupNorm(1, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 1, 1),
        ]
    last = layers[-1]
    assert isinstance(last, nn.Linear | nn.Conv2d)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)
