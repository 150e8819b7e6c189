"""Counts that say how easily this package is read: `python tests/house.py` prints them.

How files import each other is read from their source. How many functions a run passes through is
counted in a short `fewstep train`, of the package as it is installed (`pip install -e .`).

A file imports another also by a statement inside a function. `import a.b.c` counts as an import of
`a/b/c.py` alone, not of the `__init__.py` of the folders above it: those run as well, but hardly
anyone reads them on the way.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# From the bottom to the top: a folder imports from itself and from those before it.
FOLDERS = ("common", "critics", "envs", "agents", "runs")
# Libraries that are not part of the core, by the name that they are imported under.
HEAVY = (
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "moviepy",
    "ot",
    "pandas",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "stable_baselines3",
    "tensorboard",
    "torch_fidelity",
    "torchvision",
    "tqdm",
    "transformers",
    "tyro",
)
TINY_RUN = ("--agent", "sft-pg", "--rounds", "3", "--pretrain.rounds", "2", "--evaluations", "0")


class Import(NamedTuple):
    """One file imports from another; paths are relative to the root."""

    source: str
    target: str
    for_types_only: bool  # under `if TYPE_CHECKING:`


# -- the files and how they import each other --------------------------------------------------


def files(root: Path = ROOT) -> list[Path]:
    """Return the package's source files, sorted."""
    return sorted(path for top in FOLDERS for path in (root / top).rglob("*.py"))


def imports(root: Path = ROOT) -> set[Import]:
    """Return who imports whom, wherever the statement stands."""
    found = set()
    for path in files(root):
        tree = ast.parse(path.read_text())
        own = path.relative_to(root)
        for node, for_types_only in _import_nodes(tree, False):
            for target in _targets(node, own, root):
                if target != str(own):
                    found.add(Import(str(own), target, for_types_only))
    return found


def _import_nodes(node: ast.AST, for_types_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, for_types_only
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.body:
                yield from _import_nodes(ast.Module([statement], []), True)
            for statement in child.orelse:
                yield from _import_nodes(ast.Module([statement], []), for_types_only)
        else:
            yield from _import_nodes(child, for_types_only)


def _targets(node: ast.AST, own: Path, root: Path) -> Iterator[str]:
    """Yield the files that an import statement in the file `own` takes names from."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            name = alias.name.split(".")
            if name[0] == "fewstep" and (path := _file_of(name[1:], root)) is not None:
                yield path
        return
    assert isinstance(node, ast.ImportFrom)
    name = (node.module or "").split(".") if node.module else []
    if node.level:
        above = own.parent.parts
        name = [*above[: len(above) - node.level + 1], *name]
    elif name[:1] == ["fewstep"]:
        name = name[1:]
    else:
        return
    for alias in node.names:
        path = _file_of([*name, alias.name], root) or _file_of(name, root)
        if path is not None:
            yield path


def _file_of(name: list[str], root: Path) -> str | None:
    """Return the file of a module, such as ["envs", "mdp"], or None if it is none of ours."""
    if not name or name[0] not in FOLDERS:
        return None
    place = Path(*name)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if (root / path).is_file():
            return str(path)
    return None


def circles(found: set[Import]) -> list[list[str]]:
    """Return the groups of files of which each imports, by way of others, each (Tarjan 1972)."""
    after: dict[str, list[str]] = {}
    for edge in sorted(found):
        after.setdefault(edge.source, []).append(edge.target)
        after.setdefault(edge.target, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for target in after[file]:
            if target not in index:
                visit(target)
            if target in stack:
                low[file] = min(low[file], low[target])
        if low[file] == index[file]:
            place = stack.index(file)
            groups.append(sorted(stack[place:]))
            del stack[place:]

    for file in after:
        if file not in index:
            visit(file)
    return [group for group in groups if len(group) > 1]


def wrong_way(found: set[Import]) -> list[Import]:
    """Return the imports that do not point down: runs, agents, envs, critics, common."""

    def floor(path: str) -> int:
        return FOLDERS.index(Path(path).parts[0])

    return sorted(edge for edge in found if floor(edge.target) > floor(edge.source))


def fullest_folders(root: Path = ROOT) -> list[tuple[int, str]]:
    """Return (files directly inside, folder), the fullest first."""
    counts: dict[str, int] = {}
    for path in files(root):
        folder = str(path.parent.relative_to(root))
        counts[folder] = counts.get(folder, 0) + 1
    return sorted(((count, folder) for folder, count in counts.items()), reverse=True)


def lines(paths: list[Path]) -> int:
    """Return the number of lines in all these files."""
    return sum(path.read_text().count("\n") for path in paths)


def study_files(root: Path = ROOT) -> list[Path]:
    """Return the files of studies: what is named after one, their command and their tables."""
    own = ("benchmark.py", "tables.py")
    return [
        path
        for path in files(root)
        if path.is_relative_to(root / "runs")
        and ("stud" in str(path.relative_to(root)) or path.name in own)
    ]


# -- the package as it runs --------------------------------------------------------------------


def constructor_arguments() -> list[str]:
    """Return the arguments of SFTPG's constructor that are not groups of settings."""
    from fewstep.agents import SFTPG

    arguments: dict[str, inspect.Parameter] = {}
    for kind in SFTPG.__mro__:
        own = inspect.signature(kind).parameters
        arguments = {**own, **arguments}
        # Only what a constructor takes as keywords may be an argument of the class above.
        if not any(argument.kind is argument.VAR_KEYWORD for argument in own.values()):
            break
    return [
        name
        for name, argument in arguments.items()
        if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        and "Settings" not in str(argument.annotation)
    ]


def settings_in_no_group() -> list[str]:
    """Return the settings of SFT-PG that stand beside its groups of settings."""
    from fewstep.agents import SFTPG

    fields = dataclasses.fields(SFTPG.Settings) if hasattr(SFTPG, "Settings") else ()
    return [field.name for field in fields if "Settings" not in str(field.type)]


def import_seconds(module: str = "fewstep.envs", times: int = 5) -> float:
    """Return the CPU seconds that importing a module takes after torch, the median of a few."""
    script = (
        "import time, torch; start = time.process_time(); "
        f"import {module}; print(time.process_time() - start)"
    )
    return statistics.median(float(_python(script)) for _ in range(times))


def heavy_modules(module: str = "fewstep.envs") -> list[str]:
    """Return the libraries of `HEAVY` that importing a module loads."""
    # Some loads of torch itself (its own optional ones) are not ours to answer for.
    script = (
        "import sys, torch; before = set(sys.modules); "
        f"import {module}; print(*(set(sys.modules) - before))"
    )
    loaded = _python(script).split()
    return [name for name in HEAVY if name in loaded]


def _python(script: str) -> str:
    run = [sys.executable, "-c", script]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


class Counter:
    """Collects the package's functions that a thread enters while `on`.

    Functions are code objects of the package's files. What stands inside one without a name, a
    comprehension or a lambda, is read with it and does not count; nor do modules and classes, which
    run when they are imported.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.on = False
        self.functions: set[tuple[str, int, str]] = set()
        self._root = root
        self._files: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Serve as the function of `sys.setprofile`."""
        if not self.on or event != "call":
            return
        code = frame.f_code
        file = self.file(code)
        if file is None or code.co_name.startswith("<") or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        function = (file, code.co_firstlineno, code.co_name)
        if function not in self.functions and not _importing(frame):
            self.functions.add(function)

    def file(self, code: CodeType) -> str | None:
        """Return the file of the package that holds this code, or None."""
        name = code.co_filename
        if name not in self._files:
            path = Path(name).resolve()
            inside = path.is_relative_to(self._root)
            own = str(path.relative_to(self._root)) if inside else ""
            self._files[name] = own if own.split("/")[0] in FOLDERS else None
        return self._files[name]

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of functions and of files."""
        return len(self.functions), len({file for file, _, _ in self.functions})


def _importing(frame: FrameType) -> bool:
    """Say whether a frame runs because a module is being imported."""
    return any("importlib._bootstrap" in caller.f_code.co_filename for caller in callers(frame))


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame, its caller, the caller of that, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


class _Enough(BaseException):
    """All is counted; the rest of the run is not needed."""


def paths(root: Path = ROOT) -> tuple[Counter, Counter]:
    """Run a short `fewstep train`; count what it passes through.

    Returns:
        The functions from the command's `main` to the first policy gradient, and those of a steady
        round of SFT-PG, the third.
    """
    import torch

    from fewstep.agents import SFTPG
    from fewstep.runs.cli import main

    first, steady = Counter(root), Counter(root)
    backward, train_round = torch.Tensor.backward, SFTPG.train_round
    rounds = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == "main":
            first.on |= first.file(code) in ("runs/train.py", "runs/commands/train.py")
        first(frame, event, argument)
        steady(frame, event, argument)

    def spied_backward(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> None:
        owners = [first.file(frame.f_code) or "" for frame in callers(sys._getframe())]
        # The critic descends before the policy does, in a file of its own.
        if rounds == 1 and not any(owner.startswith("critics/") for owner in owners):
            first.on = False
        backward(tensor, *arguments, **keywords)

    def spied_round(agent: Any) -> Any:
        nonlocal rounds
        rounds += 1
        steady.on = rounds == 3
        metrics = train_round(agent)
        steady.on = False
        if rounds == 3:
            raise _Enough
        return metrics

    torch.Tensor.backward = spied_backward  # type: ignore[method-assign]
    SFTPG.train_round = spied_round  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            sys.setprofile(profile)
            main(["train", *TINY_RUN, "--log-dir", folder])
    except _Enough:
        pass
    finally:
        sys.setprofile(None)
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        SFTPG.train_round = train_round  # type: ignore[method-assign]
    return first, steady


def installed_root() -> Path:
    """Return the folder whose `envs/` is what `fewstep.envs` imports."""
    from importlib.util import find_spec

    spec = find_spec("fewstep.envs")
    if spec is None or spec.origin is None:
        raise SystemExit("fewstep is not installed: pip install -e .")
    return Path(spec.origin).resolve().parent.parent


def main() -> None:
    """Print the table."""
    root = installed_root()
    found = imports(root)
    running = {edge for edge in found if not edge.for_types_only}
    groups, groups_with_types = circles(running), circles(found)
    rows: list[tuple[str, object, object]] = [
        ("import circles", len(groups), 0),
        ("import circles, with those for types only", len(groups_with_types), 0),
        ("imports the wrong way", len(wrong_way(running)), 0),
        ("imports the wrong way, with those for types only", len(wrong_way(found)), 0),
        *((f"files in {folder}/", n, 14) for n, folder in fullest_folders(root)[:2]),
        ("source lines in all", lines(files(root)), 17_500),
        ("lines of study code", lines(study_files(root)), 700),
        ("lines of README.md", lines([root / "README.md"]), 180),
        ("arguments of SFTPG that are no settings groups", len(constructor_arguments()), 12),
        ("settings of SFTPG in no group", len(settings_in_no_group()), "-"),
        ("import fewstep.envs beyond torch, CPU seconds", f"{import_seconds():.2f}", 0.3),
        ("import fewstep.agents beyond torch", f"{import_seconds('fewstep.agents'):.2f}", "-"),
    ]
    first, steady = paths(root)
    for name, counter, limits in (
        ("to the first policy gradient", first, (130, 35)),
        ("in a steady SFT-PG round", steady, (30, 8)),
    ):
        for what, count, limit in zip(("functions", "files"), counter.counts, limits, strict=True):
            rows.append((f"{what} {name}", count, limit))
    print(f"{'':<50} {'now':>8} {'at most':>8}")
    for name, now, limit in rows:
        print(f"{name:<50} {now:>8} {limit:>8}")
    for group in groups_with_types:
        print("circle:", *group)
    for edge in wrong_way(found):
        print(f"wrong way: {edge.source} imports {edge.target}")
    if "-v" in sys.argv:
        for name, counter in (("first", first), ("steady", steady)):
            for file, line, function in sorted(counter.functions):
                print(f"{name}: {file}:{line} {function}")


if __name__ == "__main__":
    main()
