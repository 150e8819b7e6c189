"""`fewstep train`: what a run leaves behind, and that a killed run goes on undisturbed."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fewstep.agents import SFTPG
from fewstep.common.checkpoint import load_checkpoint
from fewstep.envs import make_mdp
from fewstep.runs.run.folder import described_changes
from fewstep.runs.run.logs import read_live_metric
from fewstep.runs.settings.train import parse

SCALARS = {
    "rollout/ep_rew_mean",
    "rollout/critic_real",
    "rollout/critic_fake",
    "train/policy_loss",
    "train/critic_loss",
    "train/baseline_loss",
    "train/grad_norm",
    "train/approx_kl",
    "train/ratio_first_batch",
    "eval/sliced_wasserstein",
    "eval/c2st",
    "eval/off_manifold",
    "time/fps",
}


def weights(path):
    """Everything in a checkpoint but the clock."""
    tree = load_checkpoint(path)
    return tree["denoiser"]["weights"] | tree["live"] | {"generator": tree["generator"]}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_a_run_leaves_all_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json",
        "denoiser.safetensors",
        "checkpoint.safetensors",
        "tableau.json",
        "cloning.csv",
        "progress.csv",
        "results.json",
        "samples.png",
        "trajectories.png",
        "curve.png",
        "tensorboard",
    }


def test_results_json_has_the_promised_shape(finished):
    results = json.loads((finished / "results.json").read_text())
    assert (results["env"], results["agent"], results["nfe"]) == ("SwissRoll", "sft-pg", 10)
    assert results["seconds"] > 0
    for metric in ("sliced_wasserstein", "sliced_wasserstein_fresh", "mmd"):
        assert set(results["metrics"][metric]) == {"before", "after", "floor"}
        assert all(value >= 0 for value in results["metrics"][metric].values())


def test_a_run_is_named_by_what_it_does_not_share_with_the_plain_one(finished):
    assert described_changes(parse([])) == []
    changes = "rounds=4__batch_size=16__pretrain.rounds=6__pretrain.batch_size=32"
    assert re.fullmatch(rf"SwissRoll__sft-pg__seed0__{changes}__\d{{8}}-\d{{6}}", finished.name)


def test_tensorboard_holds_scalars_pictures_and_hyperparameters(finished):
    events = EventAccumulator(str(finished / "tensorboard" / "sft-pg"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= SCALARS
    assert any(tag.startswith("samples/") for tag in tags["images"])
    assert events.PluginTagToContent("hparams")
    ratio = [event.value for event in events.Scalars("train/ratio_first_batch")]
    assert ratio == [1.0] * len(ratio)


def test_progress_csv_has_one_row_a_log_entry(finished):
    with (finished / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/policy_loss"]]) == 4
    assert len([row for row in rows if row["eval/sliced_wasserstein"]]) == 2


def test_the_same_seed_gives_the_same_run_and_config_repeats_it(finished, tmp_path, fewstep):
    config = finished / "config.json"
    assert fewstep("train", f"--config={config}", f"--log-dir={tmp_path}") == 0
    (again,) = tmp_path.iterdir()
    checkpoint = "checkpoint.safetensors"
    assert_same_weights(weights(finished / checkpoint), weights(again / checkpoint))


def test_the_checkpoint_is_an_agent_that_samples(finished):
    agent = SFTPG.load(finished / "checkpoint.safetensors", make_mdp("SwissRoll", steps=10))
    assert agent.sample(7).shape == (7, 2)
    assert agent.nfe == 10


@pytest.mark.slow
def test_resume_after_sigkill_gives_the_same_weights_bit_for_bit(tmp_path, fewstep, tiny):
    """Kill the run at random moments, resume until it is done, compare with the undisturbed run."""
    flags = [*tiny, "--rounds=20", "--pretrain.rounds=30", "--checkpoint-seconds=0"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert fewstep("train", f"--log-dir={undisturbed}", *flags) == 0
    command = [sys.executable, "-m", "fewstep.runs.cli", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = random.Random(0)
    arguments = [f"--log-dir={killed}", *flags]
    for _ in range(2):
        process = subprocess.Popen([*command, *arguments], env=environment)
        folder = wait_for_new_checkpoint(killed, process)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        ended = process.wait()
        arguments = ["--resume", str(folder)]
        if ended == 0:
            break  # a fast machine was done meanwhile
        assert ended == -signal.SIGKILL
    assert fewstep("train", *arguments) == 0
    (original,) = undisturbed.iterdir()
    for name in ("denoiser.safetensors", "checkpoint.safetensors"):
        assert_same_weights(weights(original / name), weights(folder / name))


def wait_for_new_checkpoint(log_dir, process):
    """Return the run folder once a checkpoint younger than this call is there."""
    began = time.time()
    while process.poll() is None:
        for path in log_dir.glob("*/*.safetensors"):
            if path.stat().st_mtime > began:
                return path.parent
        time.sleep(0.005)
    raise AssertionError("the run ended before it wrote a checkpoint")


def test_interrupt_saves_and_says_how_to_resume(tmp_path, fewstep, tiny, monkeypatch, capsys):
    tmp_path = tmp_path / ("a long [name] " * 10).strip()
    train_round = SFTPG.train_round

    def interrupted_round(self):
        if self.rounds == 1:
            signal.raise_signal(signal.SIGINT)
        return train_round(self)

    monkeypatch.setattr(SFTPG, "train_round", interrupted_round)
    assert fewstep("train", f"--log-dir={tmp_path}", *tiny) == 130
    (folder,) = tmp_path.iterdir()
    lines = capsys.readouterr().out.splitlines()
    # Unbroken, however long: they are there to be copied.
    assert f"Logs: {folder}" in lines
    assert f"Saved. Go on with:  fewstep train --resume {shlex.quote(str(folder))}" in lines
    monkeypatch.undo()
    assert load_checkpoint(folder / "checkpoint.safetensors")["rounds"] == 2
    assert fewstep("train", "--resume", folder) == 0
    assert load_checkpoint(folder / "checkpoint.safetensors")["rounds"] == 4


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, fewstep, tiny, monkeypatch, capsys):
    train_round = SFTPG.train_round

    def poisoned_round(self):
        metrics = train_round(self)
        if self.rounds == 2:
            metrics["train/policy_loss"] = torch.tensor(float("nan"))
        return metrics

    monkeypatch.setattr(SFTPG, "train_round", poisoned_round)
    assert fewstep("train", f"--log-dir={tmp_path}", "--checkpoint-seconds=0", *tiny) == 2
    assert "train/policy_loss" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert load_checkpoint(folder / "checkpoint.safetensors")["rounds"] == 2


@pytest.mark.parametrize("evaluations", [0, 1])
def test_cloning_that_diverges_says_so(evaluations, tmp_path, fewstep, capsys):
    """One step breaks the samples; weights and loss are still finite when the metric looks."""
    flags = ["--optimizer.learning-rate=1e9", "--rounds=1", f"--evaluations={evaluations}"]
    sizes = ["--batch-size=16", "--evaluation-samples=50"]
    assert fewstep("pretrain", *flags, *sizes, f"--log-dir={tmp_path}") == 2
    assert "Training went non-finite: a sample is NaN" in capsys.readouterr().err


def test_without_evaluations_there_is_no_live_metric(tmp_path, fewstep, tiny):
    given = ["--evaluations=0", "--preset=long", "--steps=3", "--seed=5"]
    assert fewstep("train", f"--log-dir={tmp_path}", *tiny, *given) == 0
    (folder,) = tmp_path.iterdir()
    # The name says which run it is, in what it does not share with a plain one.
    assert folder.name.startswith("SwissRoll__sft-pg__long__K3__seed5__")
    assert read_live_metric(folder / "progress.csv") is None
    assert not (folder / "curve.png").exists()
    assert json.loads((folder / "results.json").read_text())["metrics"]["mmd"]["after"] > 0


def test_a_damaged_run_says_what_to_delete(finished, tmp_path, fewstep, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for name in ("results.json", "checkpoint.safetensors"):
        damaged = copy / name
        damaged.write_bytes(damaged.read_bytes()[:20])
        assert fewstep("train", "--resume", copy) == 2
        said = capsys.readouterr().err
        assert str(damaged) in said
        assert "delete it" in said.lower()
        damaged.unlink()
    assert fewstep("train", "--resume", copy) == 0
    name = "checkpoint.safetensors"
    assert_same_weights(weights(finished / name), weights(copy / name))


@pytest.mark.parametrize("agent", ["sft", "sft-v", "behavior-cloning"])
def test_other_agents_train(tmp_path, fewstep, tiny, agent):
    if agent == "behavior-cloning":  # it has no stage before it
        tiny = [flag for flag in tiny if not flag.startswith("--pretrain")]
    assert fewstep("train", f"--log-dir={tmp_path}", *tiny, f"--agent={agent}") == 0
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert (results["agent"], results["nfe"]) == (agent, 10)
    if agent == "sft":
        cloned, tuned = (
            load_checkpoint(folder / f"{name}.safetensors")["denoiser"]["weights"]
            for name in ("denoiser", "checkpoint")
        )
        assert all(not torch.equal(cloned[key], tuned[key]) for key in cloned)


@pytest.mark.parametrize("env", ["Moons", "GaussianCluster", "Digits"])
def test_other_environments_train(tmp_path, fewstep, tiny, env):
    assert fewstep("train", f"--env={env}", "--steps=3", f"--log-dir={tmp_path}", *tiny) == 0
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "results.json").read_text())["nfe"] == 3


def test_a_pretrained_denoiser_is_where_the_agent_starts(finished, tmp_path, fewstep, tiny):
    denoiser = finished / "denoiser.safetensors"
    own = [flag for flag in tiny if not flag.startswith("--pretrain")]
    assert fewstep("train", f"--denoiser={denoiser}", f"--log-dir={tmp_path}", *own) == 0
    (folder,) = tmp_path.iterdir()
    before = [
        json.loads((path / "results.json").read_text())["metrics"]["mmd"]["before"]
        for path in (finished, folder)
    ]
    assert before[0] == before[1]


@pytest.mark.parametrize(("flags", "agent"), [(["--agent=sft"], None), ([], "behavior-cloning")])
def test_a_config_is_not_taken_for_another_agent(flags, agent, finished):
    with pytest.raises(ValueError, match="the settings of agent 'sft-pg', not of"):
        parse([f"--config={finished / 'config.json'}", *flags], agent)
