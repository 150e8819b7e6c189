"""Images on the command line: a pretrained U-Net from a diffusers folder, on a CIFAR-10 of 40."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from image_files import without_checksums, write_cifar10, write_folder, write_mnist

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.networks import UNet2D
from fewstep.agents.presets import preset
from fewstep.agents.pretrained import save_pretrained
from fewstep.envs import DiscreteVP
from fewstep.runs.settings.train import parse

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TINY = [
    "--rounds=2",
    "--batch-size=4",
    "--n-critic=2",
    "--n-generator=2",
    "--minibatch-size=6",
    "--critic.width=8",
    "--evaluations=1",
    "--evaluation-samples=8",
    "--log-interval=1",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CIFAR-10, a MNIST, a folder of images, and U-Nets as diffusers writes them."""
    folder = tmp_path_factory.mktemp("files")
    write_cifar10(folder)
    write_mnist(folder)
    write_folder(folder / "pictures", size=(20, 20))
    process = DiscreteVP.linear(1000)
    for name, shape in (("ddpm", (3, 32, 32)), ("grey", (1, 32, 32))):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_pretrained(Denoiser(UNet2D(shape, **SMALL), process), folder / name)
    return folder


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch):
    without_checksums(monkeypatch)


# So few steps of FastDPM start late, and say so.
@pytest.mark.filterwarnings("ignore:Sampling starts from pure noise")
def test_a_pretrained_ddpm_is_fine_tuned_evaluated_and_sampled(files, tmp_path, fewstep):
    where = [f"--data-dir={files}", f"--log-dir={tmp_path}"]
    train = ["train", "--env=CIFAR10", f"--pretrained={files / 'ddpm'}", "--steps=3", *where]
    assert (
        fewstep(*train, "--execution.micro-batch-size=5", "--execution.buffer=cpu-float16", *TINY)
        == 0
    )
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert results["nfe"] == 3
    # Without Inception's weights no figure may carry Inception's name.
    assert not {"fid", "kid"} & set(results["metrics"])
    assert any("cifar10-classifier" in name for name in results["metrics"])
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["schedule"] == "fast_dpm"
    assert config["agent"]["solver"] == "fast-dpm"
    for name in ("samples.png", "trajectories.png"):
        assert (folder / name).stat().st_size > 1000
    # The raw pipeline, and the fine-tuned sampler, with another solver each.
    for source, solver in ((files / "ddpm", "ddim"), (folder, "dpm-solver++-2m")):
        evaluate = ["evaluate", source, "--env=CIFAR10", f"--solver={solver}", "--steps=2"]
        assert fewstep(*evaluate, f"--data-dir={files}", "--samples=8") == 0
    output = tmp_path / "samples.npy"
    sample = ["sample", folder, "--n=4", f"--output={output}", f"--data-dir={files}"]
    assert fewstep(*sample) == 0
    assert np.load(output).shape == (4, 3, 32, 32)


def test_mnist_is_cloned_in_ten_noisings(files, tmp_path, fewstep):
    flags = ["--env=MNIST", "--process=linear-1000/10", "--body=small-unet", "--rounds=2"]
    flags += ["--body-options", "width", "8", "levels", "3", f"--data-dir={files}"]
    flags += ["--batch-size=4", "--evaluation-samples=8", "--evaluations=1"]
    assert fewstep("pretrain", *flags, f"--log-dir={tmp_path}") == 0
    (folder,) = tmp_path.iterdir()
    denoiser = Denoiser.load(folder / "denoiser.safetensors")
    assert denoiser.process.t_max == 10
    assert denoiser.body.config["width"] == 8


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pretrained={files}/grey"], "(1, 32, 32)"),
        (["--pretrained={files}/nothing"], "There is no folder"),
        (["--pretrained=nobody/nothing-of-this-name"], "download"),
        (["--env=MNIST", "--agent=sft-pg", "--pretrained={files}/ddpm"], "(3, 32, 32)"),
        (["--pretrained={files}/ddpm", "--denoiser={files}/ddpm"], "Give one of"),
        (["--agent=behavior-cloning", "--pretrained={files}/ddpm"], "starts from nothing"),
        (["--pretrained={files}/ddpm", "--body=small-unet"], "--body is for a denoiser"),
        (["--pretrained={files}/ddpm", "--process=cosine-50"], "--process cosine-50 is not that"),
        (
            ["--env=MNIST", "--agent=sft-pg", "--pretrain.batch-size=0"],
            "--pretrain.batch-size must be at least 1",
        ),
        (["--body=unet"], "unet-cifar10"),
        (["--body=small-unet", "--body-options", "depth", "3"], "depth"),
        (["--env=MNIST", "--agent=sft-pg", "--body-options", "width", "8"], "--body"),
        (["--env=MNIST", "--agent=sft-pg", "--image-size=16"], "image_size"),
        (["--env=CelebA64"], "celeba"),
        (["--inception-weights={files}/none.pth"], "No Inception weights"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(flags, sentence, files, tmp_path, fewstep, capsys):
    flags = [flag.format(files=files) for flag in flags]
    if not any(flag.startswith("--env") for flag in flags):
        flags.append("--env=CIFAR10")
    tiny = [] if "--agent=behavior-cloning" in flags else TINY
    log_dir = tmp_path / "logs"
    code = fewstep("train", *flags, *tiny, f"--data-dir={files}", f"--log-dir={log_dir}")
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert sentence in said[-1]
    assert said[-1].startswith("fewstep: ")


def test_a_damaged_picture_is_named(files, tmp_path, fewstep, capsys):
    write_folder(tmp_path / "pictures", count=12)
    broken = tmp_path / "pictures" / "cats" / "004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = ["--env=ImageFolder", f"--data-dir={tmp_path / 'pictures'}", "--image-size=16"]
    assert fewstep("train", *flags, *TINY, f"--log-dir={tmp_path / 'logs'}") == 2
    assert str(broken) in capsys.readouterr().err


def test_samples_need_no_data_and_no_environment(files, tmp_path, fewstep):
    output = tmp_path / "samples.npy"
    nowhere = f"--data-dir={tmp_path}"
    for more in (["--env=CIFAR10"], []):
        flags = ["--solver=ddim", "--steps=2", "--n=3", f"--output={output}", nowhere, *more]
        assert fewstep("sample", files / "ddpm", *flags) == 0
        assert np.load(output).shape == (3, 3, 32, 32)
    assert fewstep("sample", files / "ddpm", "--n=3", f"--output={tmp_path / 'grid.png'}") == 0


# So few steps of FastDPM start late, and say so.
@pytest.mark.filterwarnings("ignore:Sampling starts from pure noise")
def test_a_run_goes_on_when_what_it_started_from_is_gone(files, tmp_path, fewstep):
    source = tmp_path / "ddpm"
    shutil.copytree(files / "ddpm", source)
    logs = tmp_path / "logs"
    flags = ["--env=CIFAR10", "--steps=2", f"--data-dir={files}", f"--log-dir={logs}", *TINY]
    assert fewstep("train", f"--pretrained={source}", *flags) == 0
    (folder,) = logs.iterdir()
    shutil.rmtree(source)
    (folder / "results.json").unlink()
    assert fewstep("train", f"--resume={folder}") == 0
    assert "metrics" in json.loads((folder / "results.json").read_text())


def test_a_preset_s_solver_options_go_with_its_solver(files):
    flags = ["--env=MNIST", f"--data-dir={files}"]
    options = preset("MNIST", "sft").agent["solver_options"]
    assert parse([*flags]).agent.solver_options == options != {}
    assert parse([*flags, "--solver=fast-dpm"]).agent.solver_options is None


def test_running_out_of_memory_is_one_sentence(files, tmp_path, fewstep, capsys, monkeypatch):
    def allocate(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(UNet2D, "forward", allocate)
    flags = [f"--output={tmp_path / 'a.npy'}", "--n=3"]
    assert fewstep("sample", files / "ddpm", *flags) == 2
    assert "Out of memory in fewstep sample" in capsys.readouterr().err
