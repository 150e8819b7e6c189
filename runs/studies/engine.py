"""The study engine: a study is a list of cells, and each finished cell leaves a record.

A record is a flat JSON object of coordinates and scores, written to `cells/KEY.json` atomically: a
study that was stopped goes on where it was. Several processes may work on one list; a lock says who
runs a cell, and it goes when its process ends, however that ends.

logs/benchmark/STUDY/results.json  table.md  plot.png  cells/KEY.json  locks/  stages/
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import write_atomically
from ..reports.console import console
from ..reports.plots import save_figure
from ..run.folder import read_record, unwritable_folder, write_json
from ..run.threads import threads
from ..settings.benchmark import BenchmarkSettings
from .tables import present

Record = dict[str, Any]
# Of a study's title, records, columns and yardstick: its text in Markdown, and its picture.
Presenter = Callable[[str, list[Record], Sequence[str], str | None], tuple[str, Any]]
# What the record of a cell that failed has instead of scores, and beside it if data are missing.
FAILED, MISSING = "failed", "missing"


class CellError(ValueError):
    """A cell failed; the records of the others are kept."""


@dataclass(frozen=True)
class Cell:
    """One measurement: its key, which names files, and what returns its record."""

    key: str
    run: Callable[[], Record]

    def file(self, folder: Path) -> Path:
        """Where its record is kept."""
        return folder / "cells" / f"{self.key}.json"

    def begun(self, folder: Path) -> Path:
        """A file that says that it was begun in this run of the study."""
        return folder / "locks" / f"{self.key}.begun"


@dataclass(frozen=True)
class Study:
    """A comparison on equal terms.

    Attributes:
        title: what it asks.
        cells: returns the cells under a command's flags.
        columns: of the table, see `tables.summary`; all metrics and the seconds if empty.
        yardstick: label of the contender that the others are to beat, if there is one.
        present: what makes a text and a picture of the records.
    """

    title: str
    cells: Callable[[BenchmarkSettings], Sequence[Cell]]
    columns: tuple[str, ...] = ()
    yardstick: str | None = None
    present: Presenter = present


def run_study(study: Study, settings: BenchmarkSettings) -> str:
    """Run every cell that is not finished; write table, results.json and plot; return the table.

    Raises:
        CellError: a cell failed. The others were run, and the table shows them.
        FileNotFoundError: data are not at hand. The table shows the cells that came before.
        PermissionError: the folder cannot be written.
    """
    cells, folder, text = study.cells(settings), settings.folder, ""
    records = carry_out(cells, folder, settings.workers, settings.threads)
    finished = [record for record in records if FAILED not in record]
    if finished:
        write_json(folder / "results.json", finished)
        text, picture = study.present(study.title, finished, study.columns, study.yardstick)
        write_atomically(folder / "table.md", lambda file: file.write_text(text + "\n"))
        save_figure(picture, folder / "plot.png")
    for record in records:
        if MISSING in record:  # which ended the study, whatever else failed
            raise FileNotFoundError(record[FAILED])
    for cell, record in zip(cells, records, strict=True):
        if FAILED in record:
            count = f"{len(cells) - len(finished)} of {len(cells)} cells failed"
            raise CellError(f"{count}, first {cell.key}: {record[FAILED]}")
    return text


def carry_out(
    cells: Sequence[Cell], folder: Path, workers: int = 1, cpu_threads: int | None = None
) -> list[Record]:
    """Run every cell that is not finished, and those that failed before; return all records.

    Args:
        cells: what to run, in order; with several workers they are pickled.
        folder: where records are kept.
        workers: processes; one is this process, more are spawned and end with this one.
        cpu_threads: of each; None leaves PyTorch's default, which several workers share.
    """
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable_folder(folder, error) from None
    for cell in cells:
        cell.begun(folder).unlink(missing_ok=True)
        if cell.file(folder).is_file() and FAILED in read_record(cell.file(folder)):
            cell.file(folder).unlink()
    if workers == 1:
        _work(cells, folder, cpu_threads)
    else:
        _share_out(cells, folder, workers, cpu_threads or max((os.cpu_count() or 1) // workers, 1))
    killed = {FAILED: "its process was killed."}
    files = [cell.file(folder) for cell in cells]
    return [read_record(file) if file.is_file() else killed for file in files]


def _share_out(cells: Sequence[Cell], folder: Path, workers: int, count: int) -> None:
    """Let several processes work on the cells; they end with this one, however it ends."""
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_work_quietly, args=(cells, folder, count), daemon=True)
        for _ in range(workers)
    ]
    try:
        with _variable("TQDM_DISABLE", "1"):  # the bars of several processes would mix
            for process in processes:
                process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable that processes started inside inherit."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _work_quietly(cells: Sequence[Cell], folder: Path, count: int | None) -> None:
    """Do a worker's work; Ctrl-C, which the first process tells of, ends it."""
    with suppress(KeyboardInterrupt):
        _work(cells, folder, count)


def _work(cells: Sequence[Cell], folder: Path, count: int | None) -> None:
    """Run the cells that nobody else runs; at the end wait for those that others are at.

    Data that are not at hand end it: the other cells would fail for them alike.
    """
    with threads(count):
        for wait in (False, True):
            for cell in cells:
                if not cell.file(folder).is_file():
                    with locked(folder / "locks" / cell.key, wait) as mine:
                        # A cell that killed one process is not tried by the next one.
                        tried = cell.file(folder).is_file() or cell.begun(folder).is_file()
                        if mine and not tried:
                            cell.begun(folder).touch()
                            if not _attempt(cell, folder):
                                return


def _attempt(cell: Cell, folder: Path) -> bool:
    """Run a cell and write its record, or why it failed; return whether to go on to others."""
    console.rule(cell.key)
    debugs = bool(os.environ.get("FEWSTEP_DEBUG"))
    try:
        record = cell.run()
    except Exception as error:
        record = {FAILED: str(error) or repr(error), "traceback": traceback.format_exc()}
        if isinstance(error, FileNotFoundError):
            record[MISSING] = True
        if MISSING not in record or debugs:  # else it is said at the end
            console.out(record["traceback" if debugs else FAILED])
    write_json(cell.file(folder), record)
    return MISSING not in record


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that one process at a time can have; yield whether it is ours.

    Args:
        path: the lock's file, which is made and stays.
        wait: until another process gives it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
