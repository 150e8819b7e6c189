"""Execution: how a denoiser's body is run while an agent trains it, and only then."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ..denoisers.denoiser import Denoiser
from ..settings import ExecutionSettings

P = ParamSpec("P")
Result = TypeVar("Result")


class Execution:
    """Precision, memory format and compilation of a body; see `Denoiser.run_with`.

    Inside `running()` the body is run so; outside the denoiser is as it was, but for the memory
    format of its weights, which changes no number.

    Args:
        denoiser: whose body it is; nothing is changed yet.
        settings: precision, memory format, compilation.
    """

    def __init__(self, denoiser: Denoiser, settings: ExecutionSettings) -> None:
        self._denoiser, self._settings = denoiser, settings
        self._compiled: Callable[..., Any] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the body so inside."""
        denoiser: Any = self._denoiser
        before = denoiser.precision, denoiser.body._compiled_call_impl
        try:
            # torch.compile is asked once: each answer would compile anew.
            first = self._settings.compile and self._compiled is None
            denoiser.run_with(self._settings.precision, self._settings.channels_last, compile=first)
            if first:
                self._compiled = denoiser.body._compiled_call_impl
            elif self._settings.compile:
                denoiser.body._compiled_call_impl = self._compiled
            yield
        finally:
            denoiser.precision, denoiser.body._compiled_call_impl = before


class _Trains(Protocol):
    execution: Execution


Agent = TypeVar("Agent", bound=_Trains)


def as_executed(
    method: Callable[Concatenate[Agent, P], Result],
) -> Callable[Concatenate[Agent, P], Result]:
    """Make a method of an agent run the denoiser as the agent's `execution` says."""

    @functools.wraps(method)
    def executed(self: Agent, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.execution.running():
            return method(self, *args, **kwargs)

    return executed
