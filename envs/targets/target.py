"""The real distribution that samplers are to match.

A `Target` holds the training samples on one device and draws *fresh* real samples. An evaluation
needs them, because a sampler must not be scored against the points it was trained on. A generator
draws fresh points with another seed, a data set keeps a fixed held-out split. Images stay bytes, a
quarter of float32's memory, and become numbers in [-1, 1] when they are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import check_value, checked
from ...common.conditions import Kind
from ...common.shapes import is_image
from ...critics.metrics.manifold import Manifold
from .conditions import (
    Known,
    known_captions,
    known_classes,
    known_embeddings,
    rows_of,
    to_labels,
)
from .storage import to_float, to_stored

Sampler = Callable[[int, int], Any]
"""`(n, seed) -> (n, *shape)` array or tensor; the same seed gives the same points."""

# Name of a target without samples.
NO_DATA = "no data"

TOY_SAMPLES = 10_000
TRAINING_SEED = 0

# Bytes counted at once for the standard deviation of a set of images, or hashed at once.
_CHUNK = 2**24
# Numbers of a generated set that its fingerprint holds, evenly spread, and how closely they agree.
_REMEMBERED, _TOLERANCE = 64, 1e-4


class Target:
    """A real distribution: training samples and a source of fresh ones.

    Samples are float32, or images as bytes: arrays `(N, C, H, W)` of dtype uint8 are kept as they
    are, and whatever hands samples out gives `byte / 127.5 - 1`, float32 in [-1, 1]. Floats are
    copied, so that nobody else can change them; bytes are not, for there may be gigabytes.

    Args:
        name: What to call it in logs.
        samples: Training samples `(N, *shape)`, finite; bytes or stored as float32.
        held_out: Fixed fresh samples `(M, *shape)`, bytes if the training samples are.
        sampler: Unlimited fresh samples; used in place of `held_out`.
        labels: Classes of the training samples, `(N,)` integers.
        held_out_labels: Classes of the held-out samples, `(M,)` integers.
        captions: Texts of the training samples, `N` of them.
        held_out_captions: Texts of the held-out samples.
        embeddings: Vectors of the training samples, `(N, size)` numbers, of whatever network.
        held_out_embeddings: Vectors of the held-out samples, `(M, size)`.
        flip: Let `sample` mirror each image it draws left to right with probability 1/2.
        manifold: The curve that samples `(D,)` lie on, for an evaluation to say how many do not.

    Attributes:
        name: The same.
        labels: `(N,)` int64 on `device`, or None.
        held_out_labels: `(M,)` int64 on `device`, or None.
        flip: The same.
        manifold: The same, or None.
        has_samples: False if it is one of `without_samples`.

    Raises:
        ValueError: Samples are empty, not finite, or not of one shape; only one of the two sets is
            bytes; labels, captions or embeddings do not fit their samples, or are those of held-out
            samples alone; or `flip` with samples that are no images.
        TypeError: Labels are not integers, captions not texts, or a value is of another type.
    """

    def __init__(
        self,
        name: str,
        samples: Any,
        *,
        held_out: Any = None,
        sampler: Sampler | None = None,
        labels: Any = None,
        held_out_labels: Any = None,
        captions: Sequence[str] | None = None,
        held_out_captions: Sequence[str] | None = None,
        embeddings: Any = None,
        held_out_embeddings: Any = None,
        flip: bool = False,
        manifold: Manifold | None = None,
    ) -> None:
        # Samples and what goes with them are checked as they are stored.
        check_value("name", name, str)
        check_value("sampler", sampler, Sampler | None)
        check_value("flip", flip, bool)
        check_value("manifold", manifold, Manifold | None)
        self.name = name
        self.manifold = manifold
        self.has_samples = True
        self._training = to_stored(samples, f"samples of {name}", own=True)
        self._held_out = None
        if held_out is not None:
            self._held_out = to_stored(held_out, f"held-out samples of {name}", own=True)
            if self._held_out.shape[1:] != self.shape:
                raise ValueError(
                    f"held-out samples of {name} have shape {tuple(self._held_out.shape[1:])}, "
                    f"its training samples {tuple(self.shape)}"
                )
            if self._held_out.dtype != self._training.dtype:
                raise ValueError(
                    f"held-out samples of {name} are {self._held_out.dtype}, its training samples "
                    f"{self._training.dtype}; give both as bytes or neither"
                )
        self._sampler = sampler
        self.labels = to_labels(labels, self._training, f"labels of {name}")
        self.held_out_labels = to_labels(
            held_out_labels, self._held_out, f"held-out labels of {name}"
        )
        self._known: dict[Kind, Known] = {}
        counts = len(self), 0 if self._held_out is None else len(self._held_out)
        for what, training, other in (
            ("captions", captions, held_out_captions),
            ("embeddings", embeddings, held_out_embeddings),
        ):
            if training is None and other is not None:
                raise ValueError(f"{name} has held-out {what}, and its training samples have none")
        if captions is not None:
            given = known_captions(captions, held_out_captions, counts, name)
            self._known["captions"] = given.to(self.device)
        if embeddings is not None:
            given = known_embeddings(embeddings, held_out_embeddings, counts, name)
            self._known["embeddings"] = given.to(self.device)
        if flip and not is_image(self.shape):
            raise ValueError(
                f"flip is for images (C, H, W); samples of {name} have shape {tuple(self.shape)}"
            )
        self.flip = flip

    @classmethod
    def from_samples(cls, samples: Any, name: str = "custom", *, held_out: Any = None) -> Target:
        """Wrap your own samples `(N, *shape)`, with a held-out split if you have one."""
        return cls(name, samples, held_out=held_out)

    @classmethod
    @checked
    def from_sampler(
        cls,
        sampler: Sampler,
        name: str = "custom",
        n: int = TOY_SAMPLES,
        *,
        manifold: Manifold | None = None,
    ) -> Target:
        """Wrap your own generator `(n, seed) -> (n, *shape)`; trains on `n` of seed 0."""
        return cls(name, sampler(n, TRAINING_SEED), sampler=sampler, manifold=manifold)

    @classmethod
    def without_samples(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> Target:
        """Return a target for learners that need noise, but no data: it only has a shape.

        Args:
            shape: Of the samples that there would be.
            device: Where they would live.
        """
        target = cls(NO_DATA, torch.zeros(1, *shape, device=device))
        target.has_samples = False
        return target

    @property
    def samples(self) -> Tensor:
        """The whole training set, `(N, *shape)` float32 on `device`.

        A copy at each access, for a target never changes: of a large set use `take`, `subset`
        or `sample`.
        """
        return self.take(len(self))

    @property
    def shape(self) -> torch.Size:
        """Shape of one sample: `(D,)`, `(C, H, W)`, or any other."""
        return self._training.shape[1:]

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self._training.device

    @property
    def fresh_limit(self) -> int | None:
        """How many fresh samples there are; None for a generator, which never runs out."""
        if self._sampler is not None:
            return None
        return 0 if self._held_out is None else len(self._held_out)

    @cached_property
    def std(self) -> float:
        """Standard deviation of all numbers of the training samples; exact for bytes."""
        if self._training.dtype != torch.uint8:
            return float(self._training.std())
        flat = self._training.flatten()
        counts = torch.zeros(256, dtype=torch.int64, device=self.device)
        for part in flat.split(_CHUNK):
            counts += torch.bincount(part, minlength=256)
        share = counts.cpu().double() / flat.numel()
        level = torch.arange(256, dtype=torch.float64) / 127.5 - 1
        variance = share @ (level - share @ level).square()
        return float((variance * flat.numel() / max(flat.numel() - 1, 1)).sqrt())

    @cached_property
    def fingerprint(self) -> str | list[float]:
        """What tells its training samples from another target's: a hash, or some of the numbers.

        The samples of a generator (`from_sampler`) may differ in their last bits from one
        processor to the next: of them it is 64 numbers, evenly spread; else the SHA-256 of samples
        and labels, captions or embeddings. It is computed when it is first asked for, at some
        0.5 GB a second.
        """
        if self._sampler is not None:
            flat = self._training.flatten()
            return flat[:: max(len(flat) // _REMEMBERED, 1)][:_REMEMBERED].tolist()
        digest = hashlib.sha256()
        others = (known.training for kind, known in self._known.items() if kind != "classes")
        for part in (self._training, self.labels, *others):
            if part is None:
                continue
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            rows = max(_CHUNK // (part[0].numel() * part.element_size()), 1)
            for piece in part.split(rows):
                digest.update(piece.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def matches(self, fingerprint: str | list[float]) -> bool:
        """Whether its training samples are those that a `fingerprint` was taken of."""
        own = self.fingerprint
        if isinstance(own, str) or not isinstance(fingerprint, list):
            return own == fingerprint
        close = _TOLERANCE * max(self.max_abs, 1.0)
        return len(own) == len(fingerprint) and all(
            isinstance(b, float) and abs(a - b) <= close
            for a, b in zip(own, fingerprint, strict=True)
        )

    @property
    def max_abs(self) -> float:
        """The largest absolute value in the training samples; for bytes 1, their bound."""
        if self._training.dtype == torch.uint8:
            return 1.0
        return float(self._training.abs().max())

    def take(self, n: int) -> Tensor:
        """The first `n` training samples, or all if there are fewer: `(min(n, N), *shape)`.

        Raises:
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0; got {n}")
        return to_float(self._training[:n]).clone()

    def subset(self, n: int, seed: int = 0) -> Tensor:
        """A seeded choice of `n` training samples without replacement; all if there are no more.

        Raises:
            ValueError: `n` is negative.
        """
        return self.samples if n >= len(self) else to_float(self._training[self._rows(n, seed)])

    def subset_conditions(self, n: int, seed: int = 0, kind: Kind = "classes") -> Tensor:
        """The conditions `(n, ...)` of the samples that `subset` chooses.

        Raises:
            ValueError: As `subset`, or its samples have no such conditions.
        """
        known = self.known(kind).training
        return known if n >= len(self) else known[self._rows(n, seed)]

    def _rows(self, n: int, seed: int) -> Tensor:
        """A seeded choice of the numbers `(n,)` of training samples."""
        if n < 0:
            raise ValueError(f"n must be at least 0; got {n}")
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return rows[:n].to(self.device)

    @cached_property
    def classes(self) -> int | None:
        """How many classes its labels tell apart, the largest label plus one; None without any."""
        if self.labels is None:
            return None
        held_out = [] if self.held_out_labels is None else [self.held_out_labels]
        return 1 + max(int(labels.max()) for labels in (self.labels, *held_out))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `(n, *shape)` training samples, with replacement; mirrored by chance if `flip`.

        The generator may live on any device; the global one of `device` if None.

        Raises:
            ValueError: There are no samples.
        """
        return self.draw(n, generator, None)[0]

    def known(self, kind: Kind) -> Known:
        """The conditions of its samples, of a kind.

        Raises:
            ValueError: Its samples have none of that kind.
        """
        if kind == "classes" and kind not in self._known and self.labels is not None:
            self._known[kind] = known_classes(
                self.labels, self.held_out_labels, self.classes or 0, self.name
            )
        if kind not in self._known:
            noun = "labels" if kind == "classes" else kind
            raise ValueError(f"the samples of {self.name} have no {noun}")
        return self._known[kind]

    def sample_conditions(
        self, n: int, generator: torch.Generator | None = None, kind: Kind = "classes"
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the conditions `(n, ...)` of training samples, with replacement, and their labels.

        Raises:
            ValueError: Its samples have no such conditions.
        """
        known = self.known(kind).training
        source = self.device if generator is None else generator.device
        rows = torch.randint(len(known), (n,), generator=generator, device=source).to(self.device)
        return known[rows], None if self.labels is None else self.labels[rows]

    def sample_of(
        self, conditions: Tensor, generator: torch.Generator | None = None, kind: Kind = "classes"
    ) -> Tensor:
        """Draw training samples `(n, *shape)` of given conditions `(n, ...)`, with replacement.

        Raises:
            ValueError: There are no such conditions, or no sample of one.
        """
        known = self.known(kind).training
        source = self.device if generator is None else generator.device
        chance = torch.rand(len(conditions), generator=generator, device=source).to(self.device)
        rows = rows_of(conditions, known, chance)
        if rows is None:
            raise ValueError(f"{self.name} has no training sample of one of these {kind}")
        return to_float(self._training[rows])

    def draw(
        self,
        n: int,
        generator: torch.Generator | None = None,
        kind: Kind | None = "classes",
    ) -> tuple[Tensor, Tensor | None]:
        """Draw training samples as `sample` does, and their conditions `(n, ...)`.

        Args:
            n: How many.
            generator: As in `sample`.
            kind: Of the conditions; None for none. Labels that there are not are None.

        Raises:
            ValueError: There are no samples, or they have no captions or embeddings.
        """
        if not self.has_samples:
            raise ValueError("there are no samples to draw: this target only has a shape")
        source = self.device if generator is None else generator.device
        rows = torch.randint(len(self._training), (n,), generator=generator, device=source)
        return self._drawn(rows.to(self.device), generator, kind)

    def draw_in_passes(
        self,
        n: int,
        first: int,
        seed: int = 0,
        generator: torch.Generator | None = None,
        kind: Kind | None = "classes",
    ) -> tuple[Tensor, Tensor | None]:
        """Draw training samples without replacement, pass after pass, each in another order.

        Args:
            n: How many.
            first: Number of the first of them, counted from the beginning of the first pass.
            seed: Of the orders.
            generator: For `flip`.
            kind: As in `draw`.

        Returns:
            Samples and conditions, as `draw` does.
        """
        if not self.has_samples:
            raise ValueError("there are no samples to draw: this target only has a shape")
        size, rows = len(self._training), []
        for number in range(first // size, (first + n - 1) // size + 1):
            order = np.random.default_rng((seed, number)).permutation(size)
            rows.append(order[max(first - number * size, 0) : first + n - number * size])
        drawn = torch.from_numpy(np.concatenate(rows)).to(self.device)
        return self._drawn(drawn, generator, kind)

    def _drawn(
        self, rows: Tensor, generator: torch.Generator | None, kind: Kind | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return these training samples, mirrored by chance if `flip`, and their conditions."""
        drawn = self._training[rows]
        if self.flip:
            source = self.device if generator is None else generator.device
            size = (len(rows), 1, 1, 1)
            mirrored = torch.randint(2, size, generator=generator, device=source).bool()
            drawn = torch.where(mirrored.to(self.device), drawn.flip(-1), drawn)
        if kind is None or (kind == "classes" and self.labels is None):
            return to_float(drawn), None
        # Whoever wants samples alone may have negative labels.
        known = self.labels if kind == "classes" else self.known(kind).training
        assert known is not None
        return to_float(drawn), known[rows]

    def sample_fresh(self, n: int, seed: int = 0) -> Tensor:
        """Draw `(n, *shape)` real samples that are not among the training samples.

        Args:
            n: How many; at most `fresh_limit`.
            seed: 0 to 2**32 - 2. A generator gives other points for every seed, a held-out split a
                seeded choice without replacement. They are never mirrored.

        Raises:
            ValueError: `n` exceeds `fresh_limit`, or the seed is out of range.
        """
        _check_seed(seed)
        if self._sampler is not None:
            # Shifted by one so that no seed is the training seed.
            fresh = to_stored(self._sampler(n, TRAINING_SEED + 1 + seed), "fresh samples")
            return to_float(fresh.to(self.device))
        return to_float(self._choose_fresh(self._held_out, n, seed))

    def fresh_labels(self, n: int, seed: int = 0) -> Tensor:
        """The labels `(n,)` int64 of the samples that `sample_fresh(n, seed)` draws.

        Raises:
            ValueError: Fresh samples have no labels, `n` exceeds `fresh_limit`, or the seed is
                out of range.
        """
        _check_seed(seed)
        if self._sampler is not None or self.held_out_labels is None:
            raise ValueError(f"the fresh samples of {self.name} have no labels")
        return self._choose_fresh(self.held_out_labels, n, seed)

    def fresh_conditions(self, n: int, seed: int = 0, kind: Kind = "classes") -> Tensor:
        """The conditions `(n, ...)` of the samples that `sample_fresh(n, seed)` draws.

        Raises:
            ValueError: As `fresh_labels`.
        """
        if kind == "classes":
            return self.fresh_labels(n, seed)
        _check_seed(seed)
        held_out = self.known(kind).held_out
        if self._sampler is not None or held_out is None:
            raise ValueError(f"the fresh samples of {self.name} have no {kind}")
        return self._choose_fresh(held_out, n, seed)

    def _choose_fresh(self, held_out: Tensor | None, n: int, seed: int) -> Tensor:
        """A seeded choice of `n` held-out samples or labels, without replacement."""
        if held_out is None or n > len(held_out):
            raise ValueError(
                f"{self.name} has {self.fresh_limit} fresh samples, {n} were asked for"
            )
        rows = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
        return held_out[rows[:n].to(held_out.device)]

    def to(self, device: torch.device | str) -> Target:
        """The same target with its samples on `device`; bytes stay bytes."""
        if not self.has_samples:
            return Target.without_samples(self.shape, device)
        moved = Target(
            self.name,
            self._training.to(device),
            held_out=None if self._held_out is None else self._held_out.to(device),
            sampler=self._sampler,
            labels=self.labels,
            held_out_labels=self.held_out_labels,
            flip=self.flip,
            manifold=self.manifold,
        )
        moved._known = {kind: known.to(device) for kind, known in self._known.items()}
        return moved

    def __len__(self) -> int:
        """How many training samples there are."""
        return len(self._training)

    def __repr__(self) -> str:
        return f"Target({self.name!r}, {len(self)} samples of {tuple(self.shape)})"


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32 - 1:
        raise ValueError(f"seed must be 0 to 2**32 - 2; got {seed}")
