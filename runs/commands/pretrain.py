"""`fewstep pretrain`: clone a denoiser from data, the start of every agent."""

from __future__ import annotations

from collections.abc import Sequence

from ..settings.train import CLONER
from . import train


def main(argv: Sequence[str]) -> None:
    """Run `fewstep pretrain` with these flags."""
    train.main(argv, agent=CLONER)
