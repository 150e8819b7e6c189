"""README and docs: Python runs as it stands, commands have real flags, names and links exist."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
from importlib import import_module

import pytest
import tyro
from pages import PAGES, ROOT, blocks, commands, links, name_of

from fewstep.runs.cli import main

# Clients that are no dependency of ours: their blocks run where they are installed.
CLIENTS = ("sb3_contrib", "torchrl")
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if commands(page)]
# Commands within sentences that are named, not called: `fewstep benchmark` needs a study.
NAMED = 1


class ParsedError(Exception):
    """The flags were taken; the command itself need not run."""


def test_pages_are_found():
    assert {"README.md", "docs/python.md", "docs/rl-tools.md"} <= set(map(name_of, WITH_PYTHON))
    assert {"README.md", "docs/index.md", "docs/results.md"} <= set(map(name_of, WITH_COMMANDS))


def test_readme_is_a_first_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch, short_training):
    monkeypatch.chdir(tmp_path)
    absent = [client for client in CLIENTS if importlib.util.find_spec(client) is None]
    for block in blocks(page, "python"):
        if not any(client in block for client in absent):
            exec(compile(block, name_of(page), "exec"), {"__name__": "page"})


@functools.cache
def printed(*arguments):
    """Return the words that the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(list(arguments))
    return out.getvalue().split()


@functools.cache
def parsed_before():
    """The command lines that were taken: pages repeat each other's."""
    return set()


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_have_real_flags(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names, studies = printed("--help"), printed("benchmark", "list")
    assert "train" in names and "main" in studies
    parse = tyro.cli

    def parse_only(*arguments, **options):
        parse(*arguments, **options)
        raise ParsedError

    monkeypatch.setattr(tyro, "cli", parse_only)
    for command in commands(page):
        needs_run = "--resume" in command or "--start-from" in command
        if "--help" in command or needs_run or len(command) == NAMED:
            assert command[0] in names
            continue
        if tuple(command) not in parsed_before():
            with pytest.raises(ParsedError):
                main(command)
            parsed_before().add(tuple(command))
        if command[0] == "benchmark":
            assert command[1] in studies


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    missing = [link for link in links(page) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_dotted_names_exist(page):
    for name in re.findall(r"[`\s(](fewstep(?:\.\w+)+)[`\s).]", page.read_text()):
        module, _, attribute = name.rpartition(".")
        try:
            import_module(name)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), attribute), name
