"""How the package is built: which way its files import, how many a folder holds, what they load."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import house

MOST_FILES = 14
MOST_README_LINES = 180


def names(path: Path) -> set[str]:
    """Return the names of a file's imports: what is imported, not from where."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "names")]
    return {alias.name for node in nodes for alias in node.names if isinstance(alias, ast.alias)}


def test_no_files_import_each_other_in_a_circle():
    assert house.circles(house.imports()) == []


def test_imports_point_one_way():
    assert house.wrong_way(house.imports()) == []


def test_a_folder_holds_few_files():
    assert [place for place in house.fullest_folders() if place[0] > MOST_FILES] == []


def test_the_first_page_is_short():
    assert house.lines([house.ROOT / "README.md"]) <= MOST_README_LINES


def test_only_processes_ask_which_process_there_is():
    asked = []
    for path in house.files():
        place = str(path.relative_to(house.ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            question = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if question.startswith("isinstance(") and "process" in question.split(",")[0]:
                asked.append(f"{place}:{node.lineno} {question}")
    assert [place for place in asked if not place.startswith("envs/processes/")] == []


def test_runs_know_agents_by_their_table_alone():
    from fewstep.agents import AGENTS

    classes = {agent.__name__ for agent in AGENTS.values()}
    known = {
        str(path.relative_to(house.ROOT)): sorted(classes & names(path))
        for path in house.files()
        if path.is_relative_to(house.ROOT / "runs")
        # A measurement is of an agent that it names.
        and not path.is_relative_to(house.ROOT / "runs" / "speed")
    }
    assert {path: found for path, found in known.items() if found} == {}


def test_messages_of_the_library_speak_of_no_flags():
    spoken = []
    for path in house.files():
        if path.is_relative_to(house.ROOT / "runs"):
            continue
        for node in said(ast.parse(path.read_text())):
            if re.search(r"(?<![\w-])--\w", node.value):
                spoken.append(f"{path.relative_to(house.ROOT)}:{node.lineno}")
    assert spoken == []


def said(tree: ast.AST) -> list[ast.Constant]:
    """Return the strings of a file that are no docstrings."""
    docs = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node for node in strings if isinstance(node.value, str) and node not in docs]


def test_an_import_loads_the_core_alone():
    """Of the agents' package, which imports that of the environments, and of what reads models."""
    assert house.heavy_modules("fewstep.agents.pretrained") == []


def test_a_circle_is_found(tmp_path):
    write(tmp_path, "envs/__init__.py", "from .mdp import step")
    write(tmp_path, "envs/mdp.py", "def step():\n    from . import shell\n    from .shell import a")
    write(tmp_path, "envs/shell.py", "from fewstep.envs import step")
    write(tmp_path, "agents/base.py", "import fewstep.envs.mdp\nfrom ..runs import cli")
    write(tmp_path, "runs/cli.py", "import torch")
    found = house.imports(tmp_path)
    assert house.circles(found) == [["envs/__init__.py", "envs/mdp.py", "envs/shell.py"]]
    assert [edge[:2] for edge in house.wrong_way(found)] == [("agents/base.py", "runs/cli.py")]
    assert ("agents/base.py", "envs/mdp.py", False) in found


def test_an_import_for_types_is_told_apart(tmp_path):
    write(
        tmp_path,
        "critics/ipm.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..envs import mdp\n"
        "else:\n    from . import mmd",
    )
    write(tmp_path, "critics/mmd.py", "")
    write(tmp_path, "envs/mdp.py", "")
    assert house.imports(tmp_path) == {
        ("critics/ipm.py", "envs/mdp.py", True),
        ("critics/ipm.py", "critics/mmd.py", False),
    }


def write(root, place, text):
    path = root / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
