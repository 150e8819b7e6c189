"""One way to refuse an unknown name: say what it was, guess what was meant, list what is known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from .reading import quoted


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """Build the error for a name that is in no table, to be raised by the caller.

    Args:
        kind: What was being named, for instance `"solver"`.
        name: What the user wrote.
        choices: The names that would have worked.

    Returns:
        A `ValueError` such as `unknown solver 'ddmi'; did you mean 'ddim'? Known: ddim, heun.`
    """
    known = sorted(choices)
    by_lower = {choice.lower(): choice for choice in known}
    close = get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[close[0]]!r}?" if close else "."
    return ValueError(f"unknown {kind} {quoted(name)}{hint} Known: {', '.join(known)}.")
