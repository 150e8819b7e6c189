"""Solvers and D-ODE on the command line: train, evaluate, sample and analyze."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fewstep.agents import DODE, Denoiser, Tableau
from fewstep.agents.solvers import SOLVERS
from fewstep.envs import VE
from fewstep.runs.run.building import build_mdp
from fewstep.runs.settings.train import Settings

CLONING = ["--pretrain.rounds=6", "--pretrain.batch-size=32", "--evaluation-samples=500"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, fewstep):
    """The folder of a finished `fewstep train --agent dode`."""
    log_dir = tmp_path_factory.mktemp("logs")
    flags = ["--agent=dode", "--solver=ddim", "--steps=10", "--batches=2", *CLONING]
    assert fewstep("train", *flags, f"--log-dir={log_dir}") == 0
    (folder,) = log_dir.iterdir()
    return folder


def test_a_run_leaves_a_tableau_that_anyone_can_run(distilled):
    names = {path.name for path in distilled.iterdir()}
    assert {"tableau.json", "lambdas.png", "denoiser.safetensors", "results.json"} <= names
    assert "checkpoint.safetensors" not in names
    table = Tableau.load(distilled / "tableau.json")
    assert (table.name, table.nfe) == ("d-ddim", 10)
    denoiser = Denoiser.load(distilled / "denoiser.safetensors")
    assert denoiser.process == table.process
    assert table.process.t_max == 1000  # enough noisings for a solver's fractional times
    events = EventAccumulator(str(distilled / "tensorboard" / "dode"))
    events.Reload()
    assert {"train/lambda_000", "train/given_error", "eval/sliced_wasserstein"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["samples/sampler"]
    results = json.loads((distilled / "results.json").read_text())
    assert len(results["fits"]) == 10
    assert results["errors"]["distilled"] < results["errors"]["given"]
    mdp = build_mdp(Settings.from_json(distilled / "config.json"))
    agent = DODE.load(distilled / "tableau.json", mdp, denoiser=denoiser)
    assert [fit.lambdas.tolist() for fit in agent.fits] == [
        fit["lambdas"] for fit in results["fits"]
    ]


def test_evaluate_and_sample_use_the_run_s_tableau(distilled, tmp_path, fewstep):
    scores = tmp_path / "scores.json"
    assert fewstep("evaluate", distilled, "--samples=500", f"--output={scores}") == 0
    results = json.loads(scores.read_text())
    assert (results["agent"], results["nfe"]) == ("d-ddim", 10)
    trained = json.loads((distilled / "results.json").read_text())["metrics"]
    assert results["metrics"]["mmd"]["after"] == trained["mmd"]["after"]
    for name, flags in (("a", []), ("b", [f"--solver={distilled / 'tableau.json'}"])):
        output = f"--output={tmp_path / name}.npy"
        assert fewstep("sample", distilled, "--n=9", output, *flags) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.slow
def test_refinement_is_interrupted_and_resumed(distilled, tmp_path, fewstep, monkeypatch):
    flags = ["--agent=dode", "--batches=1", "--refine=end-to-end", "--refine-steps=6"]
    common = [*flags, f"--denoiser={distilled}", "--evaluation-samples=500", "--evaluations=1"]
    assert fewstep("train", *common, f"--log-dir={tmp_path / 'whole'}") == 0
    train_round = DODE.train_round

    def killed(self):
        if self.rounds == 3:
            raise KeyboardInterrupt
        return train_round(self)

    monkeypatch.setattr(DODE, "train_round", killed)
    parts = f"--log-dir={tmp_path / 'parts'}"
    assert fewstep("train", *common, parts, "--checkpoint-seconds=0") == 130
    monkeypatch.undo()
    (folder,) = (tmp_path / "parts").iterdir()
    assert fewstep("train", "--resume", folder) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    tables = [Tableau.load(path / "tableau.json") for path in (whole, folder)]
    np.testing.assert_array_equal(tables[0].weights, tables[1].weights)
    assert json.loads((folder / "tableau.json").read_text())["training"]["rounds"] == 7


# flow-sde needs a straight path: test_flow_commands.py.
ALONE = [name for name in SOLVERS if SOLVERS[name].needs is None and name != "flow-sde"]


@pytest.mark.parametrize("solver", ALONE)
def test_every_solver_samples_from_any_denoiser(solver, distilled, tmp_path, fewstep):
    output = tmp_path / "samples.npy"
    flags = [f"--solver={solver}", "--steps=6", "--n=5", f"--output={output}"]
    assert fewstep("sample", distilled, *flags) == 0
    assert np.isfinite(np.load(output)).all()


@pytest.mark.parametrize("schedule", ["log_snr", "trailing", "quad", "1000,600,250,40,1"])
def test_a_schedule_is_named_or_listed(schedule, distilled, tmp_path, fewstep):
    scores = tmp_path / "scores.json"
    steps = [] if "," in schedule else ["--steps=4"]
    flags = ["--solver=ddim", f"--schedule={schedule}", *steps, "--samples=500"]
    assert fewstep("evaluate", distilled, *flags, f"--output={scores}") == 0
    assert json.loads(scores.read_text())["nfe"] == 4


def test_a_first_call_for_nothing_is_not_counted(distilled, tmp_path, fewstep):
    scores = tmp_path / "scores.json"
    afs = ["--solver-options", "afs", "True"]
    flags = ["--solver=ipndm", "--steps=6", *afs, "--samples=500", f"--output={scores}"]
    assert fewstep("evaluate", distilled, *flags) == 0
    assert json.loads(scores.read_text())["nfe"] == 5
    flags = ["--agent=dode", "--steps=6", "--batches=2", *CLONING, *afs]
    assert fewstep("train", *flags, f"--log-dir={tmp_path / 'logs'}") == 0
    (folder,) = (tmp_path / "logs").iterdir()
    table = Tableau.load(folder / "tableau.json")
    assert (table.steps, table.nfe) == (6, 5) and not table.asked[0]
    assert fewstep("evaluate", folder, "--samples=500", f"--output={scores}") == 0
    assert json.loads(scores.read_text())["nfe"] == 5
    analysed = ["--samples=16", "--reference-steps=40", f"--output={tmp_path / 'analysis'}"]
    assert fewstep("analyze", folder, *analysed) == 0


def test_a_ve_process_is_cloned_with_edm_and_sampled_on_karras_s_grid(tmp_path, fewstep):
    flags = ["--process=ve", "--rounds=6", "--batch-size=32", "--evaluation-samples=500"]
    assert fewstep("pretrain", *flags, f"--log-dir={tmp_path}") == 0
    (folder,) = tmp_path.iterdir()
    denoiser = Denoiser.load(folder / "denoiser.safetensors")
    assert denoiser.process == VE()
    assert denoiser.prediction == "edm"
    scores = tmp_path / "scores.json"
    evaluate = ["evaluate", folder, "--solver=heun", "--steps=3", "--samples=500"]
    assert fewstep(*evaluate, f"--output={scores}") == 0
    assert json.loads(scores.read_text())["nfe"] == 5


def test_analyze_draws_what_distillation_changes(distilled, tmp_path, fewstep):
    few = ["--samples=16", "--reference-steps=40"]
    for name, flags in (("own", []), ("other", ["--solver=dpm-solver++-2m", "--steps=5"])):
        folder = tmp_path / name
        assert fewstep("analyze", distilled, *few, *flags, f"--output={folder}") == 0
        for picture in ("correlation", "trajectory", "lambdas"):
            assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        analysis = json.loads((folder / "analysis.json").read_text())
        assert set(analysis["squared_error_to_reference"]) == {"base", "distilled"}
        assert all(0 < c <= 1 for c in analysis["cosine_similarity_of_neighbours"].values())
    assert (analysis["solver"], analysis["nfe"]) == ("dpm-solver++-2m", 5)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda table: table | {"version": 99}, "version 99"),
        (lambda table: table | {"scale": [float("nan")] * 10}, "NaN"),
        (lambda table: table | {"weights": [[[9, 1.0]]] * 10}, "lower-triangular"),
        (lambda table: table | {"process": {"kind": "VE"}}, "times must lie in"),
        (lambda table: {"tableau": table}, "Not a tableau"),
    ],
)
def test_a_bad_tableau_is_refused(damage, says, distilled, tmp_path, fewstep, capsys):
    table = json.loads((distilled / "tableau.json").read_text())
    path = tmp_path / "table.json"
    path.write_text(json.dumps(damage(table)))
    assert fewstep("evaluate", distilled, f"--solver={path}") == 2
    assert says in capsys.readouterr().err


def test_a_tableau_that_does_not_go_with_the_rest_is_refused(
    distilled, finished, tmp_path, fewstep, capsys
):
    table = distilled / "tableau.json"
    assert fewstep("evaluate", distilled, f"--solver={table}", "--steps=5") == 2
    assert "leave out --steps" in capsys.readouterr().err
    assert fewstep("evaluate", finished, f"--solver={table}") == 2
    assert "is made for DiscreteVP(T=1000" in capsys.readouterr().err
    assert fewstep("evaluate", distilled, f"--solver={tmp_path / 'no.json'}") == 2
    assert "no.json" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(distilled, copy)
    (copy / "tableau.json").write_text("{")
    assert fewstep("train", "--resume", copy) == 2
    assert "not valid JSON" in capsys.readouterr().err
    torch.save({}, copy / "tableau.json")
    assert fewstep("evaluate", copy) == 2
    assert "tableau.json" in capsys.readouterr().err


def test_cloning_does_not_start_from_a_denoiser(distilled, tmp_path, fewstep, capsys):
    flags = ["--agent=behavior-cloning", f"--denoiser={distilled}", f"--log-dir={tmp_path}"]
    assert fewstep("train", *flags) == 2
    assert "starts from nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("default:the teacher is no better")
def test_a_warning_is_one_line(tmp_path, distilled, fewstep, monkeypatch, capsys):
    train_round = DODE.train_round

    def worried(self):
        warnings.warn("the teacher is no better", stacklevel=1)
        return train_round(self)

    monkeypatch.setattr(DODE, "train_round", worried)
    flags = ["--agent=dode", "--batches=1", "--evaluation-samples=100", f"--denoiser={distilled}"]
    assert fewstep("train", *flags, f"--log-dir={tmp_path}") == 0
    said = capsys.readouterr().err
    assert "fewstep: warning: the teacher is no better\n" in said
    assert "UserWarning" not in said


@pytest.mark.parametrize(
    ("flags", "named", "others"),
    [
        (
            "--agent=solver --descent.optimizer=adam --descent.rounds=3 --descent.times-rate=1e6 "
            "--batch-size=8 --batches=1 --scale=2 --start=given",
            "--descent.times-rate or --descent.coefficients-rate or --descent.shifts-rate.",
            "critic",
        ),
        (
            "--agent=rdpo --method=cross-entropy --spread.coefficients=1e30 --learn.no-shifts "
            "--batch-size=8 --held-out=8",
            "--spread.times or --spread.coefficients.",
            "gradient",
        ),
    ],
)
def test_divergence_names_only_flags_that_the_run_reads(
    flags, named, others, fewstep, tmp_path, capsys
):
    cloning = [*CLONING, "--env=SwissRoll", "--steps=4"]
    assert fewstep("train", *flags.split(), *cloning, f"--log-dir={tmp_path}") == 2
    said = capsys.readouterr().err
    assert f"and a smaller {named}\n" in said
    assert others not in said.replace(str(tmp_path), "").partition("fewstep: ")[2]
