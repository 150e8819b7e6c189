"""Execution: how a denoiser's body is run while an agent trains it, and only then."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ...common.precision import Precision, check_precision
from ..denoisers.denoiser import Denoiser

P = ParamSpec("P")
Result = TypeVar("Result")


class Execution:
    """Precision, memory format and compilation of a body; see `Denoiser.run_with`.

    Inside `running()` the body is run so; outside the denoiser is as it was, but for the memory
    format of its weights, which changes no number.

    Args:
        denoiser: whose body it is; nothing is changed yet.
        precision: "float32" or "bf16".
        channels_last: keep convolution weights in that memory format from the first time on.
        compile: run the body through `torch.compile`.

    Raises:
        ValueError: unknown precision.
    """

    def __init__(
        self, denoiser: Denoiser, precision: Precision, channels_last: bool, compile: bool
    ) -> None:
        check_precision(precision)
        self._denoiser = denoiser
        self._precision, self._channels_last, self._compile = precision, channels_last, compile
        self._compiled: Callable[..., Any] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the body so inside."""
        denoiser: Any = self._denoiser
        before = denoiser.precision, denoiser.body._compiled_call_impl
        try:
            # torch.compile is asked once: each answer would compile anew.
            first = self._compile and self._compiled is None
            denoiser.run_with(self._precision, self._channels_last, compile=first)
            if first:
                self._compiled = denoiser.body._compiled_call_impl
            elif self._compile:
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
