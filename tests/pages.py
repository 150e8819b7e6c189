"""README and the pages of `docs/`: their Python blocks, their command lines, their links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Return the page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of every `fewstep` command, in blocks and within sentences."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        for part in line.split("&&"):
            command = re.match(r"\s*(?:torchrun .* )?fewstep( .*)", part)
            if command:
                found.append(shlex.split(command.group(1), comments=True))
    return found


def links(page: Path) -> list[str]:
    """Return the targets of links into the repository, without their anchors."""
    prose = re.sub(r"`[^`]*`", "", page.read_text())
    return re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", prose)
