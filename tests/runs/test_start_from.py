"""`--start-from RUN`: another agent goes on from an earlier run's network and table."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fewstep.agents import AGENTS, RDPO, SFTPG, Denoiser, Tableau
from fewstep.common.checkpoint import load_checkpoint
from fewstep.runs.run.building import build_mdp
from fewstep.runs.settings.train import Settings

QUICK = ["--evaluations=0", "--evaluation-samples=200"]
SFD_FLAGS = [
    *("--agent=sfd", "--rounds=2", "--batch-size=8", "--held-out.size=8", "--fine.no-check"),
    *QUICK,
]
SFT_FLAGS = ["--agent=sft", "--rounds=2", "--batch-size=8", *QUICK]
RDPO_FLAGS = ["--agent=rdpo", "--rounds=2", "--batch-size=8", "--held-out=20", *QUICK]


@pytest.fixture(scope="module")
def run(tmp_path_factory, fewstep):
    """`run(*flags)`: the folder of a finished `fewstep train`."""
    log_dir = tmp_path_factory.mktemp("logs")

    def start(*flags):
        before = set(log_dir.iterdir())
        assert fewstep("train", f"--log-dir={log_dir}", *flags) == 0
        (folder,) = set(log_dir.iterdir()) - before
        return folder

    return start


@pytest.fixture(scope="module")
def solved(run):
    """A run of solver learning on the moons, which moves the times a little."""
    small = ["--batch-size=20", "--batches=1", "--start=distilled", "--scale=2"]
    small += ["--descent.optimizer=adam", "--descent.rounds=2", "--no-check-teacher"]
    cloning = ["--pretrain.rounds=6", "--pretrain.batch-size=32"]
    return run("--agent=solver", "--env=Moons", "--steps=3", *small, *cloning, *QUICK)


@pytest.mark.parametrize("flags", [SFD_FLAGS, SFT_FLAGS], ids=["sfd", "sft"])
def test_an_agent_takes_up_network_table_and_environment(flags, solved, run):
    folder = run(f"--start-from={solved}", *flags)
    assert json.loads((folder / "results.json").read_text())["env"] == "Moons"
    table, before = (Tableau.load(place / "tableau.json") for place in (folder, solved))
    assert table.to_json() == before.to_json()
    started, network = (Denoiser.load(p / "denoiser.safetensors") for p in (folder, solved))
    for ours, theirs in zip(started.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    kind = AGENTS[flags[0].removeprefix("--agent=")]
    agent = kind.load(folder / "checkpoint.safetensors", build_mdp(_settings(folder)))
    assert agent.tableau.to_json() == before.to_json()


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.filterwarnings("ignore:RDPO made:UserWarning")
def test_rdpo_draws_around_the_learned_table(by_file, solved, run, fewstep, tmp_path):
    """Its own checkpoint has the table, whose file or run may be gone."""
    earlier, before = tmp_path / "earlier", Tableau.load(solved / "tableau.json")
    shutil.copytree(solved, earlier)
    start = [f"--start-from={earlier}"]
    if by_file:
        start = [f"--denoiser={solved}", f"--table={earlier / 'tableau.json'}", "--env=Moons"]
    folder = run(*start, *RDPO_FLAGS)
    assert before.name.startswith("learned")
    checkpoint = folder / "checkpoint.safetensors"
    ends = load_checkpoint(checkpoint)["state"]
    agent = RDPO.load(checkpoint, build_mdp(_settings(folder), kept=folder / "start.json"))
    assert agent.given.to_json() == before.to_json()
    assert agent.mdp.schedule.times.tolist() == before.times.tolist()
    rewards = json.loads((folder / "results.json").read_text())["rewards"]
    assert rewards["given"] == pytest.approx(float(agent.judge(before).mean()), rel=1e-5)
    shutil.rmtree(earlier)
    (folder / "results.json").unlink()
    assert fewstep("train", f"--resume={folder}") == 0
    if not by_file:  # a file that is named is needed until there is a checkpoint
        checkpoint.unlink()
        assert fewstep("train", f"--resume={folder}") == 0
    again = load_checkpoint(checkpoint)["state"]
    assert torch.equal(again["mean"], ends["mean"]) and again["tableau"] == before.to_json()


def test_one_that_takes_no_table_has_its_times(solved, run):
    flags = ["--agent=sft-pg", "--rounds=1", "--batch-size=8", "--minibatch-size=8", *QUICK]
    folder = run(f"--start-from={solved}", *flags)
    table, before = (Tableau.load(place / "tableau.json") for place in (folder, solved))
    np.testing.assert_array_equal(table.times, before.times)
    assert table.name.startswith("ancestral")
    other = run(f"--start-from={solved}", "--steps=2", *flags)
    agent = SFTPG.load(other / "checkpoint.safetensors", build_mdp(_settings(other)))
    assert agent.nfe == 2


@pytest.mark.slow
def test_the_times_alone_are_taken_over_by_name(solved, run):
    schedule = f"--schedule={solved / 'schedule.json'}"
    table = Tableau.load(run(f"--start-from={solved}", schedule, *SFT_FLAGS) / "tableau.json")
    assert table.name.startswith("ancestral")
    np.testing.assert_array_equal(table.times, Tableau.load(solved / "tableau.json").times)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [SFD_FLAGS, SFT_FLAGS], ids=["sfd", "sft"])
def test_a_chain_resumes_when_the_earlier_run_is_gone(flags, solved, run, fewstep, tmp_path):
    earlier = tmp_path / "earlier"
    shutil.copytree(solved, earlier)
    whole = run(f"--start-from={earlier}", *flags)
    ends = Denoiser.load(whole / "checkpoint.safetensors").state_dict()
    (whole / "checkpoint.safetensors").unlink()
    shutil.rmtree(earlier)
    assert fewstep("train", f"--resume={whole}") == 0
    again = Denoiser.load(whole / "checkpoint.safetensors").state_dict()
    assert all(torch.equal(ends[key], again[key]) for key in ends)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start-from=nowhere", "--agent=sfd"], "No run at nowhere to start from"),
        (["--start-from={run}", "--denoiser={run}", "--agent=sfd"], "Give one of --denoiser"),
        (["--start-from={run}", "--agent=behavior-cloning"], "starts from nothing"),
        (["--start-from={run}", "--agent=rdpo", "--solver=ddim"], "they differ in output"),
        (["--start-from={run}", "--agent=rdpo", "--learn.no-weights"], "they differ in weights"),
        (["--start-from={run}", "--agent=sfd", "--env=SwissRoll", "--process=ve"], "--process ve"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(flags, message, solved, fewstep, capsys):
    assert fewstep("train", *(flag.format(run=solved) for flag in flags)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said


def _settings(folder):
    return Settings.from_json(folder / "config.json")
