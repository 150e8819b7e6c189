"""Lay out the top-level folders as the package they are installed as, for the API reference.

`setup.py` maps `envs/` to `fewstep.envs`, and so on. mkdocstrings reads files and imports nothing,
so it needs a folder `fewstep` that holds them: `build/docs/fewstep`, with links.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def on_startup(command: str, dirty: bool) -> None:
    """Make the links, before mkdocstrings looks for its paths."""
    package = ROOT / "build" / "docs" / "fewstep"
    package.mkdir(parents=True, exist_ok=True)
    for marker in ROOT.glob("*/py.typed"):
        link = package / marker.parent.name
        if not link.is_symlink():
            link.symlink_to(marker.parent, target_is_directory=True)
