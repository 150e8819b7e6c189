"""Pipelines of diffusers become denoisers and back, offline; what cannot be honoured is refused."""

import inspect
import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from fewstep.agents import DODE, CheckpointError, Denoiser
from fewstep.agents.denoisers.networks import MLP
from fewstep.agents.pretrained import export_pipeline, from_edm, from_pretrained, save_pretrained
from fewstep.agents.solvers import ancestral, make_solver
from fewstep.envs import VE, DiscreteVP, RectifiedFlow, Schedule

WEIGHTS = "diffusion_pytorch_model.safetensors"
BETAS = [0.05, 0.2, 0.35, 0.4]


@pytest.fixture
def folder(make_unet, tmp_path):
    """`folder(scheduler)`: a pipeline that diffusers wrote."""

    def write(scheduler=None, **options):
        scheduler = scheduler or DDPMScheduler()
        pipeline = DDPMPipeline(make_unet(**options).unet, scheduler)
        pipeline.save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return write


@pytest.fixture
def sample(generator):
    return torch.randn(3, 2, 8, 8, generator=generator())


def flatten(folder):
    """Move all files to the top, as the hub's first models have them."""
    for file in [*folder.glob("unet/*"), *folder.glob("scheduler/*")]:
        file.replace(folder / file.name)
    for part in ("unet", "scheduler"):
        (folder / part).rmdir()


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# By keyword: diffusers forgets positional arguments in from_config.
SCHEDULERS = [
    DDPMScheduler(clip_sample=False),
    DDPMScheduler(
        num_train_timesteps=100,
        beta_start=0.001,
        beta_end=0.2,
        clip_sample=False,
        prediction_type="sample",
    ),
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"),
    DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", clip_sample=False),
    DDPMScheduler(beta_schedule="sigmoid", clip_sample=False, prediction_type="v_prediction"),
    DDIMScheduler(num_train_timesteps=4, trained_betas=BETAS, clip_sample=False),
    PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_denoiser_predicts_what_the_pipeline_does(scheduler, folder, sample):
    denoiser = from_pretrained(folder(scheduler))
    torch.testing.assert_close(denoiser.process.betas.float(), scheduler.betas, rtol=1e-6, atol=0)
    # The same formulas for x_0, whichever scheduler has them.
    judge = DDPMScheduler.from_config(scheduler.config, clip_sample=False)
    for index in (len(scheduler.betas) - 1, 2):
        raw = denoiser.body.unet(sample, index).sample
        expected = judge.step(raw, index, sample).pred_original_sample
        actual = denoiser.denoised(sample, index + 1)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if judge.config.prediction_type == "epsilon":
        assert torch.equal(denoiser.epsilon(sample, 3), denoiser.body.unet(sample, 2).sample)


def test_common_betas_become_the_processes_of_environments(folder):
    expected = {
        DDPMScheduler(): DiscreteVP.linear(1000),
        DDPMScheduler(num_train_timesteps=100, beta_start=0.001, beta_end=0.2): DiscreteVP.linear(
            100, 0.001, 0.2
        ),
        DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2"): DiscreteVP.cosine(
            50
        ),
        DDPMScheduler(num_train_timesteps=4, trained_betas=BETAS): DiscreteVP(BETAS),
    }
    for scheduler, process in expected.items():
        assert from_pretrained(folder(scheduler)).process == process


def test_the_loop_of_diffusers_is_our_ancestral_sampler(folder, generator):
    scheduler = DDPMScheduler(num_train_timesteps=4, trained_betas=BETAS, clip_sample=False)
    denoiser = from_pretrained(folder(scheduler))
    source = generator(5)
    start = torch.randn(3, 2, 8, 8, generator=source)
    state = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            raw = denoiser.body.unet(state, t).sample
            state = scheduler.step(raw, t, state, generator=source).prev_sample
        source.manual_seed(5)
        torch.randn(3, 2, 8, 8, generator=source)
        tableau = ancestral(Schedule.uniform(denoiser.process, 4))
        ours = tableau.sample(denoiser, start, generator=source)
    torch.testing.assert_close(ours, state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "process", "prediction"),
    [
        (FlowMatchEulerDiscreteScheduler(1000, 3.0), RectifiedFlow(3.0, 1000), "flow"),
        (
            DPMSolverMultistepScheduler(
                use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction"
            ),
            RectifiedFlow(2.0, 1000),
            "flow",
        ),
        (EDMEulerScheduler(0.01, 50.0, 0.6), VE(0.01, 50.0), "edm"),
        (
            DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            DiscreteVP.linear(1000).zero_terminal_snr(),
            "v",
        ),
    ],
)
def test_flows_and_edm_s_levels_are_read(scheduler, process, prediction, folder, sample, tmp_path):
    denoiser = from_pretrained(folder(scheduler))
    assert (denoiser.process, denoiser.prediction) == (process, prediction)
    if prediction == "flow":  # it is asked at a thousand times the level, and answers eps - x_0
        u = float(process.sigma(0.5))
        raw = denoiser.body.unet(sample, torch.tensor(1000 * u)).sample
        torch.testing.assert_close(denoiser.denoised(sample, 0.5), sample - u * raw)
        save_pretrained(denoiser, tmp_path / "ours")
        assert from_pretrained(tmp_path / "ours").process == process


@pytest.mark.parametrize(
    ("scheduler", "clip"),
    [
        (DDPMScheduler(), True),
        (DDPMScheduler(clip_sample=False, clip_sample_range=2.0), False),
        (DDIMScheduler(clip_sample=True), True),
        (PNDMScheduler(), False),
    ],
)
def test_clipping_is_the_schedulers(scheduler, clip, folder):
    assert from_pretrained(folder(scheduler)).clip is clip


def test_every_layout_holds_the_same_denoiser(folder, sample, tmp_path):
    path = folder(
        DDPMScheduler(num_train_timesteps=100, beta_start=0.001, beta_end=0.2, clip_sample=False)
    )
    expected = from_pretrained(path)
    shutil.copytree(path / "unet", tmp_path / "bare")
    flatten(path)
    flat = from_pretrained(path)
    (path / "model_index.json").unlink()
    with_scheduler = from_pretrained(str(path))
    for denoiser in (flat, with_scheduler):
        assert denoiser.process == expected.process
        assert not denoiser.clip
        assert torch.equal(denoiser(sample, 7), expected(sample, 7))
    with pytest.warns(UserWarning, match=r"without a scheduler_config\.json") as seen:
        bare = from_pretrained(tmp_path / "bare")
    assert seen[0].filename == __file__
    assert (bare.process, bare.prediction, bare.clip) == (DiscreteVP.linear(1000), "epsilon", True)
    assert torch.equal(bare(sample, 7), expected(sample, 7))


def test_weights_of_the_first_models_are_understood(folder, sample):
    """google/ddpm-cifar10-32 names the layers of its attention as diffusers 0.0.4 did."""
    path = folder()
    expected = from_pretrained(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path / "unet" / WEIGHTS)
    for new_name, old_name in old.items():
        weights = {name.replace(new_name, old_name): value for name, value in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, path / "unet" / WEIGHTS)
    assert torch.equal(from_pretrained(path)(sample, 9), expected(sample, 9))


def test_half_precision_weights_are_read_as_float32(folder, sample):
    path = folder()
    weights = {name: value.half() for name, value in load_file(path / "unet" / WEIGHTS).items()}
    save_file(weights, path / "unet" / WEIGHTS)
    denoiser = from_pretrained(path)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
    assert denoiser(sample, 5).dtype == torch.float32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; `cache(folder)` puts a copy of it there as google/some-ddpm."""
    root = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def put(folder):
        place = root / "models--google--some-ddpm"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, place / "snapshots" / ("0" * 40))

    return put


def test_names_are_looked_up_in_the_hub_cache(folder, cache, sample):
    with pytest.raises(FileNotFoundError, match=r"`hf download google/some-ddpm`, or pass downlo"):
        from_pretrained("google/some-ddpm")
    path = folder()
    cache(path)
    expected = from_pretrained(path)
    assert torch.equal(from_pretrained("google/some-ddpm")(sample, 3), expected(sample, 3))


def test_the_net_is_used_only_when_asked(folder, monkeypatch):
    path, calls = folder(), []

    def snapshot_download(name, allow_patterns, local_files_only):
        calls.append((name, tuple(allow_patterns), local_files_only))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    from_pretrained("google/some-ddpm")
    assert all(local for _, _, local in calls)
    calls.clear()
    from_pretrained("google/some-ddpm", download=True)
    assert [local for _, _, local in calls] == [False, False]
    # The settings first: a network that cannot be read is not downloaded.
    assert not any("safetensors" in pattern for pattern in calls[0][1])
    assert f"unet/{WEIGHTS}" in calls[1][1]
    assert not any(".bin" in pattern for _, patterns, _ in calls for pattern in patterns)
    calls.clear()
    change(path / "unet" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(CheckpointError, match="holds a UNet2DConditionModel"):
        from_pretrained("google/some-ddpm", download=True)
    assert len(calls) == 1


def test_a_failed_download_says_why(monkeypatch):
    def snapshot_download(*args, **options):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no way out\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"Could not download google/ddpm: no way out$"):
        from_pretrained("google/ddpm", download=True)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_what_is_saved_diffusers_opens_and_we_read_back(prediction, make_unet, sample, tmp_path):
    process = DiscreteVP.cosine(20)
    denoiser = Denoiser(make_unet(), process, prediction, clip=prediction == "sample")
    save_pretrained(denoiser, tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert (again.process, again.prediction) == (process, prediction)
    assert again.clip == denoiser.clip == pipeline.scheduler.config.clip_sample
    assert again.body.config == denoiser.body.config
    assert torch.equal(again(sample, 3), denoiser(sample, 3))
    assert torch.equal(pipeline.unet(sample, 2).sample, denoiser(sample, 3))
    assert torch.equal(pipeline.scheduler.betas, process.betas.float())
    assert len(pipeline.scheduler) == 20
    raw = pipeline.unet(sample, 11).sample
    expected = pipeline.scheduler.step(raw, 11, sample).pred_original_sample
    actual = denoiser.denoised(sample, 12)
    torch.testing.assert_close(actual.clamp(-1, 1) if denoiser.clip else actual, expected)


def test_a_denoiser_in_another_memory_format_is_saved(make_unet, sample, tmp_path):
    denoiser = Denoiser(make_unet(), DiscreteVP.linear(10))
    expected = denoiser(sample, 4)
    save_pretrained(denoiser.run_with("bf16", channels_last=True), tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(sample, 4), expected)


def test_a_failed_save_leaves_the_old_pipeline(make_unet, sample, tmp_path, monkeypatch):
    old = Denoiser(make_unet(seed=0), DiscreteVP.linear(10))
    save_pretrained(old, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    write = DDPMPipeline.save_pretrained

    def fail(self, folder, **options):
        write(self, folder, **options)
        raise OSError("disk full")

    new = Denoiser(make_unet(seed=1), DiscreteVP.linear(10))
    with monkeypatch.context() as context:
        context.setattr(DDPMPipeline, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(new, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(from_pretrained(tmp_path)(sample, 4), old(sample, 4))
    save_pretrained(new, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(sample, 4), new(sample, 4))


def test_an_edm_unet_is_saved_with_its_preconditioning(make_unet, sample, tmp_path):
    denoiser = Denoiser(make_unet(time_range=(-1.6, 1.1)), VE(0.01, 50), "edm", sigma_data=0.7)
    save_pretrained(denoiser, tmp_path)
    again = from_pretrained(tmp_path)
    assert (again.process, again.prediction, again.sigma_data) == (VE(0.01, 50), "edm", 0.7)
    assert again.body.time_range == [-1.6, 1.1]
    assert torch.equal(again.denoised(sample, 3.0), denoiser.denoised(sample, 3.0))


def test_an_edm_network_is_taken_as_it_is(generator, tmp_path):
    class Preconditioned(torch.nn.Module):
        """The best D for data N(0, 0.25 I), with NVlabs' way of reading sigma."""

        def __init__(self):
            super().__init__()
            self.variance = torch.nn.Parameter(torch.tensor(0.25))

        def forward(self, x, sigma):
            assert sigma.is_floating_point()
            assert sigma.shape == (len(x),)
            sigma = sigma.reshape(-1, 1, 1, 1)
            return x * self.variance / (self.variance + sigma**2)

    denoiser = from_edm(Preconditioned(), sigma_max=20.0)
    assert (denoiser.process, denoiser.prediction) == (VE(0.002, 20.0), "sample")
    x = torch.randn(4, 1, 2, 2, generator=generator())
    for sigma in (0.002, 2.0, 20.0, torch.tensor([0.1, 1.0, 3.0, 20.0])):
        column = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(denoiser.denoised(x, sigma), x * 0.25 / (0.25 + column**2))
    torch.testing.assert_close(denoiser.epsilon(x, 2.0), x * 2.0 / 4.25)
    denoiser.save(tmp_path / "edm")
    again = Denoiser.load(tmp_path / "edm", body=type(denoiser.body)(Preconditioned()))
    assert torch.equal(again.denoised(x, 2.0), denoiser.denoised(x, 2.0))
    with pytest.raises(ValueError, match="and this denoiser's body is a EDMBody"):
        save_pretrained(denoiser, tmp_path)


def test_what_diffusers_cannot_say_is_not_written(make_unet, tmp_path):
    process = DiscreteVP.linear(10)
    with pytest.raises(ValueError, match="this denoiser's body is a MLP"):
        save_pretrained(Denoiser(MLP((2,), levels=10), process), tmp_path)
    with pytest.raises(ValueError, match=r"cannot describe the process VE\(.*'sample'"):
        save_pretrained(Denoiser(make_unet(), VE(), "sample"), tmp_path)
    with pytest.raises(ValueError, match="cannot describe a time_range"):
        save_pretrained(Denoiser(make_unet(time_range=(0, 10)), process), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (
            {
                "_class_name": "StableDiffusionPipeline",
                "scheduler": ["diffusers", "PNDMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "requires_safety_checker": True,
            },
            r"a StableDiffusionPipeline \(.*text_encoder CLIPTextModel.*such as DDPMPipeline",
        ),
        (
            {
                "_class_name": "LDMPipeline",
                "scheduler": ["diffusers", "DDIMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
                "vqvae": ["diffusers", "VQModel"],
            },
            r"a LDMPipeline \(.*vqvae VQModel",
        ),
        (
            {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DConditionModel"],
            },
            "unet UNet2DConditionModel",
        ),
    ],
)
def test_other_pipelines_are_named_and_refused(index, sentence, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=sentence):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rescale_betas_zero_snr": True}, "no signal is left: its networks predict 'v'"),
        ({"thresholding": True}, "thresholding=True"),
        ({"clip_sample_range": 2.0}, r"clip_sample_range=2\.0"),
        ({"variance_type": "learned_range"}, "a learned variance"),
        ({"prediction_type": "flow"}, "prediction_type='flow'; fewstep reads epsilon, sample"),
        ({"beta_schedule": "cubic"}, "cubic is not implemented"),
        ({"beta_end": 1.5}, "strictly between 0 and 1"),
        ({"beta_start": []}, "scheduler_config.json: "),
        ({"num_train_timesteps": 10**9}, "must be 1 to 100000, got 1000000000"),
        ({"clip_sample": "no"}, "clip_sample must be true or false, got 'no'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"trained_betas": BETAS}, "other num_train_timesteps than betas"),
        ({"num_train_timesteps": "many"}, "scheduler_config.json: "),
        ({"_class_name": "ScoreSdeVeScheduler"}, "describes a ScoreSdeVeScheduler; fewstep reads"),
        ({"_class_name": "TableauScheduler", "tableau": {}}, "Not a tableau"),
    ],
)
def test_settings_that_fewstep_does_not_honour_are_refused(settings, sentence, folder):
    path = folder()
    change(path / "scheduler" / "scheduler_config.json", **settings)
    with pytest.raises(CheckpointError, match=sentence):
        from_pretrained(path)


def test_pickled_weights_are_refused(folder):
    path = folder() / "unet"
    torch.save(load_file(path / WEIGHTS), path / "diffusion_pytorch_model.bin")
    from_pretrained(path.parent)  # beside safetensors it does no harm
    (path / "diffusion_pytorch_model.bin").replace(path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"carries a pickle .* only safetensors"):
        from_pretrained(path.parent)
    (path / WEIGHTS).rename(path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin carries a pickle .* only safetensors"):
        from_pretrained(path.parent)


def test_broken_files_are_refused(folder):
    path = folder()
    weights = path / "unet" / WEIGHTS
    whole = weights.read_bytes()
    for part in (whole[:-100], whole[:20], b""):
        weights.write_bytes(part)
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            from_pretrained(path)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    conv = tensors.pop("conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"missing or unknown, such as conv_in\.weight"):
        from_pretrained(path)
    save_file({**tensors, "conv_in.weight": conv, "extra": conv.clone()}, weights)
    with pytest.raises(CheckpointError, match="missing or unknown, such as extra"):
        from_pretrained(path)
    save_file({**tensors, "conv_in.weight": conv[:, :1].contiguous()}, weights)
    mismatch = r"give no UNet2DModel: size mismatch for conv_in\.weight.* 1, 3, 3.* 2, 3, 3\]\)\.$"
    with pytest.raises(CheckpointError, match=mismatch) as caught:
        from_pretrained(path)
    assert "\n" not in str(caught.value)
    save_file({**tensors, "conv_in.weight": conv.clone().fill_(torch.nan)}, weights)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is damaged: its weight conv_in\.weight"):
        from_pretrained(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"unet lacks the weights, {WEIGHTS}"):
        from_pretrained(path)
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        text = (path / name).read_text()
        for broken in (text[:-10], "[]"):
            (path / name).write_text(broken)
            with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                from_pretrained(path)
        (path / name).write_text(text)
        if name != "model_index.json":
            (path / name).unlink()
            with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
                from_pretrained(path)
            (path / name).write_text(text)


def test_networks_that_are_no_bodies_are_refused(folder):
    path = folder()
    change(path / "unet" / "config.json", down_block_types=["DownBlock3D", "DownBlock2D"])
    with pytest.raises(CheckpointError, match=r"give no UNet2DModel: .*DownBlock3D"):
        from_pretrained(path)


def test_names_that_lead_nowhere_say_so(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder nowhere, and it is no name of the hub"):
        from_pretrained("nowhere")
    with pytest.raises(FileNotFoundError, match="no folder /tmp/no/where"):
        from_pretrained("/tmp/no/where")
    with pytest.raises(FileNotFoundError, match=r"holds neither a diffusers pipeline \(model_ind"):
        from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"is a file; .* Denoiser\.load"):
        from_pretrained(tmp_path / "file")


OTHER_SCHEDULERS = [
    (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    (diffusers.DEISMultistepScheduler, {}),
    (diffusers.UniPCMultistepScheduler, {}),
    (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    (diffusers.EulerAncestralDiscreteScheduler, {}),
    (diffusers.HeunDiscreteScheduler, {"beta_start": 1e-4, "beta_end": 0.02}),
    (diffusers.LMSDiscreteScheduler, {}),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize(("kind", "options"), OTHER_SCHEDULERS)
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"trained_betas": BETAS, "num_train_timesteps": 4},
    ],
)
def test_schedulers_of_the_same_chain_say_the_same(kind, options, betas, folder, sample):
    """What diffusers itself makes of the config of another scheduler is the judge."""
    scheduler = kind(**betas, **options, prediction_type="v_prediction")
    denoiser = from_pretrained(folder(scheduler))
    judge = DDPMScheduler.from_config(scheduler.config)
    assert judge.config.prediction_type == "v_prediction"
    torch.testing.assert_close(denoiser.process.betas.float(), judge.betas, rtol=1e-6, atol=0)
    index = len(judge.betas) - 2
    raw = denoiser.body.unet(sample, index).sample
    judge = DDPMScheduler.from_config(scheduler.config, clip_sample=False)
    expected = judge.step(raw, index, sample).pred_original_sample
    torch.testing.assert_close(denoiser.denoised(sample, index + 1), expected, rtol=1e-4, atol=1e-4)
    assert not denoiser.clip


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("shards", ["10GB", "4KB"])
def test_weights_in_shards_and_variants_are_those_diffusers_reads(
    variant, shards, make_unet, folder, sample
):
    path = folder()
    (path / "unet" / WEIGHTS).unlink()
    model = make_unet(seed=3).unet
    if variant == "fp16":
        model = model.half()
    model.save_pretrained(path / "unet", variant=variant, max_shard_size=shards)
    assert (len([*path.glob("unet/*.safetensors")]) > 1) == (shards == "4KB")
    theirs = UNet2DModel.from_pretrained(path / "unet", variant=variant).float()
    denoiser = from_pretrained(path, variant=variant)
    assert torch.equal(denoiser(sample, 5), theirs(sample, 4).sample)
    if variant == "fp16":  # nothing else is there
        assert torch.equal(from_pretrained(path)(sample, 5), denoiser(sample, 5))
    if variant == "non_ema":
        with pytest.raises(FileNotFoundError, match="the argument variant chooses"):
            from_pretrained(path)


def test_a_broken_index_of_shards_is_refused(make_unet, folder, tmp_path):
    path = folder()
    (path / "unet" / WEIGHTS).unlink()
    make_unet().unet.save_pretrained(path / "unet", max_shard_size="4KB")
    index = path / "unet" / f"{WEIGHTS}.index.json"
    tree = json.loads(index.read_text())
    shard = tree["weight_map"]["conv_in.weight"]
    whole = (path / "unet" / shard).read_bytes()
    (path / "unet" / shard).write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match=f"{shard} is truncated"):
        from_pretrained(path)
    (path / "unet" / shard).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"lacks {shard}, which {index.name} names"):
        from_pretrained(path)
    for weights in ({}, [], {"conv_in.weight": 3}, {"conv_in.weight": "../../elsewhere"}):
        change(index, weight_map=weights)
        with pytest.raises(CheckpointError, match="weight_map names no files beside it"):
            from_pretrained(path)


def test_a_network_larger_than_its_file_is_never_built(folder, monkeypatch):
    path = folder()
    built = []
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda *_, **__: built.append(1))
    for options in (
        {"block_out_channels": [2**20, 2**20]},
        {"layers_per_block": 10**6},
        {"block_out_channels": [8] * 10**5},
    ):
        change(path / "unet" / "config.json", **options)
        with pytest.raises(CheckpointError, match="give no UNet2DModel"):
            from_pretrained(path)
    assert not built


def test_the_schedulers_we_name_are_those_diffusers_has():
    from fewstep.agents.pretrained.chains import SCHEDULERS as NAMES

    declared = {name: inspect.signature(getattr(diffusers, name)).parameters for name in NAMES}
    for parameters in declared.values():
        assert {"prediction_type", "num_train_timesteps", "trained_betas"} <= set(parameters)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_solvers_by_name_draw_what_diffusers_draws(kind, variance_type, folder):
    """Clipped, and with the pipeline's own variance; without a word from the user.

    In float64: diffusers' float32 betas alone move samples of this network by 5e-5.
    """
    scheduler = DDPMScheduler(clip_sample=True, variance_type=variance_type)
    denoiser = from_pretrained(folder(scheduler)).double()
    solver = {DDPMScheduler: "ancestral", DDIMScheduler: "ddim"}[kind]
    tableau = make_solver(solver, Schedule.leading(denoiser.process, 10), denoiser)
    judge = kind.from_config(scheduler.config)
    judge.set_timesteps(10)
    judge.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    sample = torch.randn(3, 2, 8, 8, generator=theirs, dtype=torch.float64)
    start = torch.randn(3, 2, 8, 8, generator=ours, dtype=torch.float64)
    with torch.no_grad():
        for t in judge.timesteps:
            output = denoiser.body.unet(sample, t).sample
            sample = judge.step(output, t, sample, generator=theirs).prev_sample
        drawn = tableau.sample(denoiser, start, generator=ours)
    torch.testing.assert_close(drawn, sample, rtol=1e-7, atol=1e-7)


def test_the_variance_stays_in_files_and_pipelines(folder, tmp_path):
    denoiser = from_pretrained(folder(DDPMScheduler(variance_type="fixed_large")))
    assert denoiser.variance == "large"
    denoiser.save(tmp_path / "denoiser.safetensors")
    save_pretrained(denoiser, tmp_path / "plain")
    tableau = make_solver("ancestral", Schedule.leading(denoiser.process, 4), denoiser)
    assert tableau.name == "ancestral (large, clipped)"
    export_pipeline(denoiser, tmp_path / "exported", tableau)
    again = [
        Denoiser.load(tmp_path / "denoiser.safetensors"),
        from_pretrained(tmp_path / "plain"),
        from_pretrained(tmp_path / "exported"),
    ]
    assert [(each.variance, each.clip) for each in again] == [("large", True)] * 3
    config = DDPMPipeline.from_pretrained(tmp_path / "plain").scheduler.config
    assert config["variance_type"] == "fixed_large"


def test_options_that_are_given_win_over_the_denoiser_s(folder):
    denoiser = from_pretrained(folder(DDPMScheduler(variance_type="fixed_large")))
    schedule = Schedule.leading(denoiser.process, 4)
    table = make_solver("ancestral", schedule, denoiser, clip=False, variance="small")
    assert table.name == "ancestral (small)"
    assert make_solver("ddim", schedule, denoiser, clip=False).linear
    # What is trained is not clamped, whatever the denoiser says of sampling.
    agent = DODE.without_data(denoiser, schedule, (2, 8, 8), check_teacher=False)
    assert agent.base.linear
