"""What the command line says of its flags: one sentence, in the words of whoever typed them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.agents.presets import FINE_TUNING, preset_names
from fewstep.runs.run import folder as run_folder
from fewstep.runs.run.run import Run
from fewstep.runs.settings.train import Settings, parse

PRETRAIN = "fewstep pretrain clones a denoiser, with --agent behavior-cloning; for --agent sft "
SENTENCES = {
    "pretrain --agent sft": f"{PRETRAIN}there is fewstep train.",
    "train --env": "--env needs a value.",
    "train --resume": "--resume needs a value.",
    "train --steps": "--steps needs a value.",
    "evaluate x --samples": "--samples needs a value.",
    "train --rounds two": "--rounds must be a whole number, got 'two'.",
    "train --steps 2.5": "--steps must be a whole number, got '2.5'.",
    "train --optimizer.learning-rate fast": "-rate must be a number, got 'fast'.",
    "benchmark main --seeds 0 x": "--seeds must be whole numbers, got '0 x'.",
    "benchmark main --seeds": "--seeds needs whole numbers.",
    "train --execution.buffer 3": (
        "--execution.buffer must be cpu, cpu-float16, float16 or float32, got '3'."
    ),
    "train --guidance-interval=1": "--guidance-interval must be two numbers, got '1'.",
    "train --guidance-interval": "--guidance-interval needs two numbers.",
    "train --optimizer.betas 1 x": "--optimizer.betas must be two numbers, got '1 x'.",
    "train --optimizer.betas 1.5 0.5": "--optimizer.betas must be at least 0 and below 1 each, got",
    "train --agent rdpo --gradient.betas 0.5 1": "--gradient.betas must be at least 0 and below 1",
    "train --agent solver --preset gas --critic.network denoiser": (
        "take critic_network='own'. (--critic.network own)\n"
    ),
    "train --solver-options a b c": "--solver-options must be KEY VALUE pairs, got 'a b c'.",
    "train --download maybe": "--download takes no value, got 'maybe'.",
    "train --rounds 5 6": "'6' belongs to no flag: leave it out.",
    "sample --n 3": "fewstep sample needs an argument: A run folder",
    "evaluate x --schedule=": "--schedule is empty: give it a value, or leave it out.",
    "evaluate x --env=": "--env is empty: give it a value, or leave it out.",
    "train --inpaint=": "--inpaint is empty: give it a value, or leave it out.",
    "evaluate x --image-size 0": "--image-size must be at least 1, got 0.",
    "train --image-size 0": "--image-size must be at least 1, got 0.",
    "train --pretrained x --pretrain.rounds 5": "--pretrain.rounds is for a denoiser that",
    "pretrain --pretrain.rounds 5": "of --agent behavior-cloning it is --rounds.",
    "analyze x --output /dev/null": "Cannot write --output /dev/null: it is a file.",
    "distil x --output /dev/null/x": "/dev/null is no writable folder.",
    "export x /dev/null": "Cannot write a pipeline to /dev/null: it is a file.",
    "benchmark memory --log-dir /dev/null": "/dev/null is no writable folder.",
}


def test_a_preset_with_a_critic_of_its_own_is_advised_where_there_is_one(
    fewstep, capsys, monkeypatch
):
    assert {"default", "small-critic"} <= preset_names("MNIST", "sft")
    monkeypatch.setitem(FINE_TUNING, ("SwissRoll", "sft", "small-critic"), {})
    flags = ["--env=SwissRoll", "--agent=sft", "--critic.network=denoiser"]
    assert fewstep("train", *flags) == 2
    assert "take --preset small-critic" in capsys.readouterr().err


@pytest.mark.parametrize("words", SENTENCES)
def test_a_flag_that_cannot_be_read_ends_in_one_plain_sentence(words, fewstep, capsys):
    assert fewstep(*words.split()) == 2
    said = capsys.readouterr().err
    assert SENTENCES[words] in said
    assert said.startswith("fewstep: ")
    assert said.count("\n") == 1


def test_an_empty_word_is_an_empty_value(fewstep, capsys):
    assert fewstep("evaluate", "x", "--solver", "") == 2
    assert "--solver is empty" in capsys.readouterr().err


def test_an_early_flag_may_be_written_with_an_underscore(finished):
    assert parse(["--start_from", str(finished), "--agent=sft"]).run.start_from == finished


def test_a_preset_does_not_go_with_a_settings_file(finished, fewstep, capsys):
    assert fewstep("train", f"--config={finished / 'config.json'}", "--preset=long") == 2
    assert "leave out --preset or --config" in capsys.readouterr().err


def test_a_flag_beside_a_settings_file_wins(finished):
    config = f"--config={finished / 'config.json'}"
    assert parse([config, "--env=fewstep/Moons-v0", "--seed=3"]).run.env == "Moons"


@pytest.mark.parametrize(
    ("part", "name", "options", "other"),
    [
        ("agent", "solver", {"last_std": 0.1}, "euler"),
        ("run", "schedule", {"rho": 5.0}, "uniform"),
        ("run", "body", {"hidden": 16}, "residual-mlp"),
        ("cloning", "solver", {"last_std": 0.1}, "euler"),
    ],
)
def test_a_settings_file_s_options_go_with_what_they_are_of(
    part, name, options, other, finished, tmp_path
):
    tree = json.loads((finished / "config.json").read_text())
    own = {"solver": "ancestral", "schedule": "karras", "body": "mlp"}[name]
    tree[part] |= {name: own, f"{name}_options": options}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config, flag = f"--config={tmp_path / 'config.json'}", f"--{name}"
    if part == "cloning":
        flag = f"--pretrain.{name}"

    def kept(*flags):
        return getattr(getattr(parse([config, *flags]), part), f"{name}_options")

    assert kept() == kept(f"{flag}={own}") == options
    assert kept(f"{flag}={other}") is None
    assert kept(flag, other, f"{flag}-options", "end", "1.0") == {"end": 1.0}


def test_a_run_is_exported_as_of_its_own_environment(finished, fewstep, capsys, tmp_path):
    assert fewstep("export", finished, tmp_path / "pipeline", "--env=Moons") == 2
    assert "is a run in SwissRoll: leave out --env" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_not_resumed(finished, fewstep, capsys, monkeypatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder, "TemporaryFile", refuse)
    assert fewstep("train", "--resume", finished) == 2
    assert f"Cannot write --resume {finished}" in capsys.readouterr().err


def test_a_run_that_was_moved_names_the_folder_it_is_in(finished, fewstep, capsys, tmp_path):
    moved = finished.rename(tmp_path / "moved")
    try:
        assert fewstep("train", "--resume", moved) == 0
        out = capsys.readouterr().out
    finally:
        moved.rename(finished)
    assert f"tensorboard --logdir {tmp_path}\n" in out
    assert str(finished.parent) not in out


def test_an_interrupt_before_the_first_checkpoint_says_how_to_start_anew(
    tmp_path, tiny, fewstep, capsys, monkeypatch
):
    def interrupt(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "carry_through", interrupt)
    assert fewstep("train", f"--log-dir={tmp_path}", *tiny) == 130
    (path,) = tmp_path.iterdir()
    said = capsys.readouterr()
    assert f"fewstep train --config {path / 'config.json'}" in said.out
    assert Settings.from_json(path / "config.json").agent.rounds == 4


def test_a_reader_who_has_enough_ends_a_command_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fewstep.runs.cli", "--help"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert ended.returncode == 1
    assert ended.stderr == b""
