"""Schedule learning on the command line: train, compose with other agents, compare in a study."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fewstep.agents import Denoiser, ScheduleLearning, Tableau
from fewstep.envs import VE, Schedule
from fewstep.runs.run.building import build_mdp
from fewstep.runs.settings.train import Settings

CLONING = ["--pretrain.rounds=60", "--pretrain.batch-size=256", "--evaluation-samples=500"]
# Where it need not be good.
CLONED = ["--pretrain.rounds=6", "--pretrain.batch-size=32", "--evaluation-samples=100"]
FEW = ["--schedule-rounds=12", "--tuning.rounds=4", "--batch-size=60", "--batches=1"]
AGENT = ["--agent=schedule", "--steps=6", "--log-interval=1", "--evaluations=1", *FEW]


@pytest.fixture(scope="module")
def learned(tmp_path_factory, fewstep):
    """The folder of a finished `fewstep train --agent schedule`."""
    log_dir = tmp_path_factory.mktemp("logs")
    assert fewstep("train", *AGENT, *CLONING, f"--log-dir={log_dir}") == 0
    (folder,) = log_dir.iterdir()
    return folder


def test_a_run_leaves_a_schedule_and_shows_it(learned):
    for picture in ("schedule", "samples", "trajectories"):
        assert (learned / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    schedule = Schedule.load(learned / "schedule.json")
    assert (schedule.process, schedule.steps, float(schedule.times[-1])) == (VE(), 6, 0)
    assert not torch.equal(schedule.times, Schedule.karras(VE(), 6).times)
    table = Tableau.load(learned / "tableau.json")
    np.testing.assert_array_equal(table.times, schedule.times)
    results = json.loads((learned / "results.json").read_text())
    assert results["errors"]["returned"] < results["errors"]["given"]
    np.testing.assert_allclose(results["levels"], schedule.times[:-1])
    mdp = build_mdp(Settings.from_json(learned / "config.json"))
    agent = ScheduleLearning.load(learned / "checkpoint.safetensors", mdp)
    assert agent.schedule == schedule
    events = EventAccumulator(str(learned / "tensorboard" / "schedule"))
    events.Reload()
    shown = {"train/disc_loss", "train/held_out_error", "train/level_003"}
    assert shown | {"train/loss", "eval/sliced_wasserstein"} <= set(events.Tags()["scalars"])


def test_the_learned_schedule_samples(learned, tmp_path, fewstep):
    scores = tmp_path / "scores.json"
    assert fewstep("evaluate", learned, "--samples=500", f"--output={scores}") == 0
    results = json.loads(scores.read_text())
    trained = json.loads((learned / "results.json").read_text())["metrics"]
    assert results["metrics"]["mmd"]["after"] == trained["mmd"]["after"]
    for solver, nfe in (("ipndm", 6), ("heun", 11), ("deis", 6)):
        flags = [f"--solver={solver}", f"--schedule={learned / 'schedule.json'}"]
        assert fewstep("evaluate", learned, *flags, "--samples=500", f"--output={scores}") == 0
        assert json.loads(scores.read_text())["nfe"] == nfe


@pytest.mark.parametrize(
    ("agent", "flags"),
    [
        ("dode", ["--batches=1"]),
        ("sft-pg", ["--rounds=2", "--batch-size=16"]),
        ("schedule", [*FEW, "--solver=ipndm", "--start=environment"]),
    ],
)
def test_other_agents_start_from_the_learned_schedule(agent, flags, learned, tmp_path, fewstep):
    given = [f"--denoiser={learned}", f"--schedule={learned / 'schedule.json'}"]
    common = ["--evaluation-samples=100", "--evaluations=1", f"--log-dir={tmp_path}"]
    assert fewstep("train", f"--agent={agent}", *given, *flags, *common) == 0
    (folder,) = tmp_path.iterdir()
    mdp = build_mdp(Settings.from_json(folder / "config.json"))
    assert mdp.schedule == Schedule.load(learned / "schedule.json")


def test_a_schedule_brings_its_process(learned, tmp_path, fewstep):
    schedule = f"--schedule={learned / 'schedule.json'}"
    flags = ["--agent=dode", "--batches=1", *CLONED, schedule, f"--log-dir={tmp_path}"]
    assert fewstep("train", *flags) == 0
    (folder,) = tmp_path.iterdir()
    assert Denoiser.load(folder / "denoiser.safetensors").process == VE()


@pytest.mark.slow
def test_a_run_is_interrupted_in_either_stage_and_resumed(learned, tmp_path, fewstep, monkeypatch):
    common = [*AGENT, f"--denoiser={learned}", "--evaluation-samples=100"]
    assert fewstep("train", *common, f"--log-dir={tmp_path / 'whole'}") == 0
    (whole,) = (tmp_path / "whole").iterdir()
    train_round = ScheduleLearning.train_round
    for stop in (5, 14):
        log_dir = tmp_path / str(stop)

        def killed(self, stop=stop):
            if self.rounds == stop:
                raise KeyboardInterrupt
            return train_round(self)

        monkeypatch.setattr(ScheduleLearning, "train_round", killed)
        flags = [f"--log-dir={log_dir}", "--checkpoint-seconds=0"]
        assert fewstep("train", *common, *flags) == 130
        monkeypatch.undo()
        (folder,) = log_dir.iterdir()
        assert Schedule.load(folder / "schedule.json").steps == 6
        assert fewstep("train", "--resume", folder) == 0
        assert Schedule.load(folder / "schedule.json") == Schedule.load(whole / "schedule.json")
        weights = [
            Denoiser.load(path / "checkpoint.safetensors").state_dict() for path in (whole, folder)
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_vp_process_learns_too(tmp_path, fewstep):
    flags = [*AGENT, *CLONED, "--process=linear-1000", "--solver=dpm-solver++-2m"]
    assert fewstep("train", *flags, f"--log-dir={tmp_path}") == 0
    (folder,) = tmp_path.iterdir()
    schedule = Schedule.load(folder / "schedule.json")
    assert float(schedule.times[0]) == 1000
    assert float(schedule.times[-1]) == 1
    assert len(json.loads((folder / "results.json").read_text())["levels"]) == 7


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps=2"], "at least 3 noise levels"),
        (["--process=ve-80-0.002"], "need 0 < sigma_min < sigma_max"),
        (["--solver=ancestral"], "adds noise"),
        (["--gradient=eq14", "--solver=ipndm"], "derived for Euler's steps"),
        (["--gradient=slope"], ", got 'slope'"),
        (["--start=nowhere"], "unknown start 'nowhere'"),
        (["--schedule=missing.json"], "No schedule at missing.json"),
        (["--schedule=80,40,50,1,0", "--process=ve"], "must strictly decrease"),
        (["--schedule-rounds=0", "--tuning.rounds=0"], "nothing to do"),
        (["--tuning.learning-rate=nan"], "--tuning.learning-rate must be above 0"),
    ],
)
def test_bad_settings_are_one_sentence_and_no_folder(flags, says, tmp_path, fewstep, capsys):
    assert fewstep("train", "--agent=schedule", *flags, f"--log-dir={tmp_path}") == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_schedule_of_another_kind_is_refused(learned, finished, tmp_path, fewstep, capsys):
    schedule = learned / "schedule.json"
    flags = ["--solver=ddim", f"--schedule={schedule}", "--samples=100"]
    assert fewstep("evaluate", finished, *flags) == 2
    assert "the schedule is made for VE" in capsys.readouterr().err
    assert fewstep("evaluate", learned, "--solver=ddim", "--steps=4", f"--schedule={schedule}") == 2
    assert "steps=4, but the given schedule has 6" in capsys.readouterr().err
    foreign = tmp_path / "foreign.json"
    foreign.write_text((learned / "tableau.json").read_text())
    assert fewstep("evaluate", learned, "--solver=ddim", f"--schedule={foreign}") == 2
    assert "is not a schedule" in capsys.readouterr().err
