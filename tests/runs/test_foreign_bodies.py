"""A network of the user's own on the command line: named by the user, never by a file."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from fewstep.agents import SFTPG, Denoiser, SolverPolicy
from fewstep.agents.solvers import make_solver
from fewstep.envs import Schedule
from fewstep.envs.registration import make_mdp

NETWORKS = """
import torch
from torch import nn

IMPORTED = True


class Wide(nn.Module):
    def __init__(self, width=16, levels=10):
        super().__init__()
        self.table = nn.Embedding(levels, width)  # takes whole times only
        self.into, self.out = nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x, t):
        return self.out(torch.tanh(self.into(x) + self.table(t)))


class Nets:
    make = staticmethod(Wide)


def no_module():
    return {}


def misshapen():
    return nn.Sequential(Wide(), )


class Flat(Wide):
    def forward(self, x, t):
        return super().forward(x, t).sum(1)


class Pair(Wide):
    def forward(self, x, t):
        return super().forward(x, t), t


class Broken(Wide):
    def forward(self, x, t):
        raise KeyError("no such layer")


class Nothing(nn.Module):
    def forward(self, x, t):
        return x


ready = Wide()
number = 3
"""

BODY = "own_networks.small:Wide"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of the user's, with a package of networks."""
    path = tmp_path_factory.mktemp("home")
    package = path / "own_networks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "small.py").write_text(NETWORKS)
    (package / "untidy.py").write_text("import no_such_dependency\n")
    (package / "typo.py").write_text("def f(:\n")
    (package / "leaves.py").write_text("raise SystemExit(0)\n")
    return path


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    yield
    forget_networks()


def forget_networks():
    for name in [name for name in sys.modules if name.split(".")[0] == "own_networks"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def foreign_run(home, fewstep, tiny):
    """The folder of a run whose network is the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        given = [f"--body={BODY}", "--body-options", "width", "8", "--log-dir=logs"]
        assert fewstep("train", *tiny, *given) == 0
    forget_networks()  # whichever test asks for the run first must not find them imported
    (folder,) = (home / "logs").iterdir()
    return folder


def test_it_trains_and_every_command_takes_it(foreign_run, fewstep, tiny, tmp_path, capsys):
    config = json.loads((foreign_run / "config.json").read_text())["run"]
    assert (config["body"], config["body_options"]) == (BODY, {"width": 8})
    samples = tmp_path / "samples.npy"
    assert fewstep("sample", foreign_run, f"--body={BODY}", "--n=7", f"--output={samples}") == 0
    flags = [f"--body={BODY}", "--samples=300"]
    assert fewstep("evaluate", foreign_run, *flags, "--solver=ddim") == 0
    given = [f"--denoiser={foreign_run}", f"--body={BODY}", "--body-options", "width", "8"]
    own = [flag for flag in tiny if not flag.startswith("--pretrain")]
    assert fewstep("train", *own, *given, f"--log-dir={tmp_path}") == 0
    assert sys.path[0] != str(foreign_run.parent.parent)
    # In Python the same file, agent and samples.
    from own_networks.small import Wide

    mdp = make_mdp("SwissRoll")
    denoiser = Denoiser.load(foreign_run / "checkpoint.safetensors", body=Wide(8))
    agent = SFTPG.load(foreign_run / "checkpoint.safetensors", mdp, body=Wide(8))
    drawn = agent.sample(7, generator=torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_array_equal(np.load(samples), drawn)
    assert isinstance(denoiser.body, Wide)
    assert fewstep("export", foreign_run, f"--body={BODY}", tmp_path / "pipeline") == 2
    assert "Wide" in capsys.readouterr().err


def test_a_killed_run_goes_on_to_the_same_weights(foreign_run, fewstep, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(foreign_run, folder)
    (folder / "checkpoint.safetensors").unlink()
    assert fewstep("train", f"--resume={folder}", f"--body={BODY}") == 0
    files = (path / "checkpoint.safetensors" for path in (folder, foreign_run))
    first, second = (Denoiser.load(file, body=_wide()).body.state_dict() for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first)


def _wide():
    from own_networks.small import Wide

    return Wide(8)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--resume={}"],
        ["train", "--config={}/config.json"],
        ["train", "--denoiser={}"],
        ["train", "--denoiser={}/checkpoint.safetensors", "--body=mlp"],
        ["evaluate", "{}"],
        ["sample", "{}/denoiser.safetensors"],
        ["export", "{}"],
        ["analyze", "{}"],
    ],
)
def test_no_file_imports_code(command, foreign_run, fewstep, capsys):
    """What config.json says is a name, and stays one until the user repeats it."""
    assert fewstep(*(word.format(foreign_run) for word in command)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "imports no code: name the network with --body" in line
    assert "own_networks.small" not in sys.modules


def test_a_dode_run_of_it_is_analysed_with_the_flag_only(foreign_run, fewstep, tmp_path, capsys):
    given = [f"--denoiser={foreign_run}", f"--body={BODY}", "--body-options", "width", "8"]
    # It takes whole times only: ten noisings, of which the student takes every second.
    whole = ["--steps=5", "--integer-times", "--scale=2", "--no-check-teacher"]
    quick = ["--agent=dode", "--batch-size=20", "--evaluation-samples=300", *whole]
    assert fewstep("train", *given, *quick, f"--log-dir={tmp_path / 'logs'}") == 0
    (folder,) = (tmp_path / "logs").iterdir()
    flags = ["--samples=4", "--reference-steps=10", f"--output={tmp_path / 'analysis'}"]
    for name in [name for name in sys.modules if name.startswith("own_networks")]:
        del sys.modules[name]
    capsys.readouterr()
    assert fewstep("analyze", folder, *flags) == 2
    assert f"--body {BODY}" in capsys.readouterr().err
    assert "own_networks.small" not in sys.modules
    assert fewstep("analyze", folder, f"--body={BODY}", *flags) == 0


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("own_nets:Wide", "there is no module own_nets"),
        ("own_networks.tiny:Wide", "there is no module own_networks.tiny"),
        ("own_networks.untidy:Wide", "No module named 'no_such_dependency'"),
        ("own_networks.typo:Wide", "SyntaxError"),
        ("own_networks.leaves:Wide", "SystemExit"),
        ("own_networks.small:Narrow", "has no Narrow"),
        ("own_networks.small:Wide.narrow", "has no Wide.narrow"),
        ("own_networks.small:", "must be package.module:factory"),
        (":Wide", "must be package.module:factory"),
        (".small:Wide", "importing .small fails"),
        ("own_networks.small:no_module", "returns a dict"),
        ("own_networks.small:ready", "must be a function or a class"),
        ("own_networks.small:number", "must be a function or a class"),
        ("own_networks.small:misshapen", "takes 2 positional arguments but 3 were given"),
        ("own_networks.small:Flat", r"makes (2,) torch.float32 of x (2, 2)"),
        ("own_networks.small:Pair", "answers with a tuple"),
        ("own_networks.small:Broken", "fails for x (2, 2) and t (2,): KeyError: 'no such layer'"),
        ("own_networks.small:Nothing", "no parameters"),
        ("mlpp", "did you mean 'mlp'"),
    ],
)
def test_what_is_no_network_is_refused_in_one_sentence(body, says, fewstep, capsys):
    assert fewstep("pretrain", f"--body={body}", "--log-dir=nowhere") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fewstep: ") and says in line


def test_options_and_weights_that_do_not_fit_are_refused(foreign_run, fewstep, capsys):
    for words, says in (
        (["pretrain", f"--body={BODY}", "--body-options", "depth", "3"], "'depth'"),
        (["evaluate", foreign_run, f"--body={BODY}", "--body-options", "width", "9"], "do not fit"),
        (["evaluate", foreign_run, "--body=mlp"], "a network of your own"),
        (["train", f"--resume={foreign_run}", "--body=mlp"], "--body own_networks.small:Wide"),
        (["train", f"--resume={foreign_run}", f"--body={BODY}", "--seed=3"], "without --seed"),
    ):
        capsys.readouterr()
        assert fewstep(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_a_run_of_ours_wants_no_flag(finished, fewstep, capsys):
    assert fewstep("train", f"--resume={finished}", f"--body={BODY}") == 2
    assert "leave out --body" in capsys.readouterr().err


def test_a_rescaled_denoiser_is_a_file_like_any_other(finished, fewstep, tmp_path):
    rescaled = Denoiser.load(finished / "checkpoint.safetensors").rescaled(0.1)
    rescaled.save(tmp_path / "rescaled.safetensors")
    flags = ["--env=SwissRoll", "--solver=ddim", "--schedule=10,8,6,3,0", "--n=20"]
    output = tmp_path / "samples.npy"
    source = tmp_path / "rescaled.safetensors"
    assert fewstep("sample", source, *flags, "--device=cpu", f"--output={output}") == 0
    tableau = make_solver("ddim", Schedule(rescaled.process, [10, 8, 6, 3, 0]))
    expected = SolverPolicy(tableau, rescaled).sample(
        20, shape=(2,), generator=torch.Generator().manual_seed(0)
    )
    np.testing.assert_allclose(np.load(output), expected.numpy(), rtol=1e-5, atol=1e-6)
