"""Loggers that survive a resume: what a killed run logged after its last checkpoint is taken back.

Both are output formats of Stable-Baselines3's logger, so agents log through it as SB3's own do.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import (
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)
from torch.utils.tensorboard import SummaryWriter

from ...common.files import unwritable, write_atomically

STEP, LIVE_METRIC = "time/total_timesteps", "eval/sliced_wasserstein"
# Pictures and hyper-parameters go to TensorBoard alone.
NOT_TENSORBOARD = ("stdout", "log", "json", "csv")


def make_logger(folder: Path, name: str, progress: str, timesteps: int = 0) -> Logger:
    """Log to `folder`/`progress` and `folder`/tensorboard/`name`, going on from `timesteps`."""
    return Logger(
        str(folder),
        [
            ProgressFile(folder / progress, timesteps),
            ResumableTensorBoard(folder / "tensorboard" / name, timesteps),
        ],
    )


class ProgressFile(KVWriter):
    """A CSV file with one row a log entry; rows beyond the resumed timestep are dropped.

    Args:
        path: the file; its folder exists.
        timesteps: rows up to this one are kept.
    """

    def __init__(self, path: Path, timesteps: int = 0) -> None:
        self.path = path
        self.rows = [row for row in read_progress(path) if float(row[STEP]) <= timesteps]
        self._rewrite()

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        """Append one row; a key never seen before makes a new column."""
        row = {
            key: str(value)
            for key, value in filter_excluded_keys(key_values, key_excluded, "csv").items()
        }
        row[STEP] = str(step)
        self.rows.append(row)
        if row.keys() <= set(self.columns):
            try:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(row)
            except OSError as error:
                raise unwritable(self.path, error) from None
        else:
            self._rewrite()

    def close(self) -> None:
        """Do nothing: no file is kept open."""

    def _rewrite(self) -> None:
        self.columns = sorted({key for row in self.rows for key in row} | {STEP})
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, lambda path: path.write_text(buffer.getvalue()))


def read_progress(path: Path) -> list[dict[str, str]]:
    """Return the rows of a progress.csv without their empty cells; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    # A kill can leave half a row at the end.
    return [row for row in rows if STEP in row]


def read_live_metric(path: Path) -> tuple[list[float], list[float]] | None:
    """Return timesteps and values of the live metric in a progress.csv, None if it has none."""
    return read_metric(path, LIVE_METRIC)


def read_metric(
    path: Path, name: str, against: str = STEP
) -> tuple[list[float], list[float]] | None:
    """Return two columns of a progress.csv where both are filled, None if they never are."""
    rows = [row for row in read_progress(path) if name in row and against in row]
    if not rows:
        return None
    return [float(row[against]) for row in rows], [float(row[name]) for row in rows]


class ResumableTensorBoard(TensorBoardOutputFormat):
    """TensorBoard events; those of an earlier process beyond `timesteps` are purged from view."""

    def __init__(self, folder: Path, timesteps: int = 0) -> None:
        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=timesteps + 1 if timesteps else None)
        self._is_closed = False

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        """Write one log entry; on a full disk the error names the folder."""
        try:
            super().write(key_values, key_excluded, step)
        except OSError as error:
            raise unwritable(self.folder, error) from None

    def close(self) -> None:
        """Close the file; on a full disk the error names the folder."""
        try:
            super().close()
        except OSError as error:
            self._is_closed = True  # whatever is left to write cannot be
            raise unwritable(self.folder, error) from None
