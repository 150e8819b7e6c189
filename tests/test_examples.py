"""The scripts of `examples/` run as they stand, with short trainings."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from pages import ROOT
from PIL import Image

# Programs with flags, which train or measure for long: they are called below.
RECIPES = ("compare_schedulers", "emoji_pipeline")
EXAMPLES = [p for p in sorted((ROOT / "examples").glob("*.py")) if p.stem not in RECIPES]


def test_examples_are_found():
    assert len(EXAMPLES) >= 9


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path, monkeypatch, short_training):
    monkeypatch.chdir(tmp_path)
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_what_it_shows(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 45


@pytest.fixture
def recipe(monkeypatch):
    """`recipe(name)`: a program of `examples/` as a module."""
    pytest.importorskip("transformers")

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def pictures(tmp_path):
    """A folder of forty pictures with captions, of which four are held out."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(40):
        pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    lines = [f"{i}.png\ta {('red', 'blue')[i % 2]} thing {i % 5}" for i in range(40)]
    (folder / "captions.tsv").write_text("\n".join(lines))
    return folder


SMALL = {"image_size": 16, "vae_widths": (8, 8), "widths": (8, 8, 8), "text_width": 8}
SHORT = {"tokens": 12, "vocabulary": 600, "vae_rounds": 2, "rounds": 4, "batch_size": 4}


@pytest.mark.slow
def test_the_pipelines_recipe_goes_on_after_a_kill_and_gives_a_pipeline_of_diffusers(
    recipe, pictures, tmp_path, monkeypatch
):
    module = recipe("emoji_pipeline")
    its = module.Recipe(**SMALL, **SHORT)
    images = module.load_images("ImageFolder", pictures, image_size=16, captions=True)
    whole = module.train(images, tmp_path / "whole", its)
    latents = module.encoded(whole.vae, images.samples)[0]
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)

    step = module.Training._round

    def killed(self):
        if self.file.name == "flow.pt" and self.done == 2:
            self._save()
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(module.Training, "_round", killed)
    with pytest.raises(KeyboardInterrupt):
        module.train(images, tmp_path / "cut", its)
    monkeypatch.setattr(module.Training, "_round", step)
    cut = module.train(images, tmp_path / "cut", its)
    for part in ("vae", "text_encoder", "unet"):
        pairs = zip(getattr(whole, part).parameters(), getattr(cut, part).parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    with pytest.raises(SystemExit, match="of another recipe"):
        module.train(images, tmp_path / "cut", dataclasses.replace(its, rounds=5))

    whole.save_pretrained(tmp_path / "pipeline")
    pipe = module.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    assert pipe("a red thing", num_inference_steps=2, generator=generator).images[0].size == (
        16,
        16,
    )


@pytest.mark.slow
def test_schedulers_are_compared_at_the_same_calls(recipe, pictures, tmp_path, monkeypatch):
    train, compare = recipe("emoji_pipeline"), recipe("compare_schedulers")
    images = train.load_images("ImageFolder", pictures, image_size=16, captions=True)
    train.train(images, tmp_path, train.Recipe(**SMALL, **SHORT)).save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a red thing\na blue thing\n")
    monkeypatch.setattr(compare, "FINE", 3)
    told = [str(tmp_path / "pipe"), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "5"]
    compare.main([*told, "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "compared.json").read_text())
    errors = {row["sampler"]: row["error"] for row in rows}
    assert {row["calls"] for row in rows[1:]} == {5}
    assert errors["fine solver"] == 0 < errors["diffusers FlowMatchEuler"]
    assert len(set(errors.values())) == len(errors)
