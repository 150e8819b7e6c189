"""Logs that survive a resume."""

from __future__ import annotations

from stable_baselines3.common.logger import Logger

from fewstep.runs.run.logs import ProgressFile, read_live_metric, read_progress


def log(path, timesteps, rows):
    logger = Logger(None, [ProgressFile(path, timesteps)])
    for step, values in rows:
        for key, value in values.items():
            logger.record(key, value)
        logger.dump(step)
    logger.close()


def test_a_resumed_file_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "progress.csv"
    log(path, 0, [(10, {"a": 1}), (20, {"a": 2}), (30, {"a": 3})])
    log(path, 20, [(30, {"a": 4, "eval/sliced_wasserstein": 0.5})])
    rows = read_progress(path)
    assert [row["a"] for row in rows] == ["1", "2", "4"]
    assert read_live_metric(path) == ([30.0], [0.5])


def test_a_half_written_row_is_ignored(tmp_path):
    path = tmp_path / "progress.csv"
    log(path, 0, [(10, {"a": 1, "b": 2})])
    path.write_text(path.read_text() + "1")
    assert [row["a"] for row in read_progress(path)] == ["1"]


def test_no_file_has_no_rows(tmp_path):
    assert read_progress(tmp_path / "nothing.csv") == []
    assert read_live_metric(tmp_path / "nothing.csv") is None
