"""Prompts: read from a file, one a line, and told apart into those to learn from and the others."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ...envs import Target

# Share of the prompts that is held out, where no others are given.
_HELD_OUT_SHARE = 4
LONGEST_FILE = 2**26  # bytes


class Prompts(NamedTuple):
    """Prompts to learn from, and held-out ones, on which results are measured."""

    learned: list[str]
    held_out: list[str]

    @property
    def all(self) -> list[str]:
        """Both, the first ones first."""
        return [*self.learned, *self.held_out]


def read_prompts(path: Path) -> list[str]:
    """Read a file of prompts, one a line; empty lines are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no text, holds no prompts, or is larger than 64 MB.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of prompts {path}.")
    if path.stat().st_size > LONGEST_FILE:
        raise ValueError(f"{path} is larger than 64 MB, too large for a file of prompts.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8: prompts are text, one a line.")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line.")
    return prompts


def split_prompts(prompts: list[str], held_out: list[str] | None = None, seed: int = 0) -> Prompts:
    """Hold a quarter of the prompts out, by chance; a single one is learned from and reported on.

    Args:
        prompts: all of them; of equal ones one counts.
        held_out: these are held out instead, and left out of the others.
        seed: of the choice.

    Raises:
        ValueError: nothing is left to learn from.
    """
    unique = list(dict.fromkeys(prompts))
    if held_out is not None:
        learned = [prompt for prompt in unique if prompt not in set(held_out)]
        if not learned:
            raise ValueError("All prompts are among the held-out ones: none is left to learn from.")
        return Prompts(learned, list(dict.fromkeys(held_out)))
    if len(unique) == 1:
        return Prompts(unique, unique)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(len(unique) // _HELD_OUT_SHARE, 1)
    kept = set(order[:count])
    return Prompts(
        [prompt for i, prompt in enumerate(unique) if i not in kept],
        [prompt for i, prompt in enumerate(unique) if i in kept],
    )


def prompt_target(
    shape: tuple[int, ...], device: torch.device, prompts: Prompts | None = None
) -> Target:
    """Return a target without samples whose classes are prompts; those to learn from are drawn."""
    target = Target.without_samples(shape, device)
    if prompts is not None:
        numbers = torch.arange(len(prompts.all), device=device)
        target.labels = numbers[: len(prompts.learned)]
        target.held_out_labels = numbers[len(prompts.learned) :]
    return target
