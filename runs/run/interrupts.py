"""Ctrl-C in the middle of a run: the round is finished and saved first; a second one stops at once.

A context manager, so that the handler of before is back however the run ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

MESSAGE = (
    "\nfewstep: stopping after this round, which is saved then; Ctrl-C again stops at once, and "
    "the last checkpoint stays.\n"
)


class Interrupts:
    """Notes Ctrl-C instead of raising KeyboardInterrupt.

    Args:
        ignore: do not even note it: another process decides.

    Attributes:
        requested: whether Ctrl-C was pressed.
    """

    def __init__(self, ignore: bool = False) -> None:
        self.ignore = ignore
        self.requested = False
        self._previous: Any = None
        # Python allows handlers in the main thread alone; in another one Ctrl-C is not ours.
        self._installed = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            handler = signal.SIG_IGN if self.ignore else self._note
            self._previous = signal.signal(signal.SIGINT, handler)
            self._installed = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            # None: a handler that was not set from Python, and cannot be set again from here.
            previous = signal.SIG_DFL if self._previous is None else self._previous
            signal.signal(signal.SIGINT, previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Past Python's buffer, which the interrupted code may be in the middle of writing to.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.__stderr__.fileno(), MESSAGE.encode())  # type: ignore[union-attr]
