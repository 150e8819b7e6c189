"""README's Python snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_has_the_eight_snippets():
    assert len(SNIPPETS) == 8


@pytest.mark.parametrize(
    "snippet",
    SNIPPETS,
    ids=["denoiser", "solver", "schedule", "diffusers", "reward", "target", "env", "algorithm"],
)
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_links_into_the_code_lead_somewhere():
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    missing = [link for link in links if not (root / link).exists()]
    assert not missing
