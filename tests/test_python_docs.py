"""The Python blocks of docs/python.md run as they stand, and its table names what there is."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_has_its_five_blocks():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("block", BLOCKS, ids=["train", "preset", "arrays", "network", "units"])
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "python.md", "exec"), {"__name__": "page"})


def test_the_dotted_names_exist():
    names = re.findall(r"`(fewstep(?:\.\w+)+)`", PAGE)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute)
