"""Damaged files: each is refused with one sentence that names it, or means what it says.

Every loader meets some dozens of seeded mutations of a good file. `FUZZ=20` in the environment
makes twenty times as many.
"""

import json
import math
import os
import random
import resource
import shutil
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from image_files import write_celeba, write_cifar10, write_folder, write_mnist
from mutations import mutated_bytes, mutated_text, mutated_tree

from fewstep.agents import Denoiser, Tableau, VarianceLearning
from fewstep.agents.denoisers.networks import MLP, ResidualMLP, UNet2D
from fewstep.agents.pretrained import export_pipeline, from_pretrained
from fewstep.agents.solvers import ddim
from fewstep.common.checkpoint import load_checkpoint, save_checkpoint
from fewstep.critics.metrics.classifier import ClassifierFeatures
from fewstep.envs import DiscreteVP, Schedule, make_target
from fewstep.envs.registration import make_mdp
from fewstep.runs.cli import main
from fewstep.runs.run.folder import RunFolder
from fewstep.runs.run.run import Run
from fewstep.runs.settings.train import Settings, defaults

TIMES = int(os.environ.get("FUZZ", "1"))
REFUSALS = (ValueError, OSError)
VP = DiscreteVP.linear(20)


def small_table():
    return ddim(Schedule.uniform(VP, 4))


def small_denoiser(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(MLP((2,), levels=20, hidden=8, layers=2), VP)


def small_unet():
    options = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2D((1, 8, 8), **options).unet


def numbers_agree(ours, theirs):
    """Whether what was loaded says what the file says; None and omissions are defaults."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return all(key not in ours or numbers_agree(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(numbers_agree, ours, theirs))
    if isinstance(theirs, int | float) and isinstance(ours, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    if isinstance(ours, int | float) and isinstance(theirs, str):  # NumPy reads "1e9", too
        return math.isclose(ours, float(theirs), rel_tol=1e-12)
    return theirs is None or ours == theirs


# -- loaders -------------------------------------------------------------------------------------
# Each: write the good file, return it; load it and raise AssertionError if the meaning changed.


def table(folder):
    small_table().save(folder / "tableau.json")
    return folder / "tableau.json"


def load_table(file):
    ours, theirs = json.loads(Tableau.load(file).to_json()), json.loads(file.read_text())
    # Weights that are 0 are not kept.
    theirs["weights"] = [[pair for pair in row if pair[1] != 0] for row in theirs["weights"]]
    assert numbers_agree(ours, theirs)


def schedule(folder):
    Schedule.karras(VP, 4).save(folder / "schedule.json")
    return folder / "schedule.json"


def load_schedule(file):
    loaded = Schedule.load(file)
    assert numbers_agree(loaded.to_config(), json.loads(file.read_text()))


def config(folder):
    (folder / "config.json").write_text(defaults("SwissRoll", "sft-pg").to_json())
    return folder / "config.json"


def load_config(file):
    loaded = json.loads(Settings.from_json(file).to_json())
    written = json.loads(file.read_text())["run"]
    # A run's own file names neither of these two.
    written |= {"config": None, "resume": None}
    assert numbers_agree(loaded["run"], written)


def results(folder):
    RunFolder(folder).update_results(seconds=3.0, metrics={"mmd": {"before": 0.1, "floor": 0.0}})
    return folder / "results.json"


def load_results(file):
    assert float(RunFolder(file.parent).results().get("seconds", 0)) is not None


def denoiser(folder):
    small_denoiser().save(folder / "denoiser.safetensors")
    return folder / "denoiser.safetensors"


def load_denoiser(file):
    loaded = Denoiser.load(file)
    tree = load_checkpoint(file)
    tree = tree.get("denoiser", tree)
    assert loaded.prediction == tree["prediction"]
    assert numbers_agree(loaded.process.to_config(), tree["process"])
    for name, value in loaded.body.state_dict().items():
        assert torch.equal(value, tree["weights"][name].to(value.dtype))


def residual(folder):
    Denoiser(ResidualMLP((2,), hidden=8, blocks=1), VP).save(folder / "denoiser.safetensors")
    return folder / "denoiser.safetensors"


MDP = make_mdp("SwissRoll", steps=4)


def fresh_agent():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Denoiser(MLP((2,), levels=4, hidden=8, layers=2), MDP.process)
    return VarianceLearning(MDP, network, kind="npr", batch_size=8)


def agent(folder):
    learner = fresh_agent()
    learner.learn(learner.timesteps_per_round)
    learner.save(folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def load_agent(file):
    fresh_agent().resume(file)
    VarianceLearning.load(file, MDP)


def classifier(folder):
    made = ClassifierFeatures("digits", (1, 8, 8), 10)
    made.set_accuracy(0.9)
    made.save(folder / "classifier.safetensors")
    return folder / "classifier.safetensors"


def load_classifier(file):
    loaded = ClassifierFeatures.load(file)
    assert all(weight.isfinite().all() for weight in loaded.parameters())


def pipeline(folder):
    scheduler = DDPMScheduler(num_train_timesteps=20, clip_sample=False)
    DDPMPipeline(small_unet(), scheduler).save_pretrained(folder / "theirs")
    return folder / "theirs" / "scheduler" / "scheduler_config.json"


def unet_config(folder):
    return pipeline(folder).parents[1] / "unet" / "config.json"


def unet_weights(folder):
    return pipeline(folder).parents[1] / "unet" / "diffusion_pytorch_model.safetensors"


def index(folder):
    return pipeline(folder).parents[1] / "model_index.json"


def exported(folder):
    body = UNet2D.from_model(small_unet())
    export_pipeline(Denoiser(body, VP), folder / "ours", small_table())
    return folder / "ours" / "scheduler" / "scheduler_config.json"


def load_pipeline(file):
    root = next(path for path in file.parents if path.name in ("theirs", "ours"))
    loaded = from_pretrained(root)
    assert all(weight.isfinite().all() for weight in loaded.parameters())
    assert loaded.body.shape == [1, 8, 8] if hasattr(loaded.body, "shape") else True


def idx(kind):
    def write(folder):
        write_mnist(folder, packed=kind.endswith("gz"))
        return folder / "MNIST" / "raw" / kind

    return write


def load_mnist(file):
    target = make_target("MNIST", data_dir=file.parents[2])
    assert target.shape == (1, 28, 28)
    assert target.labels.min() >= 0
    assert target.labels.max() <= 9
    assert (len(target), target.fresh_limit) == (len(target.labels), len(target.held_out_labels))


def cifar10(folder):
    write_cifar10(folder)
    return folder / "cifar-10-batches-py" / "data_batch_2"


def load_cifar10(file):
    # With its checksums: whatever was changed is never unpickled.
    make_target("CIFAR10", data_dir=file.parents[1])
    raise AssertionError("a file of other bytes was read")


def celeba(folder):
    write_celeba(folder, splits=(0, 2))
    return folder / "celeba" / "list_eval_partition.txt"


def celeba_image(folder):
    return celeba(folder).parent / "img_align_celeba" / "000000.jpg"


def load_celeba(file):
    root = next(path for path in file.parents if (path / "celeba").is_dir())
    assert make_target("CelebA64", data_dir=root).shape == (3, 64, 64)


def picture(folder):
    write_folder(folder, count=2, classes=["."], size=(8, 8))
    return folder / "000.png"


def load_picture(file):
    assert make_target("ImageFolder", data_dir=file.parent, image_size=8).samples.abs().max() <= 1


TEXT = {
    "tableau": (table, load_table),
    "schedule": (schedule, load_schedule),
    "config": (config, load_config),
    "results": (results, load_results),
    "model_index": (index, load_pipeline),
    "scheduler": (pipeline, load_pipeline),
    "exported scheduler": (exported, load_pipeline),
    "network config": (unet_config, load_pipeline),
}
TREES = {
    "denoiser": (denoiser, load_denoiser),
    "residual": (residual, load_denoiser),
    "agent": (agent, load_agent),
}
BYTES = {
    "denoiser": (denoiser, load_denoiser),
    "agent": (agent, load_agent),
    "classifier": (classifier, load_classifier),
    "network weights": (unet_weights, load_pipeline),
    "MNIST images": (idx("train-images-idx3-ubyte"), load_mnist),
    "MNIST labels": (idx("t10k-labels-idx1-ubyte"), load_mnist),
    "MNIST packed": (idx("train-labels-idx1-ubyte.gz"), load_mnist),
    "CIFAR10": (cifar10, load_cifar10),
    "CelebA list": (celeba, load_celeba),
    "CelebA picture": (celeba_image, load_celeba),
    "picture": (picture, load_picture),
    "tableau": (table, load_table),
    "schedule": (schedule, load_schedule),
}


def attempt(load, file, root, what):
    """Load a damaged file; True if it was refused as it should be."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(file)
        refused = False
    except REFUSALS as error:
        said = str(error)
        assert said and "\n" not in said, f"{what}: {said!r}"
        assert len(said) < 2000, f"{what}: {said!r}"
        assert str(root) in said, f"{what} names no file: {said!r}"
        refused = True
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert time.process_time() - began < 20, what
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**19, f"{what}: {grown} KiB"  # 512 MiB
    return refused


@pytest.mark.parametrize("name", TEXT)
def test_damaged_json(name, tmp_path):
    write, load = TEXT[name]
    file = write(tmp_path)
    load(file)
    text, rng = file.read_text(), random.Random(f"{name} 0")
    refused = 0
    for case in range(30 * TIMES):
        file.write_text(mutated_text(text, rng), encoding="utf-8", errors="surrogatepass")
        refused += attempt(load, file, tmp_path, f"{name} {case}")
    assert refused


@pytest.mark.parametrize("name", TREES)
def test_damaged_trees_with_a_true_checksum(name, tmp_path):
    write, load = TREES[name]
    file = write(tmp_path)
    load(file)
    tree, rng = load_checkpoint(file), random.Random(f"{name} 1")
    refused = 0
    for case in range(40 * TIMES):
        mutant = mutated_tree(tree, rng)
        try:
            save_checkpoint(file, mutant)
        except (TypeError, ValueError, OSError, RuntimeError):
            continue  # never written
        refused += attempt(load, file, tmp_path, f"{name} {case}")
    assert refused


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes(name, tmp_path):
    write, load = BYTES[name]
    file = write(tmp_path)
    if name != "CIFAR10":
        load(file)
    data, rng = file.read_bytes(), random.Random(f"{name} 2")
    refused = 0
    for case in range(12 * TIMES):
        file.write_bytes(mutated_bytes(data, rng))
        refused += attempt(load, file, tmp_path, f"{name} {case}")
    assert refused


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(*argv)`: exit code and stderr of the command, whose training is left out."""
    monkeypatch.setattr(Run, "carry_through", lambda self: {})

    def run(*argv):
        code = 0
        try:
            main([str(part) for part in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err.strip()

    return run


@pytest.mark.parametrize("kind", ["tableau", "schedule", "config", "denoiser", "run"])
def test_commands_refuse_damaged_files(kind, tmp_path, command):
    """Exit code 2, one sentence that names the file, and nothing written; or it works."""
    good = denoiser(tmp_path)
    rng, output = random.Random(f"{kind} 3"), tmp_path / "samples.npy"
    sample = ["sample", good, "--env=SwissRoll", "--n=2", f"--output={output}", "--device=cpu"]
    logs = f"--log-dir={tmp_path / 'logs'}"
    run = tmp_path / "run"
    if kind == "run":
        run.mkdir()
        settings = defaults("SwissRoll", "sft-pg")
        (run / "config.json").write_text(settings.to_json())
        file, argv = run / "config.json", ["train", f"--resume={run}"]
        shutil.copy(good, run / "denoiser.safetensors")
    elif kind == "denoiser":
        file, argv = good, sample
    else:
        file = {"tableau": table, "schedule": schedule, "config": config}[kind](tmp_path)
        argv = {
            "tableau": [*sample, f"--solver={file}"],
            "schedule": [*sample, f"--schedule={file}", "--solver=ddim"],
            "config": ["train", f"--config={file}", logs],
        }[kind]
    code, said = command(*argv)
    assert code == 0, said
    output.unlink(missing_ok=True)
    data = file.read_bytes()
    codes = set()
    for case in range(8 * TIMES):
        if file.suffix == ".json":
            text = mutated_text(data.decode(), rng)
            file.write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            file.write_bytes(mutated_bytes(data, rng))
        code, said = command(*argv)
        codes.add(code)
        assert code in (0, 2), f"{case}: {said}"
        if code == 2:
            lines = [line for line in said.splitlines() if "warning" not in line]
            assert len(lines) == 1, f"{case}: {said}"
            assert lines[0].startswith("fewstep: "), f"{case}: {said}"
            assert not output.exists(), case
        elif output.exists():
            assert np.isfinite(np.load(output)).all(), case
            output.unlink()
    assert 2 in codes


def test_a_table_whose_samples_overflow_is_not_sampled(tmp_path, command):
    """Scale -1e308 is a finite number: what it makes of samples is not."""
    good, file, output = denoiser(tmp_path), table(tmp_path), tmp_path / "samples.npy"
    tree = json.loads(file.read_text())
    tree["scale"][0] = -1e308
    file.write_text(json.dumps(tree))
    for name in ("sample", "evaluate"):
        argv = [name, good, "--env=SwissRoll", f"--solver={file}", "--device=cpu"]
        argv += [f"--output={output}"]
        argv += ["--n=5"] if name == "sample" else ["--samples=50"]
        code, said = command(*argv)
        assert code == 2, said
        assert str(file) in said
        assert "NaN or infinity" in said
        assert not output.exists()
