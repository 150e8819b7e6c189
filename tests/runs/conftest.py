"""Runs with a tiny budget: every stage, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from fewstep.critics.metrics import classifier
from fewstep.runs.cli import main
from fewstep.runs.reports import plots


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep trained feature extractors out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_classifiers():
    """Train feature extractors for a second: their features need not be good here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_IMAGES", 500)
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_pictures():
    """Draw small pictures of few samples: what they show is looked at by hand.

    Files are drawn without the layout, which draws everything once more: test_plots.py has it.
    """
    savefig = Figure.savefig

    def saved_as_it_is(figure: Figure, *arguments: object, **options: object) -> None:
        figure.set_layout_engine("none")
        savefig(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PICTURED", 200)
        patch.setattr(plots, "DPI", 30)
        patch.setattr(Figure, "savefig", saved_as_it_is)
        yield


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Flags of a run of a second."""
    return [
        "--agent=sft-pg",
        "--rounds=4",
        "--batch-size=16",
        "--evaluations=2",
        "--evaluation-samples=500",
        "--log-interval=1",
        "--pretrain.rounds=6",
        "--pretrain.batch-size=32",
    ]


@pytest.fixture(scope="session")
def fewstep() -> Callable[..., int]:
    """The command, in this process; returns its exit code."""

    def run(*argv: object) -> int:
        try:
            main([str(argument) for argument in argv])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, fewstep: Callable[..., int], tiny: list[str]
) -> Path:
    """The folder of a finished `fewstep train` on the swiss roll."""
    log_dir = tmp_path_factory.mktemp("logs")
    assert fewstep("train", f"--log-dir={log_dir}", *tiny) == 0
    (folder,) = log_dir.iterdir()
    return folder
