"""Arguments of constructors, checked against their type hints.

A string where a flag is meant is true, an unknown name falls through to the last `else`, a number
that is no whole one is rounded somewhere, and a path where a network is meant fails far away.
`checked` refuses them when the object is built, from what the signature says, so that a new
argument is checked as well.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from .names import unknown_name
from .reading import quoted

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# The longest value that a sentence shows.
_LONGEST = 100

_NOT = object()  # what `_converted` returns for a value that does not fit


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Check a function's arguments whenever it is called: see `check_arguments`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own message names the function
        bound.arguments.update(check_arguments(function, bound.arguments))
        return function(*bound.args, **bound.kwargs)

    return wrapper


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as Python's own numbers, or refuse what the type hints exclude.

    Checked are hints of `bool`, `int`, `float`, `str`, `Literal`, `Path`, `None`, classes,
    callables, tuples and sequences of these, dictionaries, and unions of them. A whole number
    passes for a `float`, a NumPy scalar or a tensor of no dimension for a Python number, a list for
    a tuple, and a vector for a sequence of numbers; nothing but a flag passes for a `bool`, and no
    string for a sequence. A protocol that cannot be asked accepts all that is callable if it is.
    Hints of other kinds accept everything, as do classes that a module imports for type checkers
    alone.

    Args:
        function: whose hints they are.
        arguments: by name; those without a hint pass.

    Raises:
        TypeError: a value of another type.
        ValueError: a string that is none of the known ones.
    """
    hints = _hints(inspect.unwrap(function))
    return {
        name: check_value(name, value, hints[name]) if name in hints else value
        for name, value in arguments.items()
    }


def check_value(name: str, value: Any, hint: Any) -> Any:
    """Check one value against a type hint: see `check_arguments`."""
    found = _converted(value, hint)
    if found is not _NOT:
        return found
    choices = [choice for part in _parts(hint) for choice in _choices(part)]
    if choices and isinstance(value, str):
        raise unknown_name(name, value, choices)
    wanted = " or ".join(_described(part) for part in _parts(hint))
    raise TypeError(f"{name} must be {wanted}, got {given(value)}.")


def check_fields(instance: Any, kind: Any) -> None:
    """Check the fields that a dataclass `kind` gives its instance: see `check_arguments`."""
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        check_value(field.name, getattr(instance, field.name), hints[field.name])


def check_seed(seed: int, name: str = "seed") -> None:
    """Raise TypeError or ValueError for a seed that is no whole number from 0 to 2**63 - 1."""
    if not 0 <= check_value(name, seed, int) < 2**63:
        raise ValueError(f"{name} must be at least 0 and below 2**63, got {seed}.")


@functools.cache
def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a function, or of the fields of a class."""
    return get_type_hints(owner, localns=_Names(vars(sys.modules[owner.__module__])))


class _Names(dict[str, Any]):
    """What a module knows; what it imports for type checkers alone is anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, a single one of any other hint."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _converted(value: Any, hint: Any) -> Any:
    """Return the value as the hint says, or `_NOT`."""
    parts = _parts(hint)
    if len(parts) > 1:
        fitting = (_converted(value, part) for part in parts)
        return next((found for found in fitting if found is not _NOT), _NOT)
    if get_origin(hint) is Literal:
        same = (choice for choice in get_args(hint) if type(choice) is type(value))
        return value if value in same else _NOT
    if get_origin(hint) is tuple:
        return _converted_tuple(value, get_args(hint))
    if get_origin(hint) is Sequence:
        return _converted_sequence(value, get_args(hint)[0])
    if _is_function(hint):
        return value if callable(value) and not isinstance(value, type) else _NOT
    check = _CHECKS.get(get_origin(hint) or hint)
    if check is not None:
        return check(value)
    return value if not _is_class(hint) or _is_instance(value, hint) else _NOT


def _is_instance(value: Any, kind: Any) -> bool:
    """Whether it is one; a class has all that a protocol asks for, and is no instance of it."""
    return isinstance(value, kind) and not (_is_protocol(kind) and isinstance(value, type))


def _is_class(hint: Any) -> bool:
    """Whether instances can be told: not of `list[int]`, nor of a protocol that is for reading."""
    if not isinstance(hint, type) or get_origin(hint) is not None or hint is Any:
        return False
    return not _is_protocol(hint) or getattr(hint, "_is_runtime_protocol", False)


def _is_protocol(hint: Any) -> bool:
    """Whether a class is a protocol."""
    return getattr(hint, "_is_protocol", False)


def _is_function(hint: Any) -> bool:
    """Whether it is a protocol that cannot be asked, of objects that are called."""
    return _is_protocol(hint) and not _is_class(hint) and "__call__" in vars(hint)


def _converted_tuple(value: Any, hints: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return _NOT
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        return _NOT
    found = tuple(_converted(part, hint) for part, hint in zip(value, hints, strict=True))
    return _NOT if any(part is _NOT for part in found) else found


def _converted_sequence(value: Any, hint: Any) -> Any:
    """Return a sequence as it is, or a tuple where a part of it was a number of another library."""
    if isinstance(value, np.ndarray | Tensor) and value.ndim:
        value = tuple(value.tolist())
    if isinstance(value, str | bytes | Mapping | np.ndarray | Tensor):
        return _NOT
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return _NOT
    found = tuple(_converted(part, hint) for part in value)
    if any(part is _NOT for part in found):
        return _NOT
    same = all(new is old for new, old in zip(found, value, strict=True))
    return value if same else found


def _flag(value: Any) -> Any:
    return bool(value) if isinstance(value, bool | np.bool_) else _NOT


def _scalar(value: Any) -> Any:
    """Return an array or a tensor of no dimension, of which no gradient is asked, as a number."""
    if not isinstance(value, np.ndarray | Tensor) or value.ndim:
        return value
    return value if getattr(value, "requires_grad", False) else value.item()


def _whole(value: Any) -> Any:
    value = _scalar(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else _NOT


def _number(value: Any) -> Any:
    value = _scalar(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        return _NOT
    return value if isinstance(value, int | float) else float(value)


def _path(value: Any) -> Any:
    if isinstance(value, str | Path):
        return value
    return Path(value) if isinstance(value, os.PathLike) else _NOT


def _only(*kinds: type) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, kinds) else _NOT


_CHECKS: dict[Any, Callable[[Any], Any]] = {
    bool: _flag,
    int: _whole,
    float: _number,
    str: _only(str),
    Path: _path,
    dict: _only(Mapping),
    Mapping: _only(Mapping),
    Callable: lambda value: value if callable(value) else _NOT,
    NoneType: _only(NoneType),
}

_NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    dict: "a dictionary",
    Mapping: "a dictionary",
    Callable: "callable",
    NoneType: "None",
}


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if parts[-1] is Ellipsis:
            return f"a sequence of which each is {_described(parts[0])}"
        return f"({', '.join(map(_described, parts))})"
    if get_origin(hint) is Sequence:
        return f"a sequence of which each is {_described(get_args(hint)[0])}"
    if (_is_class(hint) or _is_function(hint)) and hint not in _NAMES:
        return _a(hint.__name__)
    return _NAMES.get(get_origin(hint) or hint, str(hint))


def given(value: Any) -> str:
    """Return a value as it is written, the name of its class if that is long."""
    written = repr(value)
    short = len(written) <= _LONGEST and "\n" not in written and not written.startswith("<")
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return quoted(value) if short or isinstance(value, str) else _a(type(value).__name__)


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


# -- tensors and numbers: each sentence names the setting, what it was and what is accepted --------


def as_tensor(name: str, values: Any) -> Tensor:
    """Return a tensor of what holds numbers: a tensor, an array or a list.

    Raises:
        TypeError: it holds something else, or rows of several lengths.
    """
    try:
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a tensor or an array of numbers, got {given(values)}."
        ) from None


def at_least(least: int, **values: float | None) -> None:
    """Raise ValueError for a value that is NaN, infinite or below `least`; None passes."""
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def fraction(*, with_one: bool, **values: float | None) -> None:
    """Raise ValueError for a value outside [0, 1], or [0, 1) without one; None passes."""
    for name, value in values.items():
        if value is not None and not (0 <= value < 1 or (with_one and value == 1)):
            upper = "1]" if with_one else "1)"
            raise ValueError(f"{name} must lie in [0, {upper}, got {value}.")
