"""Captions of a folder of pictures: the file `captions.tsv`, a picture and its text a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...common.conditions.captions import encode
from ...common.reading import read_text

FILE = "captions.tsv"


def read_captions(root: Path, files: Sequence[Path], suffixes: tuple[str, ...]) -> list[str]:
    """Read the captions of pictures, in their order.

    The file lies in the folder or beside it. Its lines are UTF-8, `PATH<TAB>TEXT`; paths are
    relative to the folder, or to the file's own one. A first line whose path does not end as a
    picture does is a header.

    Args:
        root: The folder of pictures.
        files: The pictures, relative to it.
        suffixes: How the name of a picture ends, in small letters.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no UTF-8, a line has no tab or no text, a picture is named twice or is not
            there, or one has no line.
    """
    path = next((p for p in (root / FILE, root.parent / FILE) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {FILE} in {root}, nor beside it")
    known = {file.as_posix(): file for file in files}
    if path.parent != root:
        known |= {f"{root.name}/{name}": file for name, file in list(known.items())}
    found: dict[Path, str] = {}
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        name, tab, text = line.partition("\t")
        name, text = name.strip(), text.strip()
        if not tab:
            raise ValueError(f"line {number} of {path} has no tab between a picture and its text")
        if number == 1 and not name.lower().endswith(suffixes):
            continue
        file = known.get(name.removeprefix("./"))
        if file is None:
            raise ValueError(f"line {number} of {path} names {name}, which is no picture in {root}")
        if file in found:
            raise ValueError(f"line {number} of {path} names {name} a second time")
        if not text:
            raise ValueError(f"line {number} of {path} has no text for {name}")
        encode(text)
        found[file] = text
    if missing := [file for file in files if file not in found]:
        raise ValueError(
            f"{path} says nothing of {len(missing)} of {len(files)} pictures, {missing[0]} for one"
        )
    return [found[file] for file in files]
