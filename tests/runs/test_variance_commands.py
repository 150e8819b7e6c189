"""Variance learning and the fast DDPM samplers on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fewstep.agents import Denoiser, Tableau, VarianceLearning
from fewstep.agents.samplers.sampling import sampler_of
from fewstep.agents.solvers import fast_dpm
from fewstep.envs import Schedule
from fewstep.runs.run.building import build_mdp
from fewstep.runs.settings.train import Settings

CLONING = ["--pretrain.rounds=6", "--pretrain.batch-size=32", "--evaluation-samples=500"]
AGENT = [
    "--agent=variance",
    "--steps=4",
    "--process=linear-20",
    "--batch-size=32",
    "--head.hidden=8",
]
SOLVERS = {"gamma": "analytic-dpm", "sn": "sn-ddpm", "npr": "npr-ddpm"}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, fewstep):
    """`learned(kind)`: the folder of a finished `fewstep train --agent variance`."""
    folders = {}

    def run(kind):
        if kind not in folders:
            log_dir = tmp_path_factory.mktemp(kind)
            rounds = ["--samples-per-time=8"] if kind == "gamma" else ["--rounds=3"]
            flags = [f"--kind={kind}", *rounds, *AGENT, *CLONING]
            assert fewstep("train", *flags, f"--log-dir={log_dir}") == 0
            (folders[kind],) = log_dir.iterdir()
        return folders[kind]

    return run


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_run_leaves_a_sampler(kind, learned, tmp_path, fewstep):
    folder = learned(kind)
    results = json.loads((folder / "results.json").read_text())
    assert (results["agent"], results["nfe"]) == ("variance", 4)
    assert {"before", "after"} <= set(results["metrics"]["sliced_wasserstein"])
    mdp = build_mdp(Settings.from_json(folder / "config.json"))
    agent = VarianceLearning.load(folder / "checkpoint.safetensors", mdp)
    assert agent.rounds == (5 if kind == "gamma" else 3)
    table = Tableau.load(folder / "tableau.json")
    assert table.to_json() == agent.tableau.to_json()
    assert table.name == f"{SOLVERS[kind]} (unclipped)"
    # Its table is what samples by default; other numbers of steps need the solver's name.
    for flags in ([], [f"--solver={SOLVERS[kind]}", "--steps=7"]):
        output = tmp_path / "samples.npy"
        assert fewstep("sample", folder, "--n=5", *flags, f"--output={output}") == 0
        assert np.isfinite(np.load(output)).all()


@pytest.mark.parametrize("kind", ["gamma", "npr"])
def test_sft_pg_starts_from_what_was_learned(kind, learned, tmp_path, fewstep, tiny):
    flags = ["--agent=sft-pg", f"--denoiser={learned(kind)}", f"--solver={SOLVERS[kind]}"]
    flags += ["--solver-options", "last_std", "0.05", "--policy.learn-std", "--steps=4"]
    tiny = [flag for flag in tiny if not flag.startswith("--pretrain")]
    assert fewstep("train", *flags, *tiny, f"--log-dir={tmp_path}") == 0
    (folder,) = tmp_path.iterdir()
    denoiser = Denoiser.load(folder / "checkpoint.safetensors")
    assert (denoiser.gamma is not None) == (kind == "gamma")
    assert (denoiser.head is not None) == (kind != "gamma")


def test_a_denoiser_that_lacks_what_a_solver_needs_is_told_how(learned, capsys, fewstep):
    for flags in (
        ["sample", learned("gamma"), "--solver=sn-ddpm", "--steps=4"],
        ["train", "--solver=sn-ddpm"],
    ):
        assert fewstep(*flags) != 0
        assert "--agent variance --kind sn" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["var", "step"])
def test_fast_dpm_by_name(kind, learned, tmp_path, fewstep):
    folder, output = learned("gamma"), tmp_path / "samples.npy"
    flags = ["--solver=fast-dpm", "--solver-options", "kappa", "0.5", "--steps=4"]
    flags += ["--schedule=fast_dpm", "--schedule-options", "kind", kind, "spacing", "linear"]
    assert fewstep("sample", folder, *flags, "--n=5", f"--output={output}") == 0
    denoiser = Denoiser.load(folder / "checkpoint.safetensors")
    schedule = Schedule.fast_dpm(denoiser.process, 4, kind=kind, spacing="linear")
    draw = sampler_of(fast_dpm(schedule, 0.5), denoiser, (2,))
    expected = draw(5, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_array_equal(np.load(output), expected)
