"""The real distributions that samplers are to match.

A ``Target`` holds the training samples on one device and can give *fresh* real samples, which an
evaluation needs: a sampler must not be scored against the very points it was trained on. Toys draw
fresh points from their generator with another seed, data sets keep a fixed held-out split.
``make_target(name)`` builds the known ones; ``Target.from_samples`` and ``Target.from_sampler`` are
for your own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .names import unknown_name

Sampler = Callable[[int, int], Any]
"""``(n, seed) -> (n, *shape)`` array or tensor; the same seed gives the same points."""

TOY_SAMPLES = 10_000
TRAINING_SEED = 0


class Target:
    """A real distribution: training samples and a source of fresh ones.

    Args:
        name: What to call it in logs.
        samples: Training samples ``(N, *shape)``, finite; stored as float32.
        held_out: Fixed fresh samples ``(M, *shape)``.
        sampler: Unlimited fresh samples; used in place of ``held_out``.

    Attributes:
        name: The same.
        samples: The training samples, ``(N, *shape)`` float32 on ``device``.

    Raises:
        ValueError: Samples are empty, not finite, or not of one shape.
    """

    def __init__(
        self, name: str, samples: Any, *, held_out: Any = None, sampler: Sampler | None = None
    ) -> None:
        self.name = name
        self.samples = _to_samples(samples, f"samples of {name}")
        self._held_out = None
        if held_out is not None:
            self._held_out = _to_samples(held_out, f"held-out samples of {name}")
            if self._held_out.shape[1:] != self.shape:
                raise ValueError(
                    f"held-out samples of {name} have shape {tuple(self._held_out.shape[1:])}, "
                    f"its training samples {tuple(self.shape)}"
                )
        self._sampler = sampler

    @classmethod
    def from_samples(cls, samples: Any, name: str = "custom", *, held_out: Any = None) -> Target:
        """Wrap your own samples ``(N, *shape)``, with a held-out split if you have one."""
        return cls(name, samples, held_out=held_out)

    @classmethod
    def from_sampler(cls, sampler: Sampler, name: str = "custom", n: int = TOY_SAMPLES) -> Target:
        """Wrap your own generator ``(n, seed) -> (n, *shape)``; trains on ``n`` of seed 0."""
        return cls(name, sampler(n, TRAINING_SEED), sampler=sampler)

    @property
    def shape(self) -> torch.Size:
        """Shape of one sample, ``(D,)`` or ``(C, H, W)``."""
        return self.samples.shape[1:]

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self.samples.device

    @property
    def fresh_limit(self) -> int | None:
        """How many fresh samples there are; None for a generator, which never runs out."""
        if self._sampler is not None:
            return None
        return 0 if self._held_out is None else len(self._held_out)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, *shape)`` training samples, with replacement."""
        source = self.device if generator is None else generator.device
        rows = torch.randint(len(self.samples), (n,), generator=generator, device=source)
        return self.samples[rows.to(self.device)]

    def sample_fresh(self, n: int, seed: int = 0) -> Tensor:
        """Draw ``(n, *shape)`` real samples that are not among the training samples.

        Args:
            n: How many; at most ``fresh_limit``.
            seed: 0 to 2**32 - 2. A generator gives other points for every seed, a held-out split a
                seeded choice without replacement.

        Raises:
            ValueError: ``n`` exceeds ``fresh_limit``, or the seed is out of range.
        """
        if not 0 <= seed < 2**32 - 1:
            raise ValueError(f"seed must be 0 to 2**32 - 2; got {seed}")
        if self._sampler is not None:
            # Shifted by one so that no seed is the training seed.
            fresh = _to_samples(self._sampler(n, TRAINING_SEED + 1 + seed), "fresh samples")
            return fresh.to(self.device)
        if self._held_out is None or n > len(self._held_out):
            raise ValueError(
                f"{self.name} has {self.fresh_limit} fresh samples, {n} were asked for"
            )
        rows = torch.randperm(len(self._held_out), generator=torch.Generator().manual_seed(seed))
        return self._held_out[rows[:n].to(self.device)]

    def to(self, device: torch.device | str) -> Target:
        """The same target with its samples on ``device``."""
        held_out = None if self._held_out is None else self._held_out.to(device)
        return Target(self.name, self.samples.to(device), held_out=held_out, sampler=self._sampler)

    def __repr__(self) -> str:
        return f"Target({self.name!r}, {len(self.samples)} samples of {tuple(self.shape)})"


def make_target(
    name: str, *, device: torch.device | str = "cpu", data_dir: str | Path | None = None
) -> Target:
    """Build a known target: ``SwissRoll``, ``Moons``, ``GaussianCluster`` or ``Digits``.

    Args:
        name: Which one.
        device: Where its samples shall live.
        data_dir: Folder of the data files, for targets that need one.

    Raises:
        ValueError: The name is unknown.
        FileNotFoundError: ``data_dir`` is given and is not a folder.
    """
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist")
    return TARGETS[name]().to(device)


# scikit-learn takes a second to import, so only those who need it pay.


def _swiss_roll(n: int, seed: int) -> np.ndarray:
    """The toy of SFT-PG (MATH.md S.8): coordinates 0 and 2 of the 3-D roll, divided by 20."""
    from sklearn.datasets import make_swiss_roll

    points, _ = make_swiss_roll(n, noise=0.05, random_state=seed)
    return points[:, [0, 2]] / 20


def _moons(n: int, seed: int) -> np.ndarray:
    """Two half circles, moved to the origin and divided by 1.5: about ``[-1, 1] x [-0.5, 0.5]``."""
    from sklearn.datasets import make_moons

    points, _ = make_moons(n, noise=0.05, random_state=seed)
    return (points - (0.5, 0.25)) / 1.5


def _gaussian_cluster(n: int, seed: int) -> np.ndarray:
    """A single narrow cluster, ``N((0.5, 0.5), 0.01^2 I)``."""
    return np.random.default_rng(seed).normal(0.5, 0.01, (n, 2))


def _digits() -> Target:
    """scikit-learn's 1,797 digits, 8 x 8 in [-1, 1]; 1,297 to train on and 500 held out."""
    from sklearn.datasets import load_digits

    images = load_digits().images[:, None] / 8 - 1
    order = np.random.default_rng(TRAINING_SEED).permutation(len(images))
    return Target("Digits", images[order[:-500]], held_out=images[order[-500:]])


TARGETS: dict[str, Callable[[], Target]] = {
    "SwissRoll": lambda: Target.from_sampler(_swiss_roll, "SwissRoll"),
    "Moons": lambda: Target.from_sampler(_moons, "Moons"),
    "GaussianCluster": lambda: Target.from_sampler(_gaussian_cluster, "GaussianCluster"),
    "Digits": _digits,
}


def _to_samples(values: Any, what: str) -> Tensor:
    samples = torch.as_tensor(values).detach().to(torch.float32)
    if samples.ndim < 2 or not samples.numel():
        raise ValueError(
            f"{what} must be a non-empty (N, *shape) array; got {tuple(samples.shape)}"
        )
    if not bool(samples.isfinite().all()):
        raise ValueError(f"{what} hold NaN or infinity")
    return samples
