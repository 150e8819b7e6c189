"""`fewstep pretrain`: clone a denoiser from data, the start of every agent."""

from __future__ import annotations

from collections.abc import Sequence

from ...agents import BehaviorCloning
from . import train


def main(argv: Sequence[str]) -> None:
    """Run `fewstep pretrain` with these flags."""
    train.main(argv, agent=BehaviorCloning.name)
