"""Flow matching models from the command line: every agent, and the solvers on what it leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.solvers import SOLVERS
from fewstep.envs import RectifiedFlow

TINY = [
    "--evaluation-samples=500",
    "--pretrain.rounds=6",
    "--pretrain.batch-size=32",
    "--process=flow",
]
AGENTS = {
    "sft-pg": ["--rounds=4", "--batch-size=16", "--evaluations=2"],
    "dode": ["--batches=2", "--batch-size=16"],
    "schedule": ["--schedule-rounds=6", "--tuning.rounds=4", "--batch-size=60", "--batches=1"],
    "sfd": ["--rounds=3", "--batch-size=16", "--held-out.size=20"],
    "pd": ["--rounds=2", "--batch-size=16", "--held-out.size=20", "--teacher-steps=20"],
    "cd": ["--rounds=3", "--batch-size=16", "--held-out.size=20", "--fine.scale=2"],
    "dmd": ["--rounds=2", "--batch-size=16", "--held-out.size=20", "--n-fake=1"],
    "solver": ["--preset=gs", "--descent.rounds=3", "--batch-size=60", "--start=distilled"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fewstep):
    """`trained(agent)`: the folder of its finished run on a flow, the denoiser cloned once."""
    folders = {}

    def train(agent):
        if agent not in folders:
            log_dir = tmp_path_factory.mktemp(agent)
            flags = [f"--agent={agent}", *AGENTS[agent], *TINY, f"--log-dir={log_dir}"]
            assert fewstep("train", *flags) == 0
            (folders[agent],) = log_dir.iterdir()
        return folders[agent]

    return train


SLOW = {"schedule", "solver", "sfd", "pd", "cd", "dmd"}


@pytest.mark.parametrize(
    "agent",
    [
        *sorted(set(AGENTS) - SLOW),
        *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(SLOW)),
    ],
)
def test_a_flow_is_cloned_and_trained(agent, trained):
    folder = trained(agent)
    denoiser = Denoiser.load(folder / "denoiser.safetensors")
    assert (denoiser.process, denoiser.prediction) == (RectifiedFlow(), "flow")
    table = Tableau.load(folder / "tableau.json")
    assert table.process == RectifiedFlow() and table.nfe == 10
    if agent == "sft-pg":
        assert (table.noise > 0).all() and table.noise[-1] == 0.01
    if agent not in ("schedule", "solver"):
        # A first time without signal has no noise level: the learned schedules start at one.
        assert table.times[0] == 1
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert all(np.isfinite(list(values.values())).all() for values in metrics.values())


@pytest.mark.parametrize("solver", [n for n, s in SOLVERS.items() if s.needs is None])
def test_every_solver_samples_from_a_flow(solver, trained, tmp_path, fewstep):
    output = tmp_path / "samples.npy"
    flags = [f"--solver={solver}", "--steps=6", "--n=5", f"--output={output}"]
    assert fewstep("sample", trained("sft-pg"), *flags) == 0
    assert np.isfinite(np.load(output)).all()


@pytest.mark.parametrize(("solver", "calls"), [("unipc-2", 6), ("flow-heun", 11)])
def test_a_flow_is_evaluated(solver, calls, trained, tmp_path, fewstep):
    scores = tmp_path / "scores.json"
    flags = [f"--solver={solver}", "--steps=6", "--samples=500", f"--output={scores}"]
    assert fewstep("evaluate", trained("dode"), *flags) == 0
    assert json.loads(scores.read_text())["nfe"] == calls


def test_a_last_noising_without_signal_is_cloned_and_trained(tmp_path, fewstep):
    flags = [*AGENTS["sft-pg"], *TINY[:-1], "--agent=sft-pg", "--process=linear-1000-zero-snr"]
    assert fewstep("train", *flags, f"--log-dir={tmp_path}") == 0
    (folder,) = tmp_path.iterdir()
    denoiser = Denoiser.load(folder / "denoiser.safetensors")
    assert denoiser.prediction == "v" and denoiser.process.levels(1000.0)[0] == 0


def test_a_run_goes_on_without_the_table_s_file(trained, tmp_path, fewstep):
    """The checkpoint holds it."""
    before, table = trained("dode"), tmp_path / "table.json"
    table.write_bytes((before / "tableau.json").read_bytes())
    where = [f"--denoiser={before}", f"--table={table}", f"--log-dir={tmp_path / 'logs'}"]
    assert fewstep("train", "--agent=sfd", *AGENTS["sfd"], *TINY[-4:-3], *where) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    table.unlink()
    (folder / "results.json").unlink()
    assert fewstep("train", "--resume", folder) == 0
    assert json.loads((folder / "results.json").read_text())["metrics"]
