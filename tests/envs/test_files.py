"""Files: their rights, what is left of killed processes, full disks, and where caches are."""

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fewstep.common.checkpoint import load_checkpoint, save_checkpoint
from fewstep.common.files import cache_root, remove_leftovers, temporary_suffix, write_atomically
from fewstep.envs.targets.images import default_data_dir
from fewstep.runs.reports.features import cache_folder


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_rights_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("")
        write_atomically(tmp_path / "text", lambda path: path.write_text("x"))
        save_checkpoint(tmp_path / "checkpoint", {"w": torch.ones(2)})
        save_checkpoint(tmp_path / "checkpoint", {"w": torch.ones(3)})
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path):
    run = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    mine = temporary_suffix()
    host = mine.split(".")[1]
    gone = [f".a.safetensors.{host}.{dead}-0.tmp", f".b.json.{host}.{dead}-17.tmp"]
    stays = [
        f".a{mine}",
        f".a.another_host.{dead}-0.tmp",
        f".a.{host}.1-0.tmp",
        f".a.{dead}.tmp",
        f"a.{host}.{dead}-0.tmp",
        "checkpoint.safetensors",
    ]
    for name in (*gone, *stays):
        (tmp_path / name).write_text("")
    (tmp_path / f".x8k.{host}.{dead}-3.tmp").mkdir()  # a pipeline that was being exported
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stays)


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path, errors = tmp_path / "file", []

    def write(value):
        try:
            for _ in range(20):
                write_atomically(path, lambda temporary: temporary.write_text(str(value) * 1000))
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    text = path.read_text()
    assert text in {str(i) * 1000 for i in range(4)}
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file_and_names_the_new(tmp_path):
    path = tmp_path / "checkpoint"
    save_checkpoint(path, {"w": torch.ones(2)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"Cannot write {path}: .*File too large"):
            save_checkpoint(path, {"w": torch.ones(50_000)})
        with pytest.raises(OSError, match=rf"Cannot write {tmp_path}/text: File too large\."):
            write_atomically(tmp_path / "text", lambda file: file.write_text("x" * 200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_all_caches_have_one_root(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert default_data_dir() == tmp_path / "data"
    assert cache_folder() == tmp_path / "features"
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_data_dir() == tmp_path / "xdg" / "fewstep" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == Path(tmp_path) / ".cache" / "fewstep" / "data"
