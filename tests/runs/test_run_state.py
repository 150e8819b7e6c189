"""Runs keep their work to themselves: folders, Ctrl-C, divergence, lost processes, full disks."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fewstep.agents import SFTPG, BehaviorCloning
from fewstep.common.checkpoint import load_checkpoint
from fewstep.common.files import write_atomically
from fewstep.common.optimisation import TrainingDivergedError
from fewstep.runs.cli import quiet_writers
from fewstep.runs.run.folder import RunFolder, new_folder
from fewstep.runs.run.interrupts import Interrupts
from fewstep.runs.run.joining import is_lost_peer
from fewstep.runs.run.logs import ResumableTensorBoard
from fewstep.runs.settings.train import parse

MAKE = """
import sys
from pathlib import Path
from fewstep.runs.run.folder import new_folder
print(flush=True)
sys.stdin.readline()
for _ in range(20):
    print(new_folder(Path(sys.argv[1]) / "run"), flush=True)
"""


@pytest.mark.slow
def test_runs_that_start_together_have_folders_of_their_own(tmp_path):
    """Three processes make twenty folders each, of one name, at the same moment."""
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        process.stdout.readline()  # it has imported everything
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    made = [line for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert len(made) == len(set(made)) == 60
    assert len(list(tmp_path.iterdir())) == 60


def test_threads_have_folders_of_their_own_too(tmp_path):
    settings = parse([f"--log-dir={tmp_path}"])
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(settings).path, range(24)))
    assert len(set(folders)) == 24
    assert all((folder / "config.json").is_file() for folder in folders)


def test_the_runs_of_a_sweep_are_told_apart(tmp_path):
    flags = [
        [f"--optimizer.learning-rate={rate}", f"--log-dir={tmp_path}"] for rate in (1e-3, 1e-4)
    ]
    flags += [
        ["--pretrain.optimizer.learning-rate=0.002", f"--log-dir={tmp_path}"],
        ["--solver-options", "last_std", "0.1", "clip", "True", f"--log-dir={tmp_path}"],
    ]
    names = [RunFolder.create(parse(each)).path.name for each in flags]
    stems = [re.sub(r"__\d{8}-\d{6}(-\d+)?$", "", name) for name in names]
    assert stems == [
        "SwissRoll__sft-v__seed0__optimizer.learning_rate=0.001",
        "SwissRoll__sft-v__seed0__optimizer.learning_rate=0.0001",
        "SwissRoll__sft-v__seed0__pretrain.optimizer.learning_rate=0.002",
        "SwissRoll__sft-v__seed0__solver_options=last_std-0.1,clip-True",
    ]


def test_a_long_name_is_cut_and_still_tells_apart(tmp_path):
    many = ["--batch-size=8", "--n-critic=2", "--n-generator=1", "--critic.learning-rate=0.01"]
    many += [
        "--critic.baseline-learning-rate=0.02",
        "--optimizer.max-grad-norm=0.3",
        "--agent=sft-pg",
        "--policy.gae-lambda=0.5",
    ]
    names = [
        RunFolder.create(
            parse([*many, f"--optimizer.ema={ema}", f"--log-dir={tmp_path}"])
        ).path.name
        for ema in (0.1, 0.2)
    ]
    assert all(len(name) < 180 for name in names)
    assert names[0].split("__")[:-1] != names[1].split("__")[:-1]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="Cannot write the log folder"):
        new_folder(tmp_path / "file" / "run")


def test_ctrl_c_says_at_once_what_it_does(capfd):
    """The message is there before the round ends; a second Ctrl-C does not wait for that."""
    previous = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested
        assert "stopping after this round" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous
    with Interrupts(ignore=True) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert not interrupts.requested
    thread = threading.Thread(target=lambda: Interrupts().__enter__())  # no handler there: no error
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is previous


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_run_that_fails_leaves_the_process_as_it_was(
    failure, tmp_path, fewstep, tiny, monkeypatch, capsys
):
    def fails(self):
        raise failure("a fault of ours")

    monkeypatch.setattr(SFTPG, "train_round", fails)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    before = signal.getsignal(signal.SIGINT)
    if failure is KeyboardInterrupt:
        assert fewstep("train", f"--log-dir={tmp_path}", *tiny) == 130
        (folder,) = tmp_path.iterdir()
        assert f"fewstep train --resume {shlex.quote(str(folder))}" in capsys.readouterr().out
    else:
        with pytest.raises(failure, match="a fault of ours"):
            fewstep("train", f"--log-dir={tmp_path}", *tiny)
    assert signal.getsignal(signal.SIGINT) is before
    assert counts == [1, 7]
    links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [link for link in links if link.startswith(str(tmp_path))]


def test_divergence_says_how_to_go_on_and_that_works(tmp_path, fewstep, tiny, monkeypatch, capsys):
    train_round = SFTPG.train_round

    def diverges(self):
        metrics = train_round(self)
        if self.settings.optimizer.learning_rate > 1e-6 and self.rounds == 2:
            metrics["train/policy_loss"] = torch.tensor(float("nan"))
        return metrics

    monkeypatch.setattr(SFTPG, "train_round", diverges)
    assert fewstep("train", f"--log-dir={tmp_path}", "--checkpoint-seconds=0", *tiny) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "--resume would come to the same end" in said
    assert (
        "a smaller --optimizer.learning-rate or --critic.learning-rate or --critic.baseline-"
        in said
    )
    command = re.search(r"start anew with: +fewstep (.*?) +and a smaller", said)[1]
    assert fewstep(*shlex.split(command), "--optimizer.learning-rate=1e-6") == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_divergence_of_the_cloning_stage_names_its_own_flag(
    tmp_path, fewstep, tiny, monkeypatch, capsys
):
    def diverges(self):
        raise TrainingDivergedError("train/loss", self.num_timesteps)

    monkeypatch.setattr(BehaviorCloning, "train_round", diverges)
    assert fewstep("train", f"--log-dir={tmp_path}", *tiny) == 2
    said = capsys.readouterr().err
    assert "a smaller --pretrain.optimizer.learning-rate." in said
    assert "--denoiser" not in said


@pytest.mark.parametrize("size", [50_000, 1_000_000])
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
    size, tmp_path, tiny, fewstep, capsys
):
    """As `ulimit -f`: no file grows beyond so many bytes; cloning's or the agent's does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        code = fewstep("train", f"--log-dir={tmp_path}", *tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    (folder,) = tmp_path.iterdir()
    assert re.search(rf"fewstep: Cannot write {folder}/\S+: .*File too large", said)
    kept = list(folder.glob("*.safetensors"))
    assert len(kept) == (size == 1_000_000)
    for path in kept:
        load_checkpoint(path)
    assert not list(folder.glob(".*"))


def test_a_log_that_cannot_be_written_is_a_sentence_too(tmp_path, capfd):
    """TensorBoard writes in a thread of its own, whose traceback would be all there is to see."""
    log = ResumableTensorBoard(tmp_path / "tensorboard")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with quiet_writers(), pytest.raises(OSError, match=f"Cannot write {tmp_path}/tensorboard: No"):
        writer = log.writer._get_file_writer().event_writer._async_writer._writer
        writer.write = full
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            log.write({"a": 1.0}, {"a": ()}, 1)
            time.sleep(0.01)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_resumed_run_removes_what_a_killed_one_left(tmp_path, fewstep):
    flags = [f"--log-dir={tmp_path}", "--evaluation-samples=100"]
    folder = RunFolder.create(parse(flags)).path
    child = os.fork()
    if child == 0:
        path = folder / "denoiser.safetensors"
        try:
            write_atomically(path, lambda temporary: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(folder.glob(".*.tmp"))) == 1
    (folder / "denoiser.safetensors").write_text("no checkpoint, which is found out later")
    assert fewstep("train", "--resume", folder) == 2
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
            True,
        ),
        ("NCCL error: remote process exited or there was a network error", True),
        ("Connection closed by peer", False),
        ("gloo: shapes differ", False),
        ("a fault of ours", False),
    ],
)
def test_a_lost_process_is_told_from_a_fault(text, lost):
    assert is_lost_peer(RuntimeError(text)) == lost


KILLED = """
import os, sys, time
from fewstep.agents import SFTPG
from fewstep.runs.cli import main
train_round = SFTPG.train_round
def dies(self):
    if self.rounds == 1 and os.environ["RANK"] == "1":
        os._exit(7)
    return train_round(self)
SFTPG.train_round = dies
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_rank_0_says_in_a_sentence_that_its_peer_is_gone(tmp_path, tiny):
    script = tmp_path / "killed.py"
    flags = ["train", "--device=cpu", f"--log-dir={tmp_path / 'logs'}", *tiny]
    script.write_text(KILLED)
    with open(os.devnull) as nothing:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        processes = [
            subprocess.Popen(
                [sys.executable, script, *flags],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "WORLD_SIZE": "2",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                },
                stdin=nothing,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        (_, said), _ = (process.communicate(timeout=300) for process in processes)
    assert processes[1].returncode == 7
    assert processes[0].returncode == 1, said
    assert "fewstep: Another process of this run has ended" in said
    assert "Traceback" not in said
