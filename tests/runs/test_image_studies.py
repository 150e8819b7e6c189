"""The studies on images, in small: every kind of cell, the table, and that finished cells stay."""

from __future__ import annotations

import dataclasses
import json

import pytest
from image_files import write_mnist

from fewstep.runs.sampler_studies import SAMPLER_STUDIES
from fewstep.runs.studies import STUDIES


# So few steps of FastDPM start late, and say so.
@pytest.mark.filterwarnings("ignore:Sampling starts from pure noise")
def test_the_study_of_samplers(tmp_path, fewstep, monkeypatch):
    study = SAMPLER_STUDIES["samplers"]
    wanted = {"DDPM, sub-sampled", "SN-DDPM", "D-DDIM", "SFT-PG (B)"}
    samplers = [sampler for sampler in study.samplers if sampler.label in wanted]
    yardstick = dataclasses.replace(study.samplers[0], steps=(7,))
    small = dataclasses.replace(study, samplers=(yardstick, *samplers))
    monkeypatch.setitem(SAMPLER_STUDIES, "samplers", small)
    flags = [f"--log-dir={tmp_path}", "--rounds=1", "--seeds", "0", "--steps", "4"]
    assert fewstep("benchmark", "samplers", *flags) == 0
    folder = tmp_path / "benchmark" / "samplers"
    records = json.loads((folder / "results.json").read_text())
    assert {(record["sampler"], record["nfe"]) for record in records} == {
        ("DDPM, every noising", 7),
        *((label, 4) for label in wanted),
    }
    table = (folder / "table.md").read_text()
    assert "frechet_distance[digits-classifier] ↓" in table
    assert "precision[digits-classifier] ↑" in table
    assert (folder / "plot.png").stat().st_size > 1000
    cells = {file: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    assert fewstep("benchmark", "samplers", *flags) == 0
    assert cells == {file: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}


def test_the_study_on_mnist(tmp_path, fewstep, monkeypatch):
    write_mnist(tmp_path)
    study = STUDIES["mnist"]
    contender = study.contenders[1]
    settings = {**contender.settings, "batch_size": 4, "minibatch_size": 4, "critic_width": 8}
    few = (dataclasses.replace(contender, settings=settings),)
    small = dataclasses.replace(study, contenders=few, body_options={"width": 8, "levels": 3})
    monkeypatch.setitem(STUDIES, "mnist", small)
    flags = [f"--log-dir={tmp_path}", f"--data-dir={tmp_path}", "--rounds=1", "--steps", "3"]
    assert fewstep("benchmark", "mnist", *flags, "--evaluation-samples=8") == 0
    table = (tmp_path / "benchmark" / "mnist" / "table.md").read_text()
    assert "5 generator steps, gamma 1" in table
    assert "frechet_distance[mnist-classifier]" in table
