"""`fewstep train`: what a run leaves behind, and that a killed run goes on undisturbed."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fewstep.agents import SFTPG
from fewstep.agents.checkpoint import load_checkpoint
from fewstep.envs import make_mdp

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


def test_resume_after_sigkill_gives_the_same_weights_bit_for_bit(tmp_path, fewstep, tiny):
    """Kill the run at random moments, resume until it is done, compare with the undisturbed run."""
    flags = [*tiny, "--rounds=40", "--pretrain.rounds=40", "--checkpoint-seconds=0"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert fewstep("train", f"--log-dir={undisturbed}", *flags) == 0
    command = [sys.executable, "-m", "fewstep.runs.cli", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = random.Random(0)
    arguments = [f"--log-dir={killed}", *flags]
    for _ in range(3):
        process = subprocess.Popen([*command, *arguments], env=environment)
        folder = wait_for_new_checkpoint(killed, process)
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        arguments = ["--resume", str(folder)]
    assert subprocess.run([*command, *arguments], env=environment, check=False).returncode == 0
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
    train_round = SFTPG.train_round

    def interrupted_round(self):
        if self.rounds == 1:
            signal.raise_signal(signal.SIGINT)
        return train_round(self)

    monkeypatch.setattr(SFTPG, "train_round", interrupted_round)
    assert fewstep("train", f"--log-dir={tmp_path}", *tiny) == 130
    (folder,) = tmp_path.iterdir()
    assert "--resume" in capsys.readouterr().out
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
    assert fewstep("train", f"--log-dir={tmp_path}", "--checkpoint-seconds=0", *tiny) == 1
    assert "train/policy_loss" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert load_checkpoint(folder / "checkpoint.safetensors")["rounds"] == 2


@pytest.mark.parametrize("agent", ["sft", "behavior-cloning"])
def test_other_agents_train(tmp_path, fewstep, tiny, agent):
    assert fewstep("train", f"--agent={agent}", f"--log-dir={tmp_path}", *tiny) == 0


@pytest.mark.parametrize("env", ["Moons", "GaussianCluster", "Digits"])
def test_other_environments_train(tmp_path, fewstep, tiny, env):
    assert fewstep("train", f"--env={env}", "--steps=3", f"--log-dir={tmp_path}", *tiny) == 0
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "results.json").read_text())["nfe"] == 3


def test_a_pretrained_denoiser_is_where_the_agent_starts(finished, tmp_path, fewstep, tiny):
    denoiser = finished / "denoiser.safetensors"
    assert fewstep("train", f"--denoiser={denoiser}", f"--log-dir={tmp_path}", *tiny) == 0
    (folder,) = tmp_path.iterdir()
    before = [
        json.loads((path / "results.json").read_text())["metrics"]["mmd"]["before"]
        for path in (finished, folder)
    ]
    assert before[0] == before[1]
