"""Stable-Baselines3's callbacks around an agent's rounds, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.utils import configure_logger

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Callback", "ProgressBar", "configure_logger", "one_callback"]

Callback = BaseCallback | list[BaseCallback] | Callable[..., bool] | None


def one_callback(callback: Callback, progress_bar: bool) -> CallbackList:
    """Return what the caller gave, a callback, several, a function or None, as one list."""
    parts: list[BaseCallback] = [ProgressBar()] if progress_bar else []
    if isinstance(callback, list):
        parts = [*callback, *parts]
    elif isinstance(callback, BaseCallback):
        parts = [callback, *parts]
    elif callback is not None:
        parts = [ConvertCallback(callback), *parts]
    return CallbackList(parts)


class ProgressBar(BaseCallback):
    """Show the percentage of the training that is done."""

    _bar: tqdm[Any]

    def _on_training_start(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=100, unit="%", desc=self.model.name)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        done = 100 * self.model.progress  # type: ignore[attr-defined]
        self._bar.update(done - self._bar.n)
        return True

    def _on_training_end(self) -> None:
        self._bar.close()
