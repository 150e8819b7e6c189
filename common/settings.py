"""Settings: declared once, as frozen dataclasses, and read by everyone.

A group of settings is a frozen dataclass with a docstring under each field; an agent's settings are
a group whose fields may be groups themselves (`critic`, `optimizer`, `execution`). The constructor
takes them as keywords, the command line as nested flags (`--critic.width`), config.json and the
checkpoint as nested objects: all through this file, and none declares anything again.

A number has its bounds beside its default: `width: int | None = bounded(None, least=1)`; those of a
tuple hold for each of its numbers.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .arguments import check_value
from .names import unknown_name
from .reading import quoted

Group = TypeVar("Group", bound="Settings")


def bounded(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a field with the bounds of its number, or numbers; None, if allowed, passes.

    Args:
        default: the field's default.
        least: the number is at least this.
        above: the number is greater than this.
        most: the number is at most this.
        below: the number is less than this.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all groups of settings: checks every field when it is built.

    Raises:
        TypeError: a value of another type than the field's hint.
        ValueError: a number out of its bounds, or a string that is none of the choices.
    """

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):
            _check_group(field.name, getattr(self, field.name), hints[field.name])
            value = check_value(field.name, getattr(self, field.name), hints[field.name])
            _check_bounds(field.name, value, field.metadata)
            object.__setattr__(self, field.name, value)

    @classmethod
    def groups(cls) -> dict[str, type[Settings]]:
        """Return the fields that are groups themselves, in the order of their declaration."""
        return {name: hint for name, hint in hints_of(cls).items() if _is_group(hint)}

    def replace(self: Group, **changes: Any) -> Group:
        """Return the settings with some changed, each by the shortest name that says which.

        A keyword is a field; or a group's name and one of its fields, such as `critic_width` for
        `critic.width`; or a field of a group, of the first one that has such a field.

        Raises:
            TypeError, ValueError: no such setting, or a value that it does not take.
        """
        groups = self.groups()
        own: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        for keyword, value in changes.items():
            group, name = _place(type(self), groups, keyword)
            if group is None:
                own[name] = _group_of(type(self), name, value) if name in groups else value
            else:
                nested.setdefault(group, {})[name] = value
        for group, values in nested.items():
            own[group] = own.get(group, getattr(self, group)).replace(**values)
        return dataclasses.replace(self, **own)

    def to_tree(self) -> dict[str, Any]:
        """Return the settings as a nested dictionary of JSON values; tuples become lists."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_tree(cls: type[Group], tree: Mapping[str, Any]) -> Group:
        """Read what `to_tree` returned; what it lacks has its default.

        Raises:
            TypeError, ValueError: a field that does not exist, or a value that it does not take.
        """
        return cls(**_read(cls, tree))


def hints_of(kind: type[Settings]) -> dict[str, Any]:
    """Return the type hints of the fields of a group, in the order of their declaration."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Settings)


def _read(kind: type[Settings], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a tree names."""
    hints, groups = hints_of(kind), kind.groups()
    for name in tree:
        if name not in hints:
            raise unknown_name("setting", name, hints)
    return {
        name: _group_of(kind, name, value) if name in groups else value
        for name, value in tree.items()
    }


def _group_of(kind: type[Settings], name: str, value: Any) -> Any:
    """Return a group that is given as such, or as a mapping of its fields.

    What a mapping lacks is as in the group that `kind` has by default there, whose values may
    differ from those of the group's class.
    """
    if not isinstance(value, Mapping):
        return value
    (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
    make = field.default_factory
    default: Any = field.default if make is dataclasses.MISSING else make()
    return dataclasses.replace(default, **_read(type(default), value))


def _place(
    kind: type[Settings], groups: Mapping[str, type[Settings]], keyword: str
) -> tuple[str | None, str]:
    """Return the group (None: no group) and the field that a keyword names."""
    if keyword in hints_of(kind):
        return None, keyword
    for group, its in groups.items():
        name = keyword.removeprefix(f"{group}_")
        if name != keyword and name in hints_of(its):
            return group, name
    for group, its in groups.items():
        if keyword in hints_of(its):
            return group, keyword
    known = {name for each in (kind, *groups.values()) for name in hints_of(each)} - set(groups)
    raise unknown_name("setting", keyword, known)


def _check_group(name: str, value: Any, hint: Any) -> None:
    """Raise TypeError for a group of settings that is no instance of its class."""
    if _is_group(hint) and not isinstance(value, hint):
        raise TypeError(f"{name} must be {hint.__name__} or a mapping, got {quoted(value)}.")


def _check_bounds(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Raise ValueError for a number, or one of a tuple, out of the bounds that `bounded` noted."""
    if not limits or value is None:
        return
    numbers = value if isinstance(value, tuple) else (value,)
    rules = (
        ("least", "at least", operator.ge),
        ("above", "above", operator.gt),
        ("most", "at most", operator.le),
        ("below", "below", operator.lt),
    )
    wanted = [(words, limits[key], holds) for key, words, holds in rules if limits[key] is not None]
    fits = all(holds(number, bound) for number in numbers for _, bound, holds in wanted)
    if fits and all(map(math.isfinite, numbers)):
        return
    said = " and ".join(f"{words} {bound:g}" for words, bound, _ in wanted) or "finite"
    each = " each" if isinstance(value, tuple) else ""
    raise ValueError(f"{name} must be {said}{each}, got {value}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
