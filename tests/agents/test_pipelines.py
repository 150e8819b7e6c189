"""Pipelines of diffusers as denoisers: our tables give what their own schedulers give in them."""

import copy
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

import diffusers
import tiny_pipelines
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
    VQDiffusionScheduler,
)
from tiny_pipelines import PROMPTS, SD_BETAS

from fewstep.agents import CheckpointError, Denoiser
from fewstep.agents.pipelines import FAMILIES, OpenedPipeline, open_pipeline
from fewstep.agents.pipelines.families.base import too_long
from fewstep.agents.pipelines.own import own_samples
from fewstep.agents.pipelines.prompts import Prompts, read_prompts, split_prompts
from fewstep.agents.pipelines.terms import own_schedule, terms_of
from fewstep.agents.pipelines.write import save_scheduler
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.agents.solvers import build_solver
from fewstep.envs import VE, DiscreteVP
from fewstep.envs.processes import RectifiedFlow

STEPS, GUIDANCE, COUNT = 5, 4.0, 2
CHAIN = {"beta_start": 1e-4, "beta_end": 0.005}  # hardly noises: any network's samples stay small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`tiny(name)`: a tiny pipeline, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny_pipelines.make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A saved tiny Stable Diffusion."""
    path = tmp_path_factory.mktemp("saved") / "sd"
    tiny("sd").save_pretrained(path)
    return path


def opened_with(pipeline, scheduler=None):
    """Wrap a pipeline, with another scheduler perhaps."""
    pipeline = copy.copy(pipeline)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    size = (16, 16) if type(pipeline).__name__ == "FluxPipeline" else None
    return OpenedPipeline.of(pipeline, size, GUIDANCE)


def under_prompts(opened, **options):
    """Return the denoiser, guided, under two prompts of its family."""
    kind = opened.family.prompts
    if kind is None:
        return opened.denoiser(**options)
    prompts = PROMPTS[:COUNT] if kind == "texts" else ["7", "0"]
    denoiser = opened.denoiser(prompts, **options)
    return denoiser.given(torch.arange(COUNT), GUIDANCE if opened.family.splits else None)


def noise_for(opened, count=COUNT):
    return torch.randn(count, *opened.family.shape, generator=torch.Generator().manual_seed(3))


def run(opened, noise, monkeypatch, steps=STEPS):
    """Let the pipeline itself sample; return its last latents, and the times of the network."""
    pipeline, kind = opened.pipeline, opened.family.prompts
    step, seen, asked = pipeline.scheduler.step, [], []

    def noted(*args, **options):
        result = step(*args, **options)
        seen.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    def watch(_network, args, options):
        time = options["timestep"] if "timestep" in options else args[1]
        asked.append(float(torch.as_tensor(time).flatten()[0]))

    monkeypatch.setattr(pipeline.scheduler, "step", noted)
    options = {"num_inference_steps": steps}
    handle = opened.family.network.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        if kind == "texts":
            options |= {"prompt": PROMPTS[:COUNT], "latents": noise.clone()}
            options |= {"guidance_scale": GUIDANCE, "output_type": "latent"}
            name = type(pipeline).__name__
            options |= {"use_resolution_binning": False} if "PixArt" in name else {}
            options |= {"height": 16, "width": 16} if "Flux" in name else {}
            pipeline(**options)
        else:
            module = type(pipeline).__call__.__wrapped__.__globals__
            monkeypatch.setitem(module, "randn_tensor", lambda *_, **__: noise.clone())
            if kind == "classes":
                pipeline([7, 0], guidance_scale=GUIDANCE, **options)
            else:
                pipeline(batch_size=COUNT, **options)
    finally:
        handle.remove()
    return seen[-1][:COUNT], asked


def agree(ours, theirs):
    """Float32 rounding, which guidance and the steps multiply."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


SAME = {
    "sd": ("ddim", None),
    "sdxl": ("euler", None),
    "sd3": ("euler", None),
    "flux": ("euler", None),
    "pixart": ("dpm-solver++-2m", DPMSolverMultistepScheduler(**CHAIN)),
    "dit": ("ddim", DDIMScheduler(clip_sample=False, **CHAIN)),
    "ddpm": ("ddim", DDIMScheduler(clip_sample=False, **CHAIN)),
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", SAME)
def test_the_table_gives_what_the_pipeline_gives_with_its_own_scheduler(name, tiny, monkeypatch):
    solver, scheduler = SAME[name]
    opened = opened_with(tiny(name), scheduler)
    denoiser, noise = under_prompts(opened), noise_for(opened)
    table = build_solver(solver, opened.own_schedule(STEPS))
    theirs, asked = run(opened, noise, monkeypatch)
    agree(table.sample(denoiser, noise), theirs)
    times = [denoiser.network_time(t) for t in table.times[:-1].tolist()]
    scale = 1000 if name == "flux" else 1  # Flux is asked at noise levels
    assert asked == pytest.approx([time / scale for time in times], rel=1e-4)
    # The competitor of `distil` is the pipeline's sampler as well.
    own, calls = own_samples(denoiser, noise, STEPS)
    agree(own, theirs)
    assert calls == STEPS


SCHEDULERS = {
    "unipc-2": UniPCMultistepScheduler(**SD_BETAS, timestep_spacing="trailing"),
    "dpm-solver++-2m": DPMSolverMultistepScheduler(**SD_BETAS, timestep_spacing="leading"),
    "euler": EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading"),
    "heun": HeunDiscreteScheduler(**SD_BETAS, timestep_spacing="leading"),
}


@pytest.mark.numeric
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_so_it_does_with_other_schedulers(solver, tiny, monkeypatch):
    opened = opened_with(tiny("sd"), SCHEDULERS[solver])
    denoiser, noise = under_prompts(opened), noise_for(opened)
    table = build_solver(solver, opened.own_schedule(STEPS))
    agree(table.sample(denoiser, noise), run(opened, noise, monkeypatch)[0])


@pytest.mark.numeric
def test_a_learned_scheduler_runs_in_the_pipeline(tiny, monkeypatch, tmp_path):
    opened = opened_with(tiny("sd"))
    denoiser, noise = under_prompts(opened), noise_for(opened)
    table = build_solver("dpm-solver++-2m", opened.own_schedule(STEPS))
    table = table.replace(times=[*(table.times[:-1] + 0.25), table.times[-1]])
    save_scheduler(table, denoiser, tmp_path)
    loaded = opened_with(tiny("sd"), TableauScheduler.from_pretrained(tmp_path))
    theirs, asked = run(loaded, noise, monkeypatch)
    agree(table.sample(denoiser, noise), theirs)
    assert asked == pytest.approx([t - 1 for t in table.times[:-1]])
    assert loaded.terms.process == opened.terms.process


@pytest.mark.numeric
def test_small_calls_answer_as_large_ones_and_have_the_same_gradient(tiny):
    opened = opened_with(tiny("sd"))
    noise, time = noise_for(opened, 3), torch.tensor(500.0, dtype=torch.float64)
    answers, gradients = [], []
    for micro_batch in (8, 2):
        denoiser = opened.denoiser(PROMPTS, micro_batch=micro_batch)
        view = denoiser.given(torch.tensor([3, 0, 2]), GUIDANCE)
        asked, at = noise.clone().requires_grad_(), time.clone().requires_grad_()
        answer = view.denoised(asked, at)
        answer.square().sum().backward()
        answers.append(answer.detach())
        gradients.append((asked.grad, at.grad))
        assert denoiser.body.calls == [0, 6]
    agree(answers[1], answers[0])
    for ours, theirs in zip(*gradients, strict=True):
        agree(ours, theirs)
    assert all(weight.grad is None for weight in opened.family.network.parameters())


def test_a_low_precision_network_is_asked_in_its_type_and_answers_in_float32(tiny):
    pipeline = copy.copy(tiny("sd"))
    pipeline.unet = copy.deepcopy(pipeline.unet).to(torch.bfloat16)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    opened = OpenedPipeline.of(pipeline)
    denoiser = opened.denoiser(PROMPTS[:1])
    denoiser.body.rows = {name: row.bfloat16() for name, row in denoiser.body.rows.items()}
    answer = denoiser.given(0, 3.0).epsilon(noise_for(opened), 300.0)
    assert (seen, answer.dtype) == ([torch.bfloat16], torch.float32)


def test_nothing_of_the_network_is_saved_with_what_is_learned(tiny):
    denoiser = opened_with(tiny("sd")).denoiser(PROMPTS)
    assert list(denoiser.to_tree()["weights"]) == ["place"]


# -- schedulers ------------------------------------------------------------------------------------

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("scheduler", "process", "prediction"),
    [
        (DDIMScheduler(), DiscreteVP.linear(), "epsilon"),
        (
            PNDMScheduler(prediction_type="v_prediction", skip_prk_steps=True),
            DiscreteVP.linear(),
            "v",
        ),
        (DPMSolverSinglestepScheduler(), DiscreteVP.linear(), "epsilon"),
        (DEISMultistepScheduler(), DiscreteVP.linear(), "epsilon"),
        (
            DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            DiscreteVP.linear().zero_terminal_snr(),
            "v",
        ),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), RectifiedFlow(3.0, 1000.0), "flow"),
        (UniPCMultistepScheduler(**FLOW), RectifiedFlow(3.0, 1000.0), "flow"),
        (EDMEulerScheduler(), VE(), "edm"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_process_comes_from_the_scheduler(scheduler, process, prediction):
    terms = terms_of(scheduler)
    assert (terms.process, terms.prediction) == (process, prediction)
    scheduler.set_timesteps(STEPS)
    times = own_schedule(scheduler, process).times
    asked = [terms.prediction == "edm" or process.network_time(float(t)) for t in times[:STEPS]]
    if terms.prediction != "edm":
        visited = list(dict.fromkeys(scheduler.timesteps.tolist()))
        assert asked == pytest.approx(visited, abs=1)


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        (
            VQDiffusionScheduler(4),
            "does not know the noise levels of a VQDiffusionScheduler, but those of DDPM",
        ),
        (DDIMScheduler(thresholding=True), "thresholding=True, which fewstep does not honour"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "shifts by the picture's"),
        (
            EDMEulerScheduler(prediction_type="v_prediction"),
            "EDM's levels with prediction_type='v_prediction'",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_schedulers_are_refused(scheduler, sentence):
    with pytest.raises(ValueError, match=sentence):
        terms_of(scheduler)


# -- folders and prompts ---------------------------------------------------------------------------


def without(part):
    def change(path):
        index = json.loads((path / "model_index.json").read_text())
        index[part] = [None, None]
        (path / "model_index.json").write_text(json.dumps(index))

    return change


def pickled(path):
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")


def of_another_kind(path):
    index = json.loads((path / "model_index.json").read_text())
    index["_class_name"] = "MochiPipeline"
    (path / "model_index.json").write_text(json.dumps(index))


def half_sharded(path):
    place = path / "unet"
    (place / "diffusion_pytorch_model.safetensors").unlink()
    name = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index = {"weight_map": {"conv_in.weight": name}}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without("vae"), "is a StableDiffusionPipeline without its vae"),
        (without("text_encoder"), "without its text_encoder"),
        (lambda path: shutil.rmtree(path / "vae"), "lacks vae/, which its model_index.json names"),
        (lambda path: (path / "unet" / "config.json").unlink(), "lacks unet/config.json"),
        (pickled, "carries a pickle"),
        (half_sharded, "lacks diffusion_pytorch_model-00001-of-00002.safetensors"),
        (of_another_kind, "unknown kind of pipeline 'MochiPipeline'.*Known: DDIMPipeline"),
        (
            lambda path: (path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
            "diffusion_pytorch_model.safetensors",
        ),
    ],
    ids=["vae", "encoder", "part", "config", "pickle", "shard", "kind", "damaged"],
)
def test_a_folder_that_cannot_be_opened_says_why(folder, tmp_path, spoil, sentence):
    path = tmp_path / "spoilt"
    shutil.copytree(folder, path)
    spoil(path)
    with pytest.raises((CheckpointError, FileNotFoundError), match=sentence) as caught:
        open_pipeline(path)
    assert "\n" not in str(caught.value)


def test_a_name_is_not_fetched_unasked():
    with pytest.raises(FileNotFoundError, match="the local hub cache lacks it"):
        open_pipeline("nobody/nothing-of-the-kind")
    with pytest.raises(FileNotFoundError, match="no name of the hub's"):
        open_pipeline("nowhere")


def test_every_family_names_parts_that_its_pipelines_have():
    for name, family in FAMILIES.items():
        if hasattr(diffusers, name):
            parts = diffusers.DiffusionPipeline._get_signature_types.__func__(
                getattr(diffusers, name)
            )
            assert set(family.components) | set(family.unused) <= set(parts)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b" \n\n", "holds no prompts"), (b"\xff\xfe\x00", "no text in UTF-8"), (b"a\0b", "no text")],
)
def test_files_of_prompts_that_are_none_are_refused(tmp_path, content, sentence):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(path)


def test_prompts_are_told_apart_and_counted_once(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \na cat\na cow\na hen\n")
    prompts = read_prompts(tmp_path / "prompts.txt")
    learned, held_out = split_prompts(prompts)
    assert (len(learned), len(held_out)) == (3, 1)
    assert {*learned, *held_out} == {"a cat", "a dog", "a cow", "a hen"}
    assert split_prompts(prompts, ["a cow"]) == Prompts(["a cat", "a dog", "a hen"], ["a cow"])
    with pytest.raises(ValueError, match="none is left"):
        split_prompts(["a cow"], ["a cow"])


def test_a_prompt_that_is_too_long_is_cut_off_and_said(tiny):
    opened = opened_with(tiny("sd"))
    with pytest.warns(UserWarning, match="1 of 2 prompts have more than the 16 tokens"):
        denoiser = opened.denoiser(["a", "a b c d e f g h i j k l m n o p q r"])
    assert isinstance(denoiser, Denoiser)
    assert list(too_long(opened.family.readers, ["a"])) == []


def test_classes_go_by_name_or_number(tiny):
    opened = opened_with(tiny("dit"), SAME["dit"][1])
    rows = opened.family.encode(["tench", "carp", "999"])
    assert rows["class"].tolist() == [0, 1, 999, 1000]
    with pytest.raises(ValueError, match="a name or a number from 0 to 999; got 'cat'"):
        opened.family.encode(["cat"])
