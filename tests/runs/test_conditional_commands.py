"""Conditional runs from the command line: classes, captions, guidance, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.bodies import named_body
from fewstep.envs import Classes, DiscreteVP
from fewstep.runs.settings.train import parse

TINY = [
    "--env=Digits",
    "--steps=3",
    "--evaluation-samples=100",
    "--evaluations=1",
    "--threads=1",
]
CLONE = ["pretrain", *TINY, "--rounds=8", "--batch-size=32"]


@pytest.fixture(scope="module")
def cloned(tmp_path_factory, fewstep):
    """The folder of a conditional denoiser's run."""
    log_dir = tmp_path_factory.mktemp("cloned")
    assert fewstep(*CLONE, "--conditional", f"--log-dir={log_dir}") == 0
    return next(log_dir.iterdir())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, fewstep, cloned):
    """The folder of a guided fine-tuning."""
    log_dir = tmp_path_factory.mktemp("tuned")
    flags = ["--agent=sft", "--rounds=2", "--batch-size=8", "--critic-rounds=0", "--guidance=2"]
    start = [f"--denoiser={cloned}", "--conditional", f"--log-dir={log_dir}"]
    assert fewstep("train", *TINY, *flags, *start) == 0
    return next(log_dir.iterdir())


def test_a_conditional_denoiser_is_cloned(cloned):
    denoiser = Denoiser.load(cloned)
    assert denoiser.classes == 10
    assert denoiser.is_open and denoiser.conditioning.drops
    metrics = json.loads((cloned / "results.json").read_text())["metrics"]
    accuracy = metrics["class_accuracy[digits-classifier]"]
    assert 0 <= accuracy["after"] <= 1
    assert accuracy["floor"] > 0.9


def test_a_guided_run_keeps_its_guidance(tuned):
    assert Denoiser.load(tuned).conditioning.guidance == 2
    results = json.loads((tuned / "results.json").read_text())
    assert results["nfe"] == 6


def test_its_samples_are_evaluated_with_another_guidance(tuned, fewstep, tmp_path):
    scores = tmp_path / "scores.json"
    flags = ["--guidance-interval", "0.0", "2.0", "--samples=100", f"--output={scores}"]
    assert fewstep("evaluate", str(tuned), *flags) == 0
    # Of the times 1000, 667 and 333 of DDPM's chain the last is within the interval.
    assert json.loads(scores.read_text())["nfe"] == 4


def test_an_earlier_run_s_terms_are_left_out_with_its_guidance(tuned, tmp_path):
    config = json.loads((tuned / "config.json").read_text())
    config["run"] |= {"guidance_interval": [0.2, 5.0], "guidance_rescale": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def terms(*flags):
        run = parse(flags).run
        return run.guidance_interval, run.guidance_rescale

    for source in (f"--config={tmp_path / 'config.json'}", f"--start-from={tmp_path}"):
        assert terms(source, "--guidance=3") == ((0.2, 5), 0.3)
        assert terms(source, "--guidance=1") == (None, None)
        # What is asked for here is refused where the denoiser is known.
        assert terms(source, "--guidance=1", "--guidance_rescale=0.5") == (None, 0.5)


@pytest.mark.parametrize("flags", [[], ["--condition=3"]])
def test_samples_are_drawn_of_the_data_s_classes_or_of_one(flags, tuned, fewstep, tmp_path):
    file = tmp_path / "samples.npy"
    assert fewstep("sample", str(tuned), "--n=5", f"--output={file}", *flags) == 0
    assert np.load(file).shape == (5, 1, 8, 8)


@pytest.mark.slow
def test_a_conditional_unet_goes_to_diffusers_and_comes_back(fewstep, tmp_path, capsys):
    file, folder = tmp_path / "file.safetensors", tmp_path / "pipeline"
    body = named_body("unet-tiny", (1, 8, 8), 1000, None, conditions=Classes(10))
    Denoiser(body, DiscreteVP.linear(1000), drops=True).save(file)
    assert fewstep("export", file, folder, "--solver=ddim", "--steps=3", "--guidance=2") == 0
    assert "pipeline.unet and pipeline.scheduler sample classes" in capsys.readouterr().out
    draw = ["sample", folder, "--env=Digits", "--n=2", f"--output={tmp_path / 'threes.npy'}"]
    assert fewstep(*draw, "--condition=3", "--guidance=2") == 0
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert (config["num_class_embeds"], config["_classes"], config["_drops"]) == (11, 10, True)
    assert fewstep(*draw, "--classes=12") == 2
    assert "11 class embeddings, of which the last one may mean" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["--condition=3", "--conditional"])
def test_a_solver_is_distilled_under_terms_that_later_commands_keep(
    asked, cloned, fewstep, tmp_path
):
    """The run's file of the network knows nothing of them, its settings do."""
    flags = ["--agent=dode", "--batches=1", "--batch-size=8", asked, "--guidance=2"]
    start = [f"--denoiser={cloned}", f"--log-dir={tmp_path / 'logs'}", "--solver=ddim"]
    assert fewstep("train", *TINY, *flags, *start) == 0
    (run,) = (tmp_path / "logs").iterdir()
    scores = tmp_path / "scores.json"
    for more, calls in (([], 6), (["--guidance=1"], 3)):
        judge = ["evaluate", str(run), "--samples=20", f"--output={scores}", *more]
        assert fewstep(*judge) == 0
        assert json.loads(scores.read_text())["nfe"] == calls
    output = tmp_path / "analysis"
    few = ["--samples=8", "--reference-steps=6", f"--output={output}"]
    assert fewstep("analyze", str(run), *few) == 0
    assert json.loads((output / "analysis.json").read_text())["nfe"] == 6


def test_a_conditional_network_is_analysed_under_the_data_s_conditions(cloned, fewstep, tmp_path):
    few = ["--samples=8", "--steps=3", "--reference-steps=6", f"--output={tmp_path}"]
    assert fewstep("analyze", str(cloned), *few) == 0
    assert json.loads((tmp_path / "analysis.json").read_text())["nfe"] == 3


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--env=SwissRoll", "--conditional"], "have no labels"),
        (["--conditional", "--condition=3"], "leave out --conditional"),
        (["--guidance=2"], "This denoiser is unconditional"),
        (["--conditional", "--guidance=-1"], "guidance"),
        (["--conditional", "--guidance=2", "--guidance-interval", "3", "1"], "0 <= low < high"),
        (["--conditional", "--guidance-interval", "0", "2"], "needs a --guidance other than 1"),
        (
            ["--conditional", "--guidance-rescale=0.5"],
            "--guidance-rescale is the share of a guided",
        ),
        (["--conditional", "--body=mlp"], "knows no classes"),
        (["--conditional", "--agent=behavior-cloning", "--guidance=3"], "trains under each"),
    ],
)
def test_bad_conditions_are_refused_before_a_run_begins(flags, complaint, fewstep, tmp_path, capfd):
    assert fewstep("train", *TINY, *flags, f"--log-dir={tmp_path}") == 2
    error = capfd.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "give --conditional for an environment of classes, or one condition"),
        (["--condition=11"], "There are 10 classes, 0 to 9; got 11"),
    ],
)
def test_a_conditional_denoiser_needs_its_class(flags, complaint, cloned, fewstep, tmp_path, capfd):
    start = [f"--denoiser={cloned}", f"--log-dir={tmp_path}", "--agent=sft"]
    assert fewstep("train", *TINY, *start, *flags) == 2
    assert complaint in capfd.readouterr().err


def test_guidance_needs_dropped_labels(fewstep, tmp_path, capfd):
    assert fewstep(*CLONE, "--conditional", "--label-dropout=0", f"--log-dir={tmp_path}") == 0
    (folder,) = tmp_path.iterdir()
    assert fewstep("evaluate", str(folder), "--guidance=2", "--samples=100") == 2
    assert "trained without dropped labels" in capfd.readouterr().err
    assert math.isinf(Denoiser.load(folder).conditioning.interval[1])


# -------------------------------------------------------------------------------------- captions


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of ten small pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number in range(10):
        colour, name = ("red", "blue")[number % 2], f"{number}.png"
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[..., 2 * (number % 2)] = 250 - number
        Image.fromarray(pixels).save(folder / name)
        lines.append(f"{name}\t{colour} square\n")
    (folder / "captions.tsv").write_text("".join(lines))
    return ["--env=ImageFolder", f"--data-dir={folder}", "--image-size=8"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, fewstep, pictures):
    """The folder of a run that cloned a denoiser of captions and tuned it, guided."""
    log_dir = tmp_path_factory.mktemp("captioned")
    flags = ["--agent=sft", "--rounds=1", "--batch-size=4", "--critic-rounds=0", "--guidance=2"]
    clone = ["--pretrain.rounds=2", "--pretrain.batch-size=8", "--body=residual-mlp"]
    few = ["--steps=2", "--evaluation-samples=4", "--evaluations=1", "--threads=1"]
    conditional = ["--conditional", "captions", f"--log-dir={log_dir}"]
    assert fewstep("train", *pictures, *few, *flags, *clone, *conditional) == 0
    return next(log_dir.iterdir())


def test_a_run_of_captions_is_one_like_any_other(captioned):
    denoiser = Denoiser.load(captioned)
    assert denoiser.conditions.kind == "captions" and denoiser.is_open
    config = json.loads((captioned / "config.json").read_text())
    assert config["run"]["conditional"] == "captions"
    results = json.loads((captioned / "results.json").read_text())
    assert results["nfe"] == 4
    assert not any("class_accuracy" in name for name in results["metrics"])


@pytest.mark.parametrize("flags", [[], ["--condition", "red square"], ["--condition", "100"]])
def test_samples_are_drawn_of_a_text(flags, captioned, fewstep, tmp_path):
    file = tmp_path / "samples.npy"
    assert fewstep("sample", captioned, "--n=3", f"--output={file}", *flags) == 0
    assert np.load(file).shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--conditional", "captoins"], "did you mean 'captions'"),
        (["--conditional", "captions", "x"], "one kind of conditions"),
        (["--conditional", "captions"], "Digits has no captions"),
        (["--conditional", "embeddings"], "have no embeddings"),
        (["--condition=red"], "This denoiser is unconditional"),
    ],
)
def test_bad_kinds_are_refused(flags, complaint, fewstep, tmp_path, capfd):
    assert fewstep("train", *TINY, *flags, f"--log-dir={tmp_path}") == 2
    error = capfd.readouterr().err
    assert complaint in error and "Traceback" not in error


def test_a_text_is_no_class_and_captions_have_to_be_asked_for(
    cloned, captioned, pictures, fewstep, tmp_path, capfd
):
    output = f"--output={tmp_path / 'samples.npy'}"
    assert fewstep("sample", cloned, "--condition", "red square", output) == 2
    assert "A condition is a class 0 to 9" in capfd.readouterr().err
    start = [f"--denoiser={captioned}", f"--log-dir={tmp_path}", "--agent=sft"]
    assert fewstep("train", *pictures, *start) == 2
    assert "give --conditional captions for an environment of captions" in capfd.readouterr().err
