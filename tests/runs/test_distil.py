"""`fewstep distil` on tiny pipelines, from the flags to a scheduler that the pipeline loads."""

import json
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

import tiny_pipelines
from tiny_pipelines import PROMPTS

from fewstep.agents import ScheduleLearning, Tableau
from fewstep.agents.pipelines import open_pipeline
from fewstep.agents.pipelines.body import PipelineBody
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.runs.run.distilling import DistilRun

# Of a solver that errs a lot, so that a few noises are enough to find something better.
SHORT = ["--solver=ddim", "--steps=4", "--samples=4", "--held-out-samples=2", "--scale=2"]
SHORT += ["--micro-batch=16"]
WEIGHTS = [*SHORT, "--learn=weights"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: the folder of a tiny pipeline, and its prompts' file."""
    return tiny_pipelines.kept_in(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def read(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module", params=["sd", "sd3"])
def learned(request, fewstep, saved, prompts, tmp_path_factory):
    """A finished run: the pipeline, the folder, and its network's evaluations, planned and made."""
    made, plans = [], []
    count, plan = PipelineBody._count, DistilRun.plan
    output = tmp_path_factory.mktemp("learned") / "out"

    def counted(self, samples, graph):
        count(self, samples, graph)
        if type(self) is PipelineBody:
            made.append(samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineBody, "_count", counted)
        patch.setattr(DistilRun, "plan", lambda run: plans.append(plan(run)) or plans[-1])
        flags = [f"--prompts={prompts}", f"--output={output}", "--guidance=3", *WEIGHTS]
        assert fewstep("distil", saved(request.param), *flags) == 0
    return request.param, output, plans[0].total, sum(made)


def test_what_was_planned_without_the_network_is_what_it_was_asked(learned):
    _, _, planned, made = learned
    assert made == planned


def test_a_scheduler_is_learned_that_errs_less_under_held_out_prompts(learned):
    _, output, _, _ = learned
    results = read(output)
    errors = {who: its["error"] for who, its in results["errors"].items()}
    assert errors["after"] < errors["before"]
    assert results["evaluations"]["after"] == 2 * 4
    assert set(results["held_out_prompts"]) < set(PROMPTS)
    assert len(results["error_by_step"]["after"]) == 4
    for file in ("pictures.png", "errors.png", "config.json"):
        assert (output / file).stat().st_size > 0


def test_the_pipeline_draws_with_it_what_was_learned(learned, saved):
    name, output, _, _ = learned
    opened = open_pipeline(saved(name))
    noise = torch.randn(1, *opened.family.shape, generator=torch.Generator().manual_seed(1))
    table = Tableau.load(output / "weights.json")
    ours = table.sample(opened.denoiser(PROMPTS[:1]).given(0, 3.0), noise)
    opened.pipeline.scheduler = TableauScheduler.from_pretrained(output / "scheduler")
    theirs = opened.pipeline(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=noise.clone(),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
from fewstep.agents.pretrained.scheduler import TableauScheduler
torch.set_num_threads(1)
folder, scheduler, prompt, noise, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.scheduler = TableauScheduler.from_pretrained(scheduler)
noise = torch.load(noise, weights_only=True)
options = dict(num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt")
torch.save(pipe([prompt] * len(noise), **options).images, out)
assert not {"fewstep.runs", "fewstep.agents.pipelines", "stable_baselines3"} & set(sys.modules)
"""


@pytest.mark.slow
def test_in_a_fresh_process_the_pictures_are_the_same(learned, saved, tmp_path):
    name, output, _, _ = learned
    opened = open_pipeline(saved(name))
    noise = torch.randn(2, *opened.family.shape, generator=torch.Generator().manual_seed(1))
    torch.save(noise, tmp_path / "noise.pt")
    files = [saved(name), output / "scheduler", PROMPTS[3], tmp_path / "noise.pt", tmp_path / "pt"]
    subprocess.run([sys.executable, "-c", FRESH, *map(str, files)], check=True)
    table = Tableau.load(output / "weights.json")
    latents = table.sample(opened.denoiser(PROMPTS[3:]).given(0, 3.0), noise)
    theirs = torch.load(tmp_path / "pt", weights_only=True)
    # Half a level of a byte: no picture in 8 bits could tell.
    torch.testing.assert_close(opened.family.decoded(latents), theirs, rtol=0, atol=0.5 / 255)


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive; `most` is their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return made

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._seen.discard(key)
        self.now -= size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(fewstep, saved, tmp_path):
    peaks = {}
    flags = ["--solver=ddim", "--teacher=ddim", "--scale=1", "--samples=4", "--rounds=1"]
    flags += ["--held-out-samples=4", "--micro-batch=4"]
    for steps in (8, 32):
        told = [f"--output={tmp_path / str(steps)}", f"--steps={steps}", *flags]
        with Living() as living, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a goal of no more steps taught nothing
            assert fewstep("distil", saved("ddpm"), *told) == 0
        peaks[steps] = living.most
    # The goals of all steps and the states of samplers are compared wait on the CPU.
    waiting = (32 - 8) * 4 * (3 * 8 * 8) * 4
    assert peaks[32] < peaks[8] + 8 * waiting


def test_a_dry_run_writes_nothing(fewstep, saved, tmp_path, capsys):
    output = tmp_path / "out"
    assert fewstep("distil", saved("ddpm"), f"--output={output}", "--dry-run", *WEIGHTS) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "evaluations of the network for single samples, 0 of them with a gradient" in said
    assert "seconds in all" in said
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "dit", "ddpm"])
def test_times_and_weights_are_learned_for_every_family(name, fewstep, saved, prompts, tmp_path):
    output = tmp_path / "out"
    flags = [f"--output={output}", "--rounds=2", *SHORT, "--scale=8"]
    flags += {"dit": [], "ddpm": []}.get(name, [f"--prompts={prompts}"])
    flags += ["--size", "16", "16"] if name == "flux" else []
    assert fewstep("distil", saved(name), *flags) == 0
    errors = {who: its["error"] for who, its in read(output)["errors"].items()}
    assert errors["after"] < errors["before"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_table(fewstep, saved, tmp_path, monkeypatch):
    flags = ["--checkpoint-seconds=0", "--rounds=3", "--learn=times", *SHORT]
    assert fewstep("distil", saved("ddpm"), f"--output={tmp_path / 'whole'}", *flags) == 0
    train = ScheduleLearning.train_round

    def kill(self):
        if self.rounds == 1 and type(self.denoiser.body) is PipelineBody:
            raise KeyboardInterrupt
        return train(self)

    cut = f"--output={tmp_path / 'cut'}"
    monkeypatch.setattr(ScheduleLearning, "train_round", kill)
    assert fewstep("distil", saved("ddpm"), cut, *flags) == 130
    assert (tmp_path / "cut" / "times.safetensors").is_file()
    monkeypatch.setattr(ScheduleLearning, "train_round", train)
    assert fewstep("distil", saved("ddpm"), cut, *flags) == 0
    tables = [
        TableauScheduler.from_pretrained(tmp_path / run / "scheduler").tableau.to_json()
        for run in ("whole", "cut")
    ]
    assert tables[0] == tables[1]


def test_a_folder_of_another_run_is_left_alone(fewstep, saved, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text('{"steps": 9}')
    before = sorted(output.iterdir())
    assert fewstep("distil", saved("ddpm"), f"--output={output}", *WEIGHTS) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert sorted(output.iterdir()) == before


BAD = {
    "empty": (["--prompts=EMPTY"], "holds no prompts"),
    "binary": (["--prompts=BINARY"], "is no text in UTF-8"),
    "missing": (["--prompts=nowhere.txt"], "no file of prompts"),
    "guidance": (["--guidance=4"], "knows no guidance"),
    "prompts": (["--prompts=GOOD"], "takes no prompts"),
    "negative": (["--negative=ugly"], "has no negative prompt"),
    "solver": (["--solver=ancestral"], "adds noise"),
    "unknown solver": (["--solver=dimm"], "did you mean 'ddim'"),
    "schedule": (["--schedule=nonsense"], "unknown schedule 'nonsense'"),
    "steps": (["--steps=2"], "must be at least 3"),
    "dtype": (["--dtype=float8"], "float8"),
    "device": (["--device=nothing"], "No device 'nothing' here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, fewstep, saved, tmp_path, capsys):
    flags, sentence = BAD[case]
    files = {"EMPTY": b"\n", "BINARY": b"\x00\xff", "GOOD": b"a cat\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    flag, _, value = flags[0].partition("=")
    flags = [f"{flag}={tmp_path / value}"] if value in files else flags
    output = tmp_path / "out"
    rest = [given for given in WEIGHTS if not given.startswith(f"{flag}=")]
    assert fewstep("distil", saved("ddpm"), f"--output={output}", *rest, *flags) == 2
    said = capsys.readouterr().err
    # Bars of diffusers, which loads the pipeline, may stand before it.
    (line,) = [line for line in said.splitlines() if line.strip() and "it/s]" not in line]
    assert line.startswith("fewstep: ")
    assert sentence in line
    assert not output.exists()


def test_no_pipeline_is_one_sentence(fewstep, tmp_path, capsys):
    assert fewstep("distil", tmp_path, f"--output={tmp_path / 'out'}") == 2
    assert "holds no diffusers pipeline" in capsys.readouterr().err
