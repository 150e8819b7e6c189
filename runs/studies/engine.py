"""The study engine: a study is a list of cells, and each finished cell leaves a record.

A cell has a key and a function that returns its record, a flat JSON object of coordinates and
scores. The record is written to `cells/KEY.json` atomically, so a study that was stopped goes on
where it was. Any number of processes work on one list: a lock beside each record says who runs the
cell, and it goes when its process ends, however that ends.

logs/benchmark/STUDY/results.json  table.md  plot.png  cells/KEY.json  locks/
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...envs.files import write_atomically
from ..console import console
from ..folder import read_record, unwritable_folder, write_json
from ..plots import save_figure
from ..threads import threads
from .tables import figure, report

Record = dict[str, Any]


class CellError(ValueError):
    """A cell failed; the records of the others are kept."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may change of a study when it is run."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    threads: int | None = None
    """CPU threads of each process, at least 1; if omitted 1 for vectors, else PyTorch's default
    shared among the workers."""
    seeds: tuple[int, ...] | None = None
    """Training seeds, if not the study's."""
    steps: tuple[int, ...] | None = None
    """Network calls of a sample, if not the study's."""
    data_dir: Path | None = None
    """Folder of the data files of studies on image sets."""
    inception_weights: Path | None = None
    """Weights of torch-fidelity's Inception network, for FID on images of 32 pixels and more."""
    rounds: int | None = None
    """Rounds of every training, if not the presets' (a quick look)."""
    evaluation_samples: int | None = None
    """Most samples of each metric, at least 2, if not the study's."""


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    Attributes:
        key: its name, which is a file's name, too.
        run: returns its record; with several workers it is pickled.
    """

    key: str
    run: Callable[[], Record]


@dataclass(frozen=True)
class Study:
    """A comparison on equal terms.

    Attributes:
        title: what it asks.
        cells: the study's cells under these options; what they leave goes into the folder.
        columns: of the table, see `tables.summary`; all metrics and the seconds if empty.
        yardstick: label of the contender that the others are to beat, if there is one.
    """

    title: str
    cells: Callable[[Options, Path], Sequence[Cell]]
    columns: tuple[str, ...] = ()
    yardstick: str | None = None


def run_study(study: Study, options: Options, folder: Path, workers: int = 1) -> str:
    """Run every cell that is not finished; write results.json, table.md and plot.png.

    Args:
        study: what to run.
        options: see there.
        folder: of the study.
        workers: processes that share the cells.

    Returns:
        The report, in Markdown.

    Raises:
        CellError: a cell failed. The others were run, and the table shows them.
        PermissionError: the folder cannot be written.
    """
    cells = study.cells(options, folder)
    records = carry_out(cells, folder, workers, options.threads)
    finished = [record for record in records.values() if "failed" not in record]
    text = ""
    if finished:
        write_json(folder / "results.json", finished)
        text = report(study.title, finished, study.columns, study.yardstick)
        write_atomically(folder / "table.md", lambda file: file.write_text(text + "\n"))
        save_figure(figure(finished, study.columns), folder / "plot.png")
    failed = {key: record["failed"] for key, record in records.items() if "failed" in record}
    if failed:
        key, message = next(iter(failed.items()))
        others = f" So did {len(failed) - 1} more of {len(cells)} cells." if len(failed) > 1 else ""
        raise CellError(f"Cell {key} failed: {message}{others}")
    return text


def carry_out(
    cells: Sequence[Cell], folder: Path, workers: int = 1, cpu_threads: int | None = None
) -> dict[str, Record]:
    """Run every cell that is not finished.

    Args:
        cells: what to run, in order.
        folder: where records are kept.
        workers: processes; one is this process, more are spawned.
        cpu_threads: of each; None leaves PyTorch's default, which several workers share.

    Returns:
        The cells' records by their keys, in order. The record of a cell that failed has "failed",
        the reason, and "traceback".
    """
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable_folder(folder, error) from None
    for cell in cells:
        _failure(folder, cell).unlink(missing_ok=True)
    if workers == 1:
        _work(cells, folder, cpu_threads)
    else:
        _share_out(cells, folder, workers, cpu_threads or max((os.cpu_count() or 1) // workers, 1))
    return {cell.key: _record_of(folder, cell) for cell in cells}


def _share_out(cells: Sequence[Cell], folder: Path, workers: int, cpu_threads: int) -> None:
    """Let several processes work on the cells; they end with this one, however it ends."""
    spawn = multiprocessing.get_context("spawn")
    arguments = (cells, folder, cpu_threads, True)
    processes = [spawn.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _work(
    cells: Sequence[Cell], folder: Path, cpu_threads: int | None, quiet: bool = False
) -> None:
    """Run the cells that nobody else runs; at the end wait for those that others are at."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # the bars of several processes would mix
    with threads(cpu_threads):
        for wait in (False, True):
            for cell in cells:
                if not _is_over(folder, cell):
                    with locked(folder / "locks" / cell.key, wait) as mine:
                        if mine and not _is_over(folder, cell):
                            _attempt(cell, folder)


def _attempt(cell: Cell, folder: Path) -> None:
    """Run a cell and write its record, or why it failed."""
    console.rule(cell.key)
    try:
        write_json(_file(folder, cell), cell.run())
    except Exception as error:
        reason = {"failed": str(error) or repr(error), "traceback": traceback.format_exc()}
        write_json(_failure(folder, cell), reason)
        console.out(f"Cell {cell.key} failed: {error}")
        if os.environ.get("FEWSTEP_DEBUG"):
            console.out(reason["traceback"])


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.key}.json"


def _failure(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.key}.failed"


def _is_over(folder: Path, cell: Cell) -> bool:
    """Return whether a cell is finished, or failed in this run."""
    return _file(folder, cell).is_file() or _failure(folder, cell).is_file()


def _record_of(folder: Path, cell: Cell) -> Record:
    for file in (_file(folder, cell), _failure(folder, cell)):
        if file.is_file():
            return read_record(file)
    return {"failed": "its process was killed.", "traceback": ""}


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
