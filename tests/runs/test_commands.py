"""The other commands, and what each says to bad input: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import ast
import functools
import json
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep import agents, critics, envs
from fewstep.agents import DODE
from fewstep.runs.cli import COMMANDS
from fewstep.runs.reports.console import console, print_report
from fewstep.runs.settings.train import parse
from fewstep.runs.speed import training


def test_pretrain_leaves_a_denoiser_that_evaluate_and_sample_use(tmp_path, fewstep, tiny, capsys):
    flags = [flag for flag in tiny if not flag.startswith(("--pretrain", "--agent"))]
    assert fewstep("pretrain", f"--log-dir={tmp_path / 'logs'}", *flags) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    scores = tmp_path / "scores.json"
    evaluate = ["evaluate", folder, "--solver=ddim", "--steps=4", "--evaluation-samples=500"]
    assert fewstep(*evaluate, f"--output={scores}") == 0
    shown = capsys.readouterr().out
    assert "score" in shown
    assert "before" not in shown
    # The older name of the flag.
    again = [*evaluate[:-1], "--samples=500", f"--output={tmp_path / 'again.json'}"]
    assert fewstep(*again) == 0
    results = json.loads(scores.read_text())
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == results["metrics"]
    assert results["nfe"] == 4
    assert results["metrics"]["mmd"]["after"] > results["metrics"]["mmd"]["floor"]
    for name in ("samples.npy", "samples.png"):
        assert fewstep("sample", folder, "--n=50", f"--output={tmp_path / name}") == 0
    assert np.load(tmp_path / "samples.npy").shape == (50, 2)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_version_is_that_of_the_package(fewstep, capsys):
    assert fewstep("--version") == 0
    assert capsys.readouterr().out == f"fewstep {version('fewstep')}\n"


def test_an_environment_s_full_id_is_its_name():
    for name in ("fewstep/SwissRoll-v0", "swissroll"):
        assert parse([f"--env={name}"]).run.env == "SwissRoll"


def test_help_is_given_beside_resume(fewstep, capsys):
    assert fewstep("train", "--resume=/nowhere", "--help") == 0
    assert "--resume" in capsys.readouterr().out


def test_the_same_seed_draws_the_same_samples(finished, tmp_path, fewstep):
    for name in ("a.npy", "b.npy"):
        assert fewstep("sample", finished, "--n=9", f"--output={tmp_path / name}") == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_envs_and_agents_list_what_there_is(fewstep, capsys):
    assert fewstep("envs") == 0
    listed = capsys.readouterr().out
    assert "fewstep/Digits-v0" in listed
    (cifar10,) = (line for line in listed.splitlines() if "fewstep/CIFAR10-v0" in line)
    assert "3 x 32 x 32" in cifar10
    assert "data files needed" in cifar10
    assert fewstep("agents") == 0
    listed = capsys.readouterr().out
    assert "sft-pg" in listed
    assert "ddim" in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, fewstep, capsys):
    assert fewstep(command, "--help") == 0
    assert f"fewstep {command}" in capsys.readouterr().out


def test_a_report_s_columns_keep_their_names(monkeypatch, capsys):
    monkeypatch.setattr(console, "width", 12)
    name = "sliced_wasserstein_fresh"
    print_report(f"| {name} |\n| --- |\n| 8.1e-02 |")
    head = capsys.readouterr().out.partition("─")[0]
    assert "".join(head.split()) == name


@pytest.mark.parametrize(
    "measurement", ["overhead", pytest.param("profile", marks=pytest.mark.slow), "fitting"]
)
def test_measurements_leave_figures_and_a_table(measurement, tmp_path, fewstep, monkeypatch):
    monkeypatch.setattr(training, "EPISODES", 2)
    monkeypatch.setattr(training, "DODE", functools.partial(DODE, batch_size=20, batches=2))
    assert fewstep("benchmark", measurement, f"--log-dir={tmp_path}") == 0
    folder = tmp_path / "benchmark" / measurement
    figures = json.loads((folder / "results.json").read_text())
    assert "|" in (folder / "table.md").read_text()
    if measurement == "profile":
        assert sum(figures["shares"].values()) == pytest.approx(1)
        assert all(share > 0 for share in figures["shares"].values())
    elif measurement == "fitting":
        # The default teacher refines each of the ten steps.
        assert all(figure["teacher_calls"] >= 100 for figure in figures.values())
        assert all(figure["teacher"] > 0 and figure["fit"] > 0 for figure in figures.values())
    else:
        table = (folder / "table.md").read_text()
        assert all(f"{figure['ratio']:.4f}" in table for figure in figures.values())


def test_loops_are_timed_by_turns(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    order = []

    def loop(name, seconds):
        def run():
            order.append(name)
            clock[0] += next(seconds)

        return run

    first, second = loop("a", iter([9.0, 1, 2, 4])), loop("b", iter([1.0, 3, 4, 20]))
    ratio, medians = training.interleaved(first, second, 4)
    assert order == ["a", "b"] * 4
    assert (ratio, medians) == (2.5, (3.0, 3.5))


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++-2m", "dpm-solver-3m"])
def test_the_loops_whose_speed_is_compared_do_the_same_work(solver):
    from fewstep.agents import Denoiser
    from fewstep.agents.denoisers.networks import MLP
    from fewstep.envs import DiscreteVP
    from fewstep.runs.speed.sampling import STEPS, _loops

    process = DiscreteVP.linear(1000)
    denoiser = Denoiser(MLP((2,), 1000, hidden=8, input_gain=1), process)
    calls = []
    denoiser.body.register_forward_hook(lambda *arguments: calls.append(len(arguments[1][0])))
    loops = _loops(solver, process, denoiser, torch.randn(5, 2, 1, 1))
    for name, loop in loops.items():
        calls.clear()
        samples = loop()
        assert calls == [5] * STEPS, name
        if name == "fewstep":
            ours = samples
    if solver == "ddim":  # the others' last step differs: diffusers goes to time 0
        torch.testing.assert_close(loops["diffusers"]().flatten(1), ours, rtol=1e-4, atol=1e-4)


def test_studies_are_listed(fewstep, capsys):
    assert fewstep("benchmark", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if not line.startswith(" ")]
    assert {"main", "gradients", "composition", "memory"} <= {row.split()[0] for row in rows}
    # One column, whatever the length of the names.
    titles = max(len(row.split()[0]) for row in rows) + 2
    assert all(line[titles - 2 : titles] == "  " != line[titles : titles + 1] for line in lines)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--env=SwisRoll"], "did you mean 'SwissRoll'"),
        (["train", "--agent=sftpg"], "did you mean 'sft-pg'"),
        (["train", "--agent="], "--agent is empty"),
        (["train", "--start-from="], "--start-from is empty"),
        (["train", "--preset=huge"], "unknown preset"),
        (["train", "--steps=0"], "steps must be at least 1"),
        (["train", "--schedule=karas"], "did you mean 'karras'"),
        (["train", "--data-dir=/nowhere"], "/nowhere"),
        (["train", "--device=cuda:77"], "cuda:77"),
        (["train", "--resume=/nowhere"], "/nowhere"),
        (["train", "--config=/nowhere.json"], "/nowhere.json"),
        (["train", "--denoiser=/nowhere"], "/nowhere"),
        (["train", "--batch-size=0"], "--batch-size must be at least 1"),
        (["train", "--optimizer.ema=1.5"], "--optimizer.ema must be at least 0 and below 1"),
        (["train", "--prediction=noise"], "unknown prediction"),
        (["train", "--solver=ddmi"], "did you mean 'ddim'"),
        (["train", "--solver=ddim"], "adds no noise"),
        (["train", "--optimizer.learning-rate=fast"], "learning-rate"),
        (["train", "--process=sigmod-10"], "did you mean 'sigmoid'"),
        (["train", "--process=ve", "--prediction=epsilon"], "predicts 'edm'"),
        (["train", "--process=flow- "], "flow needs its shift or nothing, as in 'flow-3'"),
        (["train", "--process=flow-0"], "shift and time_scale must be positive"),
        (["train", "--process=flow", "--prediction=epsilon"], "predicts 'flow', not 'epsilon'"),
        (
            ["train", "--process=linear-1000-zero-snr", "--prediction=epsilon"],
            "where no signal is left",
        ),
        (["train", "--process=linear-1-zero-snr"], "one noising"),
        (["train", "--process=linear-1000-zero-snrs"], "its number of noisings"),
        (["train", "--process=vp-20-0.1"], "0 <= beta_min < beta_max"),
        (["train", "--process=vp-1"], "two betas or none"),
        (["train", "--solver=flow-sde"], "needs a straight path"),
        (["train", "--schedule=9,5,7,0"], "strictly decrease"),
        (["train", "--schedule=karras", "--schedule-options", "roh", "5"], "did you mean 'rho'"),
        (["train", "--agent=dode", "--solver=ancestral"], "distils deterministic solvers"),
        (["train", "--agent=pd", "--teacher-steps=12"], "10 steps times a power of two"),
        (["train", "--agent=sfd", "--table=nowhere.json"], "No tableau at nowhere.json"),
        (["train", "--agent=rdpo", "--table=nowhere.json"], "No tableau at nowhere.json"),
        (
            ["train", "--agent=dode", "--solver-options", "eta", "1"],
            "distils deterministic solvers",
        ),
        (
            ["train", "--agent=dode", "--form=al"],
            "lookahead, sep or two, got 'al'",
        ),
        (["train", "--agent=dode", "--align=indx"], "--align must be index or time, got 'indx'"),
        (["train", "--agent=dode", "--teacher=huen"], "did you mean 'heun'"),
        (["train", "--agent=dode", "--scale=0"], "scale"),
        (["train", "--agent=dode", "--batches=0"], "--batches must be at least 1"),
        (["train", "--agent=dode", "--ridge=nan"], "--ridge must be at least 0"),
        (["train", "--agent=dode", "--refine-steps=0"], "--refine-steps must be at least 1"),
        (["train", "--agent=dode", "--solver=ipndm", "--steps=3"], "at least 4 network calls"),
        (
            ["train", "--agent=dode", "--solver=dpm-solver-2", "--solver-options", "ordr", "3"],
            "unknown option of solver 'dpm-solver-2'",
        ),
        (["train", "--agent=dode", "--solver-options", "eta", "abc"], "wrong type"),
        (["train", "--agent=dode", "--solver-options", "afs", "yes"], "afs must be True or False"),
        (["train", "--solver-options", "afs", "True"], "afs is for deterministic solvers"),
        (
            ["train", "--agent=dode", "--process=flow", "--solver-options", "afs", "True"],
            "No signal is left",
        ),
        (
            ["train", "--agent=dode", "--solver=ipndm", "--solver-options", "order", "True"],
            "order must be a whole number",
        ),
        (["train", "--evaluation-samples=1"], "--evaluation-samples must be at least 2"),
        (["train", "--threads=-2"], "--threads must be at least 1"),
        (["train", "--rounds=0"], "--rounds must be at least 1"),
        (["train", "--pretrain.rounds=-5"], "--pretrain.rounds must be at least 1"),
        (["train", "--log-interval=0"], "--log-interval must be at least 1"),
        (["train", "--evaluations=-1"], "--evaluations must be at least 0"),
        (["train", "--checkpoint-seconds=-5"], "--checkpoint-seconds must be at least 0"),
        (["train", "--seed=99999999999999999999"], "--seed must be at least 0 and at most"),
        (["train", "--body=small-unet"], "'small-unet' is for images"),
        (["train", f"--data-dir={__file__}"], "is a file"),
        (["train", "--resume=/x", "--rounds=200"], "--config /x/config.json in place of --resume"),
        (["train", "--resume", "/x", "--bogus", "3"], "without --bogus 3;"),
        (["train", "--agent=dode", "--rounds=3"], "Unknown flag --rounds"),
        (["train", "--agent=schedule", "--rounds=3"], "Unknown flag --rounds"),
        (["train", "--critic.widht=3"], "Unknown flag --critic.widht; did you mean --critic.width"),
        (["train", "--bogus"], "Unknown flag --bogus."),
        (["train", "--learning-rate=1"], "--learning-rate; did you mean --"),
        (
            ["train", "--betas", "0", "0", "--bogus"],
            "Unknown flag --betas, --bogus; did you mean --critic.betas or --optimizer.betas or ",
        ),
        (["pretrain", "--threads=0"], "--threads must be at least 1"),
        (["train", "--solver=none.json"], "unknown solver"),
        (["analyze", "/nowhere"], "/nowhere"),
        (["evaluate", "/nowhere"], "/nowhere"),
        (["evaluate", "/nowhere", "--output=/"], "--output / is a folder"),
        (["evaluate", "/nowhere", f"--output={__file__}/scores.json"], "no writable folder"),
        (["evaluate", "/nowhere", "--samples=1"], "--evaluation-samples must be at least 2"),
        (["evaluate", "/nowhere", "--seed=-1"], "--seed must lie between"),
        (["sample", "/nowhere"], "/nowhere"),
        (["sample", "/nowhere", "--output=x.bmp"], ".npy or .png"),
        (["benchmark", "gradient"], "did you mean 'gradients'"),
        (["benchmark", "main", "--threads=0"], "--threads must be at least 1"),
        (["benchmark", "main", "--workers=0"], "--workers must be at least 1"),
        (["benchmark", "main", "--rounds=-1"], "--rounds must be at least 1"),
        (
            ["benchmark", "main", "--evaluation-samples=1"],
            "--evaluation-samples must be at least 2",
        ),
        (["benchmark", "main", "--steps", "5", "0"], "--steps must be at least 1"),
        (["benchmark", "main", "--seeds=-1"], "--seeds must lie between"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(argv, says, fewstep, capsys, tmp_path):
    if argv[0] == "train" and not argv[1].startswith(("--resume", "--denoiser")):
        argv = ["train", f"--log-dir={tmp_path}", "--pretrain.rounds=1", *argv[1:]]
    assert fewstep(*argv) == 2
    captured = capsys.readouterr()
    said = " ".join((captured.err + captured.out).split())
    assert says in said
    assert "Traceback" not in said
    assert not any(tmp_path.iterdir())


def test_an_unwritable_log_folder_is_refused(fewstep, capsys):
    # /proc takes no new folders, not even from root.
    assert fewstep("train", "--log-dir=/proc/logs") == 2
    assert "--log-dir" in capsys.readouterr().err


def test_a_log_folder_that_is_a_file_is_refused(tmp_path, fewstep, capsys):
    (tmp_path / "logs").write_text("not a folder")
    assert fewstep("train", f"--log-dir={tmp_path / 'logs'}") == 2
    assert "--log-dir" in capsys.readouterr().err


def test_resume_wants_a_checkpoint(tmp_path, fewstep, capsys):
    assert fewstep("train", "--resume", tmp_path) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_another_environment_is_refused(finished, tmp_path, fewstep, tiny, capsys):
    own = [flag for flag in tiny if not flag.startswith("--pretrain")]
    flags = [f"--denoiser={finished}", f"--log-dir={tmp_path}", *own]
    assert fewstep("train", "--env=Digits", *flags) == 2
    assert "another environment" in capsys.readouterr().err


def test_a_pickle_and_a_truncated_checkpoint_are_refused(finished, tmp_path, fewstep, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    checkpoint = copy / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    assert fewstep("train", "--resume", copy) == 2
    assert "truncated" in capsys.readouterr().err
    torch.save({"weights": torch.zeros(2)}, checkpoint)
    assert fewstep("train", "--resume", copy) == 2
    assert "pickle" in capsys.readouterr().err


FLAG = re.compile(r"(?<![\w-])--[a-z]|fewstep (train|pretrain|sample|evaluate)")


def test_messages_of_the_library_name_no_flags_and_the_command_adds_them(fewstep, capsys, tmp_path):
    """Rule 9 of the design: a library's user has no flags."""
    sources = [
        path
        for module in (agents, critics, envs)
        for path in Path(module.__file__).parent.rglob("*.py")
    ]
    assert len(sources) > 60
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise | ast.Return):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                flags = [text for text in texts if isinstance(text, str) and FLAG.search(text)]
                assert not flags, f"{path}: {flags}"
    assert fewstep("train", "--env=MNIST", f"--data-dir={tmp_path}") == 2
    assert "(--data-dir; --download)" in capsys.readouterr().err
    assert fewstep("train", "--solver=ddim", f"--log-dir={tmp_path}") == 2
    assert "--solver-options last_std 0.001" in capsys.readouterr().err
