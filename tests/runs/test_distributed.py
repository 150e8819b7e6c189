"""`torchrun fewstep train`: two real processes train one run, and one of them writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fewstep.common.checkpoint import load_checkpoint


def torchrun(*flags: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "-m", "fewstep.runs.cli", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path, tiny, fewstep):
    finished = torchrun("train", "--device=cpu", f"--log-dir={tmp_path}", *tiny)
    assert finished.returncode == 0, finished.stderr
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    # One process evaluated, and what it evaluated is what the checkpoint holds.
    scores = tmp_path / "scores.json"
    assert fewstep("evaluate", folder, "--samples=500", f"--output={scores}") == 0
    assert json.loads(scores.read_text())["metrics"]["mmd"]["after"] == pytest.approx(
        results["metrics"]["mmd"]["after"], rel=1e-5
    )
    tree = load_checkpoint(folder / "checkpoint.safetensors")
    # Rounds, critic batches, batch size, steps, processes.
    assert tree["num_timesteps"] == 4 * 5 * 16 * 10 * 2
    assert finished.stdout.count("Evaluating") == 1


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path):
    refused = torchrun("train", "--env=Nowhere", f"--log-dir={tmp_path}")
    assert refused.returncode != 0
    assert refused.stderr.count("fewstep: unknown environment") == 1
