"""The study engine: resuming, workers, failures, and the table."""

from __future__ import annotations

import json
import pickle
from functools import partial

import pandas as pd
import pytest
import study_cells

from fewstep.runs.settings.benchmark import BenchmarkSettings
from fewstep.runs.studies import STUDIES
from fewstep.runs.studies.engine import Cell, CellError, Study, carry_out, locked, run_study
from fewstep.runs.studies.tables import figure, report, summary


def cells_of(log, seeds=(0, 1), run=study_cells.record):
    return [Cell(f"{c}-{seed}", partial(run, log, c, seed)) for c in "ab" for seed in seeds]


def ran(log):
    return (log / "ran").read_text().split()


def study_of(cells):
    return Study("A study", lambda settings: cells, ("error", "factor error"))


def test_an_interrupted_study_goes_on_where_it_was(tmp_path):
    cells = cells_of(tmp_path)
    stopped = [*cells[:2], Cell(cells[2].key, study_cells.interrupted), cells[3]]
    with pytest.raises(KeyboardInterrupt):
        carry_out(stopped, tmp_path / "study")
    assert ran(tmp_path) == ["a-0", "a-1"]
    records = carry_out(cells, tmp_path / "study")
    assert ran(tmp_path) == ["a-0", "a-1", "b-0", "b-1"]  # nothing twice
    assert [(r["contender"], r["seed"]) for r in records] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]
    assert carry_out(cells, tmp_path / "study") == records
    assert len(ran(tmp_path)) == 4


@pytest.mark.slow  # each worker imports everything anew
def test_two_workers_share_the_cells_and_give_the_same_table(tmp_path):
    tables = []
    for workers in (1, 2):
        log = tmp_path / f"{workers}"
        log.mkdir()
        cells = cells_of(log, run=study_cells.slow)
        settings = BenchmarkSettings(study="some", log_dir=log, workers=workers, threads=1)
        tables.append(run_study(study_of(cells), settings))
        assert sorted(ran(log)) == ["a-0", "a-1", "b-0", "b-1"]
        assert (settings.folder / "table.md").read_text() == tables[-1] + "\n"
        assert len(json.loads((settings.folder / "results.json").read_text())) == 4
    assert tables[0] == tables[1]


def test_a_failing_cell_is_named_and_the_others_are_kept(tmp_path):
    good = cells_of(tmp_path)
    cells = [Cell("bad", partial(study_cells.failing, "no such data")), *good]
    settings = BenchmarkSettings(study="some", log_dir=tmp_path)
    with pytest.raises(CellError, match="1 of 5 cells failed, first bad: no such data"):
        run_study(study_of(cells), settings)
    assert len(json.loads((settings.folder / "results.json").read_text())) == 4
    assert (
        "Traceback" in json.loads((settings.folder / "cells" / "bad.json").read_text())["traceback"]
    )
    # It is tried again, the others are not.
    cells[0] = Cell("bad", partial(study_cells.record, tmp_path, "c", 0))
    assert "| c |" in run_study(study_of(cells), settings)
    assert ran(tmp_path) == ["a-0", "a-1", "b-0", "b-1", "c-0"]


def test_data_that_are_not_at_hand_end_a_study(tmp_path):
    """What is missing is all that is said, also where a cell before failed for another reason."""
    absent = partial(study_cells.absent, "MNIST is not at hand")
    settings = BenchmarkSettings(study="some", log_dir=tmp_path)
    bad, good = Cell("bad", partial(study_cells.failing, "no")), cells_of(tmp_path)
    cells = [bad, good[0], Cell("b", absent), Cell("c", absent)]
    with pytest.raises(FileNotFoundError, match=r"^MNIST is not at hand$"):
        run_study(study_of(cells), settings)
    # The cell before it is kept, the one after it not tried.
    assert len(json.loads((settings.folder / "results.json").read_text())) == 1
    assert not (settings.folder / "cells" / "c.json").exists()
    # It is tried again.
    cells[2] = Cell("b", good[1].run)
    with pytest.raises(FileNotFoundError, match=r"^MNIST is not at hand$"):
        run_study(study_of(cells), settings)
    cells[3] = Cell("c", good[2].run)
    with pytest.raises(CellError, match="1 of 4 cells failed, first bad: no"):
        run_study(study_of(cells), settings)


@pytest.mark.slow  # likewise
def test_a_killed_worker_loses_its_cell_only(tmp_path):
    cells = [Cell("killed", study_cells.killed), *cells_of(tmp_path)]
    first, *others = carry_out(cells, tmp_path / "study", workers=2, cpu_threads=1)
    assert first == {"failed": "its process was killed."}
    assert [record["contender"] for record in others] == ["a", "a", "b", "b"]
    assert sorted(ran(tmp_path)) == ["a-0", "a-1", "b-0", "b-1"]


def test_a_cell_that_another_process_runs_is_left_to_it(tmp_path):
    with locked(tmp_path / "lock") as mine, locked(tmp_path / "lock", wait=False) as second:
        assert (mine, second) == (True, False)
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine


def test_the_table_is_that_of_the_records_by_hand(tmp_path):
    errors = pd.DataFrame(
        {"a": [0.1, 0.2], "a before": [0.3, 0.2], "b": [0.4, 0.4], "b before": [0.4, 0.8]}
    )
    records = [
        {
            **study_cells.record(tmp_path, contender, seed),
            "error": errors[contender][seed],
            "error before": errors[f"{contender} before"][seed],
            "tuned": seed == 0,
            "seconds": 2.0 + seed,
        }
        for contender in "ab"
        for seed in (0, 1)
    ]
    columns = ["error", "factor error", "tuned", "seconds", "no such score"]
    table = summary(pd.DataFrame(records), columns)
    assert list(table.columns) == [
        "env",
        "contender",
        "calls",
        "error ↓",
        "factor error",
        "tuned",
        "seconds",
        "no such score",
    ]
    mean, std = errors.mean(), errors.std()
    factors = errors["a before"] / errors["a"]
    assert table.iloc[0].tolist() == [
        "SwissRoll",
        "a",
        "5",
        f"{mean['a before']:.2e} ± {std['a before']:.2e} → {mean['a']:.2e} ± {std['a']:.2e} "
        "(1.00e-02)",
        f"{factors.mean():.2f} ± {factors.std():.2f}",
        "True x1, False x1",
        "2 ± 1",
        "-",
    ]
    assert table.iloc[1]["error ↓"] == (
        f"{mean['b before']:.2e} ± {std['b before']:.2e} → 4.00e-01 (1.00e-02)"
    )
    text = report("Which?", records, columns[:2], yardstick="b")
    assert "Factor error not above 1 for every seed: SwissRoll, a, 5; SwissRoll, b, 5." in text
    assert "Better than 'b' in error for every seed: SwissRoll, a, 5." in text
    axis = figure(records, columns).axes[0]
    assert sorted(axis.lines[0].get_xdata()) == pytest.approx([1.5, 2.0])
    without = [{k: v for k, v in each.items() if k != "error floor"} for each in records]
    assert len(figure(without, ["error"]).axes[0].lines) == 1  # no dashed one


def test_every_cell_of_every_study_has_a_key_of_its_own_and_can_go_to_a_worker(tmp_path):
    for name, study in STUDIES.items():
        cells = study.cells(BenchmarkSettings(study=name, log_dir=tmp_path))
        assert len({cell.key for cell in cells}) == len(cells) > 0
        assert pickle.loads(pickle.dumps(cells[-1])).key == cells[-1].key
    quick = study.cells(BenchmarkSettings(study=name, log_dir=tmp_path, rounds=1))
    assert not {cell.key for cell in quick} & {cell.key for cell in cells}
