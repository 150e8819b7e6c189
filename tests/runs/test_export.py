"""The sampler that a run trains goes with its denoiser: to every command, and to diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fewstep.agents import Tableau
from fewstep.agents.solvers import ddim, make_solver
from fewstep.envs import RectifiedFlow, Schedule

TINY = [
    "--env=Digits",
    "--body=unet-tiny",
    "--steps=3",
    "--rounds=2",
    "--pretrain.rounds=1",
    "--batch-size=4",
    "--n-critic=2",
    "--n-generator=2",
    "--minibatch-size=6",
    "--critic.width=8",
    "--evaluations=0",
    "--evaluation-samples=20",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, fewstep):
    """A run of SFT-PG whose sampler no flag's default describes: three steps, learned noise."""
    folder = tmp_path_factory.mktemp("logs")
    noisy = [
        "--policy.learn-std",
        "--optimizer.learning-rate=0.1",
        "--solver-options",
        "last_std",
        "0.2",
    ]
    assert fewstep("train", *TINY, f"--log-dir={folder}", *noisy) == 0
    (path,) = folder.iterdir()
    return path


def samples(fewstep, source, file):
    assert fewstep("sample", source, "--env=Digits", "--n=4", f"--output={file}") == 0
    return np.load(file)


def test_the_table_holds_the_learned_noise(run):
    table = Tableau.load(run / "tableau.json")
    assert table.steps == 3
    assert 0 < abs(table.noise[-1] - 0.2) < 0.1


def test_evaluate_scores_the_sampler_that_was_trained(run, fewstep, tmp_path):
    output = tmp_path / "scores.json"
    assert fewstep("evaluate", run, "--evaluation-samples=20", f"--output={output}") == 0
    scores, trained = (json.loads(path.read_text()) for path in (output, run / "results.json"))
    assert scores["nfe"] == trained["nfe"] == 3
    name = "sliced_wasserstein"
    assert scores["metrics"][name]["after"] == trained["metrics"][name]["after"]


def test_a_run_becomes_a_pipeline_of_diffusers(run, fewstep, tmp_path):
    from diffusers import DDPMPipeline

    folder = tmp_path / "pipeline"
    assert fewstep("export", run, folder) == 0
    pictures = DDPMPipeline.from_pretrained(folder)(
        batch_size=2, num_inference_steps=3, output_type="np"
    ).images
    assert pictures.shape == (2, 8, 8, 1)
    # Read back, it samples by its own table.
    ours, theirs = (
        samples(fewstep, source, tmp_path / f"{n}.npy") for n, source in enumerate((run, folder))
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_a_body_that_diffusers_does_not_know_is_refused(fewstep, tmp_path, capsys):
    flags = ["--env=SwissRoll", "--rounds=1", "--evaluations=0", "--evaluation-samples=20"]
    assert fewstep("pretrain", *flags, f"--log-dir={tmp_path}") == 0
    (path,) = tmp_path.iterdir()
    assert fewstep("export", path, tmp_path / "pipeline") == 2
    assert "body is a MLP" in capsys.readouterr().err


def test_a_pipeline_is_not_written_over_a_file(run, fewstep, tmp_path, capsys):
    (tmp_path / "pipeline").write_text("mine")
    assert fewstep("export", run, tmp_path / "pipeline") == 2
    assert "it is a file" in capsys.readouterr().err


def test_levels_are_printed_for_other_programs(fewstep, tmp_path, capsys):
    process = RectifiedFlow(3.0, time_scale=1000)
    ddim(Schedule.uniform(process, 2)).save(tmp_path / "two.json")
    assert fewstep("levels", tmp_path / "two.json") == 0
    shown = capsys.readouterr().out
    assert "sigmas (ComfyUI, A1111): 1, 0.75, 0\n" in shown
    assert "timesteps=[1000, 750]" in shown
    assert "with shift=3, set_timesteps(sigmas=[1, 0.5])" in shown
    make_solver("flow-heun", Schedule.uniform(process, 2)).save(tmp_path / "tableau.json")
    assert fewstep("levels", tmp_path) == 2
    assert "does not ask the network once at each" in capsys.readouterr().err
    assert fewstep("levels", tmp_path / "no.json") == 2
    (tmp_path / "tableau.json").unlink()
    assert fewstep("levels", tmp_path) == 2
    assert "no tableau.json, and no exported scheduler" in capsys.readouterr().err
