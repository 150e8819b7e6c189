"""Files that a reader sees whole: the old one or the new one, never half of one."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

_count = itertools.count()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, flush to disk, and rename the result to `path`.

    The file gets the access rights that the umask leaves to any new file, whatever `write` does.

    Raises:
        OSError: the file cannot be written, on a full disk for instance. The message names it, and
            what was there stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{temporary_suffix()}")
    try:
        with temporary.open("wb"):
            mode = temporary.stat().st_mode & 0o777
        write(temporary)
        with temporary.open("rb+") as file:  # Windows flushes only what may be written to
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], object], last: str = "") -> None:
    """Call `write(temporary_folder)`, and move each of its files into `folder` atomically.

    Files that are there already are replaced one by one; others stay.

    Args:
        folder: where to; made if it is not there.
        write: fills an empty folder.
        last: name of the file that is moved last, which tells a reader that the others are there.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with TemporaryDirectory(prefix=".", suffix=temporary_suffix(), dir=folder) as temporary:
        write(Path(temporary))
        files = [path for path in Path(temporary).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == last):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Some writers leave files that their owner alone may read.
            write_atomically(target, path.replace)


def unwritable(path: Path, error: Exception) -> OSError:
    """Build the error that says which file could not be written and why, of the type of an OSError.

    Args:
        path: the file.
        error: why; also one that is no OSError, such as safetensors raises on a full disk.
    """
    reason = str(getattr(error, "strerror", None) or error).rstrip(".")
    if not isinstance(error, OSError):
        return OSError(f"Cannot write {path}: {reason}.")
    failure = type(error)(f"Cannot write {path}: {reason}.")
    failure.errno = error.errno
    return failure


def temporary_suffix() -> str:
    """Return an end for the name of a temporary file or folder, by which `remove_leftovers` goes.

    Two threads, or two machines on one disk, do not get the same.
    """
    return f".{_host()}.{os.getpid()}-{next(_count)}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote into `folder` have left there.

    Those of running processes stay, and those of other machines, whose processes we cannot see.
    """
    ours = re.compile(rf"\..*\.{re.escape(_host())}\.(\d+)-\d+\.tmp")
    for path in folder.glob(".*.tmp"):
        written = ours.fullmatch(path.name)
        if written is None or _runs(int(written[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def cache_root() -> Path:
    """Return the folder of all that can be had again: data files and trained feature extractors.

    It is $FEWSTEP_CACHE; if that is not set $XDG_CACHE_HOME/fewstep, or else ~/.cache/fewstep, on
    every system, where PyTorch and Hugging Face keep theirs.
    """
    if chosen := os.environ.get("FEWSTEP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fewstep"


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())[:64]


def _runs(process: int) -> bool:
    """Whether a process of this machine is running; where we cannot ask, it is taken for so."""
    if os.name != "posix":
        return True  # there a signal 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except OSError:
        return True
    return True
