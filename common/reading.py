"""Reading files that others wrote or that are damaged: JSON within limits, one kind of refusal.

Every loader of the package reads JSON here. Python's own reader takes whatever it is given: 5,000
brackets in each other overflow its stack, a number of 400 digits overflows whoever computes with
it, and a few megabytes of brackets become gigabytes of lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

Text = TypeVar("Text", str, bytes)

MOST_BYTES = 32 * 2**20
"""Longest JSON that is read; a table of 1000 dense rows takes 5 MB."""
MOST_DEPTH = 100
"""Lists and objects in each other; a checkpoint's tree has about 20."""
MOST_PARTS = 2**21
"""Lists and objects in one file, of 56 bytes or more each."""
MOST_DIGITS = 40
"""Digits of a whole number; 128 bits have 39."""
INFINITIES = ("Infinity", "-Infinity")
CONSTANTS = ("NaN", *INFINITIES)

DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a file raises if its contents are not what its writer wrote."""


def read_json(path: str | Path, *, constants: Collection[str] = ()) -> Any:
    """Read a file of JSON in UTF-8, within the limits of this module.

    Args:
        path: the file.
        constants: which of NaN, Infinity and -Infinity to take (`CONSTANTS` are all of them);
            Python writes them, and JSON does not know them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not valid JSON, or beyond the limits; the sentence names the file.
    """
    text = read_text(path)
    try:
        return parse_json(text, constants=constants)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or foreign: {error}.") from None


def read_text(path: str | Path) -> str:
    """Read a file of UTF-8, at most `MOST_BYTES` long.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no UTF-8, or longer; the sentence names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    try:
        return _decoded(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or foreign: {error}.") from None


def parse_json(text: str | bytes, *, constants: Collection[str] = ()) -> Any:
    """Read JSON from a text or its bytes in UTF-8, within the limits of this module.

    Raises:
        ValueError: not valid JSON, or beyond the limits.
    """
    text = _decoded(text) if isinstance(text, bytes) else _bounded(text)
    try:
        if text.count("[") + text.count("{") > MOST_PARTS:
            raise ValueError(f"its JSON has more than {MOST_PARTS} brackets")
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=lambda name: _constant(name, constants),
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    _check_depth(value)
    return value


@contextmanager
def damage_named(
    path: str | Path, kind: type[ValueError] = ValueError, what: str = "is damaged"
) -> Iterator[None]:
    """Turn whatever fails inside into one sentence that names the file, of this type.

    Errors that name the file already pass, as do those of the machine: a full memory, no
    permission.
    """
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, kind) and str(path) in str(error)
        ):
            raise
        raise kind(f"{path} {what}: {reason(error).removesuffix('.')}.") from None


def reason(error: Exception) -> str:
    """Say in one line, without its type's name, what an error complains of."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, KeyError) and error.args:
        return f"it lacks {error.args[0]!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of a network's weights torch lists all that do not fit, below a headline.
    details = [line for line in lines if line.startswith("size mismatch")]
    return _shortened((details or lines or [repr(error)])[0])


def shown(value: object) -> str:
    """Return what a file holds where a name should be, cut short."""
    return _shortened(value if isinstance(value, str) else repr(value))


def quoted(value: object) -> str:
    """Return a value as Python writes it, cut short."""
    return _shortened(repr(value))


def _decoded(data: bytes) -> str:
    try:
        return _bounded(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 ({error})") from None


def _bounded(text: Text) -> Text:
    if len(text) > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES // 2**20} MiB")
    return text


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


# A sentence may quote what the file holds.
_LONGEST = 400
_TOO_DEEP = f"its JSON has more than {MOST_DEPTH} lists or objects in each other"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner: list[Any] = []
        for node in level:
            parts = node.values() if isinstance(node, dict) else node
            if isinstance(node, dict | list):
                inner += [part for part in parts if isinstance(part, dict | list)]
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"its JSON has a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"its JSON has a number beyond floating point, {_shortened(digits)}")
    return value


def _constant(name: str, known: Collection[str]) -> float:
    if name not in known:
        raise ValueError(f"its JSON has {name}, which is no number")
    return float(name)
