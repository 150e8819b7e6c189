"""A tableau as human-readable JSON that any program can run: the format of `Tableau.save`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ...common.reading import parse_json, quoted, reason
from ...envs.processes import NoiseProcess
from .sparse import SparseRows

Table = TypeVar("Table")

FORMAT = "fewstep-tableau"
VERSION = 6
# The first version that has an array; a table is written for readers as old as possible.
_PLAIN, _SINCE = 4, {"asked": 5, "asked_times": 6}

# What every version holds. Up to version 3 the weights were a matrix, with all its zeros.
_ARRAYS = ("times", "scale", "weights", "noise")
# What a table that says nothing of them does without. The anchors may be missing since version 4;
# version 1 had none of the others, version 2 the first, up to version 4 none had the last two.
OPTIONAL = ("anchors", "current", "clipped", "covariance", "cap", "asked", "asked_times")


def write_table(
    name: str,
    output: str,
    process: NoiseProcess,
    arrays: dict[str, Any],
    extra: Mapping[str, Any],
) -> str:
    """Return the JSON of a tableau.

    Args:
        name: of the tableau.
        output: what it combines.
        process: the noise process.
        arrays: as lists; the weights are K lists of pairs [k, W_jk], one list a row, without the
            zeros, and optional arrays that have their default are left out.
        extra: further entries after its own.
    """
    if "cap" in arrays:
        # JSON knows no infinity.
        arrays["cap"] = [None if cap == math.inf else cap for cap in arrays["cap"]]
    table = {
        "format": FORMAT,
        "version": max([_PLAIN, *(since for name, since in _SINCE.items() if name in arrays)]),
        "name": name,
        "output": output,
        "process": process.to_config(),
        **arrays,
        **extra,
    }
    lines = [f" {json.dumps(key)}: {_lines(value)}" for key, value in table.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_table(text: str, build: Callable[..., Table]) -> Table:
    """Read the JSON of `write_table`, and build the tableau by its constructor.

    Raises:
        ValueError: not JSON, not a tableau, a newer version, or an invalid table.
    """
    try:
        table = parse_json(text)
    except ValueError as error:
        raise ValueError(f"Not a tableau: {error}.") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"Not a tableau: the JSON has no 'format': '{FORMAT}'.")
    if table.get("version") not in range(1, VERSION + 1):
        raise ValueError(
            f"This tableau has version {quoted(table.get('version'))}; this fewstep reads 1 to "
            f"{VERSION}."
        )
    dense = table["version"] < 4
    needed = ("name", *_ARRAYS, *(["anchors"] if dense else []), "output", "process")
    missing = [name for name in needed if name not in table]
    if missing:
        raise ValueError(f"The tableau lacks {', '.join(missing)}.")
    values = {name: table[name] for name in needed}
    values |= {name: table.get(name) for name in OPTIONAL}
    if isinstance(values["cap"], list):
        values["cap"] = [math.inf if cap is None else cap for cap in values["cap"]]
    for name in ("times", "scale", "noise", *OPTIONAL):
        # NumPy reads numbers out of strings.
        if isinstance(values[name], list) and any(isinstance(each, str) for each in values[name]):
            raise ValueError(f"The tableau is malformed: {name} holds text instead of numbers.")
    try:
        if not dense:
            # "" and {} would pass for rows without weights.
            if not all(isinstance(row, list) for row in values["weights"]):
                raise TypeError("weights must be lists of [index, weight] pairs, one a step")
            values["weights"] = SparseRows.from_pairs(values["weights"])
        values["process"] = NoiseProcess.from_config(values["process"])
        return build(**values)
    except (TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"The tableau is malformed: {reason(error)}.") from None


def _lines(value: Any) -> str:
    """Write a JSON value on one line, but lists of lists or objects one a line."""
    if isinstance(value, list) and value and isinstance(value[0], list | tuple | dict):
        return "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
    return json.dumps(value)
