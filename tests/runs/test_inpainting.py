"""`fewstep train --inpaint`: trained, scored, sampled and drawn in that environment."""

import json

import numpy as np
import pytest
import torch

from fewstep.envs import make_mdp


@pytest.fixture(scope="module")
def run(tmp_path_factory, fewstep, tiny):
    log_dir = tmp_path_factory.mktemp("logs")
    flags = ["--env=Digits", "--steps=4", "--inpaint=half", "--body=residual-mlp"]
    assert fewstep("train", *flags, f"--log-dir={log_dir}", *tiny) == 0
    (folder,) = log_dir.iterdir()
    return folder


def known_are_real(samples, noise=0.0):
    """Whether all upper halves are those of training samples, up to six deviations of noise."""
    real = make_mdp("Digits").target.samples[..., :4, :].flatten(1)
    found = samples[..., :4, :].flatten(1)
    return bool((torch.cdist(found, real, p=torch.inf).amin(1) <= 6 * noise).all())


def test_a_run_says_where_it_trained(run):
    assert "inpaint=half" in run.name
    assert json.loads((run / "config.json").read_text())["run"]["inpaint"] == "half"
    assert (run / "samples.png").is_file()


def test_samples_of_a_run_hold_known_pixels(run, fewstep, tmp_path):
    file = tmp_path / "samples.npy"
    assert fewstep("sample", run, "--n=7", f"--output={file}") == 0
    assert known_are_real(torch.from_numpy(np.load(file)))
    # With a solver that has memory, in other steps, which end at the first noising.
    solver = ["--solver=dpm-solver++-2m", "--steps=5"]
    assert fewstep("sample", run, "--n=7", f"--output={file}", *solver) == 0
    assert known_are_real(torch.from_numpy(np.load(file)), noise=0.01)


def test_scores_of_a_run_are_those_of_that_environment(run, fewstep, tmp_path):
    """`evaluate` finds the environment in the folder: the same scores as the run's own."""
    file = tmp_path / "scores.json"
    assert fewstep("evaluate", run, f"--output={file}", "--evaluation-samples=500") == 0
    scored = json.loads(file.read_text())["metrics"]["sliced_wasserstein_fresh"]["after"]
    own = json.loads((run / "results.json").read_text())["metrics"]["sliced_wasserstein_fresh"]
    assert scored == pytest.approx(own["after"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--inpaint=hal"], "did you mean 'half'"),
        (["--inpaint=half", "--agent=dode"], "'dode' learns a solver for samples that move freely"),
    ],
)
def test_what_cannot_be_is_refused(flags, complaint, fewstep, capsys, tmp_path):
    assert fewstep("train", "--env=Digits", *flags, f"--log-dir={tmp_path}") == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
