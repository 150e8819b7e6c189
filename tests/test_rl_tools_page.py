"""The snippets of docs/rl-tools.md run as they stand, but for those of absent clients."""

import importlib.util
import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "rl-tools.md").read_text()
CLIENTS = ("sb3_contrib", "torchrl")


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    absent = [client for client in CLIENTS if importlib.util.find_spec(client) is None]
    ran = [part for part in snippets if not any(client in part for client in absent)]
    assert len(ran) == 5 - len(absent)
    for snippet in ran:
        exec(compile(snippet, "rl-tools.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.count("mean reward:") == 3
