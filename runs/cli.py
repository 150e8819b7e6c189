"""The `fewstep` command.

    fewstep COMMAND [flags]      fewstep --help lists the commands

Bad input ends with one sentence on stderr and exit code 2; set FEWSTEP_DEBUG=1 for the traceback.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from typing import TextIO

from .settings.flags import with_flags

LONGEST_MESSAGE = 2000

# Each command lives in a module of its own, imported only when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "clone a denoiser and train an agent (no flags: the main job)"),
    "pretrain": ("pretrain", "only clone a denoiser from data"),
    "evaluate": ("evaluate", "score a denoiser with any solver and number of steps"),
    "analyze": ("analyze", "show what a solver and its distilled version do on the way"),
    "sample": ("sample", "draw samples to a file"),
    "export": ("export", "write a denoiser and its sampler as a pipeline of diffusers"),
    "levels": ("levels", "print a table's noise levels for diffusers, ComfyUI and A1111"),
    "distil": ("distil", "learn a scheduler of few steps for a pipeline of diffusers"),
    "benchmark": ("benchmark", "run a declared study: a table and a plot"),
    "envs": ("list", "list the environments"),
    "agents": ("list", "list the agents and solvers"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises SystemExit with code 0, 1, 2 (bad input, divergence) or 130."""
    try:
        try:
            _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _run(arguments: list[str]) -> None:
    """Run a command; its errors end in one sentence."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0)
    if arguments == ["--version"]:
        print(f"fewstep {version('fewstep')}")
        raise SystemExit(0)
    name, *rest = arguments
    try:
        with warnings.catch_warnings(), quiet_writers():
            warnings.showwarning = _warn
            _command(name)(rest)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(error, 2)
    except RuntimeError as error:
        from ..common.optimisation import OutOfMemoryError, TrainingDivergedError, is_out_of_memory

        if is_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
            advice = "Take fewer samples, smaller batches or --device cpu."
            error = OutOfMemoryError(advice, f"in fewstep {name}")
        if isinstance(error, OutOfMemoryError | TrainingDivergedError):
            _fail(error, 2)
        if not _lost_peer(error):
            raise
        with suppress(SystemExit):
            _fail(error, 1)
        # Without the interpreter's end, at which the rest of the group may abort this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130) from None


def usage() -> str:
    """Return the overview that `fewstep --help` prints."""
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fewstep COMMAND [flags]",
            "",
            "Few-step diffusion sampling as reinforcement learning.",
            "",
            *lines,
            "",
            "fewstep COMMAND --help explains a command's flags.",
            "fewstep --version prints the version.",
        ]
    )


def _command(name: str) -> Callable[[list[str]], None]:
    if name not in COMMANDS:
        from ..common.names import unknown_name

        raise unknown_name("command", name, COMMANDS)
    module = import_module(f".commands.{COMMANDS[name][0]}", __package__)
    return getattr(module, name if name in ("envs", "agents") else "main")


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as one sentence, without the place in the code that Python adds."""
    print(f"fewstep: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    """Join a message's lines, name the flags behind it, and cut one that quotes a whole file."""
    text = with_flags(" ".join(str(message).split()))
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Inside, TensorBoard's thread prints no traceback when it cannot write.

    The next log entry, or the end of the log, raises the same error where the run can say it.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (writer and issubclass(arguments.exc_type, OSError)):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _lost_peer(error: RuntimeError) -> bool:
    from .run.joining import LostPeerError

    return isinstance(error, LostPeerError)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("FEWSTEP_DEBUG"):
        raise error
    # Under torchrun all processes meet the same error; one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"fewstep: {_one_line(error)}", file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
