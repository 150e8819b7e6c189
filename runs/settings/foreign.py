"""Networks of the user's own, named on the command line as `--body package.module:factory`.

The flag imports code, as the user asks. A file never does: the name of the network that config.json
keeps only goes into the sentence that asks for the flag.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...agents import Denoiser
from ...agents.solvers import Options
from ...common.optimisation import is_out_of_memory


class Recorded(str):
    """The name of a user's network as a settings file gives it, which is never imported."""


def is_foreign(name: str | None) -> bool:
    """Tell whether a body's name is one of the user's, `package.module:factory`."""
    return isinstance(name, str) and ":" in name


def needs_flag(origin: Path | str, name: str | None = None) -> ValueError:
    """Build the error for a file whose network is the user's, and the flag is missing."""
    flag = name or "package.module:factory"
    return ValueError(
        f"{origin} is of a network of your own, and reading a file imports no code: name the "
        f"network with --body {flag}."
    )


def foreign_body(name: str | None, options: Options | None = None) -> nn.Module | None:
    """Import the user's factory and build the network; None for a name of ours.

    Modules are found as `python -m` finds them: in the current folder, then among those installed.

    Args:
        name: "package.module:factory", a function or class that returns a module body(x, t).
        options: its keyword arguments.

    Raises:
        ValueError: nothing of that name, an import or a call that fails, no `nn.Module`, or a name
            that was read from a file and not given by the user.
    """
    if name is None or not is_foreign(name):
        return None
    if isinstance(name, Recorded):
        raise needs_flag("The settings file", name)
    place, _, attribute = name.partition(":")
    if not place or not attribute:
        raise ValueError(f"--body {name} must be package.module:factory.")
    with _current_folder():
        factory = _imported(name, place, attribute)
        try:
            body = factory(**(options or {}))
        except Exception as error:
            given = f" with the options {options}" if options else ""
            raise ValueError(f"--body {name} fails{given}: {_said(error)}") from error
    if not isinstance(body, nn.Module):
        raise ValueError(
            f"--body {name} returns a {type(body).__name__}; it must return a torch.nn.Module that "
            "is called as body(x, t)."
        )
    return body


def check_body(denoiser: Denoiser, shape: torch.Size, name: str | None) -> None:
    """Ask a foreign network once, for one time and for a time each.

    Args:
        denoiser: whose body it is.
        shape: of one sample.
        name: of the body; one of ours passes.

    Raises:
        ValueError: it fails, or returns anything but samples (N, *shape).
    """
    if not is_foreign(name):
        return
    weight = next(denoiser.body.parameters(), None)
    if weight is None:
        raise ValueError(f"--body {name} has no parameters to train.")
    sample = torch.zeros(2, *shape, device=weight.device)
    last = denoiser.process.t_max
    for t in (last, torch.full((2,), last, device=weight.device)):
        answer = _answer(denoiser, sample, t, f"--body {name}")
        if not isinstance(answer, Tensor):
            raise ValueError(
                f"--body {name} answers with a {type(answer).__name__}; it must return a tensor "
                "shaped like x."
            )
        if answer.shape != sample.shape or not answer.is_floating_point():
            raise ValueError(
                f"--body {name} makes {tuple(answer.shape)} {answer.dtype} of x "
                f"{tuple(sample.shape)}; it must return a floating tensor shaped like x."
            )


def _answer(denoiser: Denoiser, sample: Tensor, t: float | Tensor, what: str) -> Any:
    """Return what the body itself answers, before it is cast."""
    answers: list[Any] = []
    hook = denoiser.body.register_forward_hook(lambda *seen: answers.append(seen[2]))
    try:
        with torch.no_grad():
            denoiser(sample, t)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        if not answers:
            raise ValueError(
                f"{what} fails for x {tuple(sample.shape)} and t (2,): {_said(error)}"
            ) from error
    finally:
        hook.remove()
    return answers[-1]


def _imported(name: str, place: str, attribute: str) -> Any:
    try:
        module = import_module(place)
    except ModuleNotFoundError as error:
        missing = error.name or place
        if place == missing or place.startswith(f"{missing}."):
            raise ValueError(
                f"--body {name}: there is no module {missing}, neither in {Path.cwd()} nor among "
                "the installed packages."
            ) from error
        raise ValueError(f"--body {name}: importing {place} fails: {_said(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"--body {name}: importing {place} fails: {_said(error)}") from error
    try:
        factory = attrgetter(attribute)(module)
    except AttributeError:
        raise ValueError(f"--body {name}: the module {place} has no {attribute}.") from None
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ValueError(
            f"--body {name} is a {type(factory).__name__}; it must be a function or a class that "
            "makes a new torch.nn.Module at each call."
        )
    return factory


@contextmanager
def _current_folder() -> Iterator[None]:
    """Import from the current folder inside."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _said(error: BaseException) -> str:
    """Return an error of the user's code in one line."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
