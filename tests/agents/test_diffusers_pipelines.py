"""A table in the pipelines of diffusers as they call it: text, image-to-image, inpainting, flows.

Their text encoders are left out: embeddings of prompts are random numbers. Needs `transformers`,
without which diffusers has no such pipelines.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from fewstep.agents.pretrained.scheduler import TableauScheduler

pytest.importorskip("transformers")

from diffusers import (
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

pytestmark = pytest.mark.numeric

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
VP = [
    (DDIMScheduler(**LEADING, clip_sample=False, set_alpha_to_one=False), "ddim", 6),
    (EulerDiscreteScheduler(**LEADING), "euler", 6),
    (HeunDiscreteScheduler(**LEADING), "heun", 3),
    (DPMSolverMultistepScheduler(**LEADING), "dpm-solver++-2m", 6),
    (UniPCMultistepScheduler(**LEADING), "unipc-2", 6),
]


def small_vae(**options):
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=16, **options
    ).eval()


@pytest.fixture(scope="module")
def stable_diffusion():
    """The parts of a Stable Diffusion of 16x16 latents."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    return {
        "vae": small_vae(),
        "unet": unet.eval(),
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture(scope="module")
def flux():
    """The parts of a Flux of 8x8 packed latents, whose shift grows with the picture."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = small_vae(shift_factor=0.1)
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {"vae": vae, "transformer": transformer.eval(), **dict.fromkeys(parts)}


@pytest.fixture(scope="module")
def stable_diffusion_3():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
        pooled_projection_dim=8, pos_embed_max_size=16,
    )  # fmt: skip
    parts = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    vae = small_vae(shift_factor=0.1)
    return {"vae": vae, "transformer": transformer.eval(), **dict.fromkeys(parts)}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(pipeline, steps, **options):
    """Return the latents that a pipeline ends with; its noise is that of seed 3."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": steps} if steps is not None else {}
    return pipeline(**call, **options, generator=generator, output_type="latent").images


def prompts(**options):
    return {
        "prompt_embeds": random(1, 3, 8),
        "negative_prompt_embeds": random(1, 3, 8, seed=1),
        "guidance_scale": 3.0,
        **options,
    }


def asked_times(network, calls):
    return network.register_forward_pre_hook(
        lambda _, args, kw: calls.append(
            float((args[1] if len(args) > 1 else kw["timestep"]).flatten()[0])
        ),
        with_kwargs=True,
    )


def assert_same(ours, theirs, tolerance=1e-4):
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("scheduler", "solver", "steps"), VP)
def test_stable_diffusion_samples_as_with_its_own(scheduler, solver, steps, stable_diffusion):
    theirs = run(
        StableDiffusionPipeline(scheduler=scheduler, **stable_diffusion), steps, **prompts()
    )
    table = TableauScheduler.from_scheduler(scheduler, solver, steps)
    pipeline, calls = StableDiffusionPipeline(scheduler=table, **stable_diffusion), []
    hook = asked_times(pipeline.unet, calls)
    ours = run(pipeline, table.tableau.steps, **prompts())
    hook.remove()
    assert_same(ours, theirs)
    # The levels at which the network is asked are the table's.
    np.testing.assert_allclose(calls, table.tableau.times[:-1] - 1, rtol=1e-6)


def test_stable_diffusion_xl_asks_for_the_same(stable_diffusion):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    others = {"vae": stable_diffusion["vae"], "unet": unet.eval(), **dict.fromkeys(parts)}
    scheduler = EulerDiscreteScheduler(**LEADING)
    pooled = {"pooled_prompt_embeds": random(1, 8), "negative_pooled_prompt_embeds": random(1, 8)}
    call = {**prompts(height=16, width=16), **pooled, "guidance_rescale": 0.5}
    for options in ({}, {"denoising_end": 0.6}):
        theirs, ours = (
            run(StableDiffusionXLPipeline(scheduler=each, **others), 5, **call, **options)
            for each in (scheduler, TableauScheduler.from_scheduler(scheduler, "euler", 5))
        )
        if options:
            # Left half-way, theirs is a state of a variance-exploding process.
            sigma = float(scheduler.sigmas[scheduler.step_index])
            theirs = theirs / (1 + sigma**2) ** 0.5
        assert_same(ours, theirs)


@pytest.mark.parametrize(("scheduler", "solver", "steps"), [VP[0], VP[1], VP[3]])
def test_image_to_image_begins_in_the_middle(scheduler, solver, steps, stable_diffusion):
    image = {"image": random(1, 3, 16, 16).sigmoid(), "strength": 0.7}
    pipelines = [
        StableDiffusionImg2ImgPipeline(scheduler=each, **stable_diffusion)
        for each in (scheduler, TableauScheduler.from_scheduler(scheduler, solver, steps))
    ]
    theirs, ours = (run(pipeline, steps, **image, **prompts()) for pipeline in pipelines)
    assert pipelines[1].scheduler.begin_index == 2
    assert_same(ours, theirs)


@pytest.mark.parametrize(("scheduler", "solver", "steps"), [VP[0], VP[3]])
def test_inpainting_puts_the_known_back(scheduler, solver, steps, stable_diffusion):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    image = {"image": random(1, 3, 16, 16).sigmoid(), "mask_image": mask, "strength": 0.8}
    sides = {"height": 16, "width": 16}
    theirs, ours = (
        run(StableDiffusionInpaintPipeline(scheduler=each, **stable_diffusion), steps,
            **image, **sides, **prompts())
        for each in (scheduler, TableauScheduler.from_scheduler(scheduler, solver, steps))
    )  # fmt: skip
    assert_same(ours, theirs)


def flux_call():
    return {
        "prompt_embeds": random(1, 3, 8),
        "pooled_prompt_embeds": random(1, 8),
        "height": 16,
        "width": 16,
    }


def test_flux_shifts_by_the_size_of_the_picture(flux):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = FluxPipeline(scheduler=scheduler, **flux)
    theirs = run(pipeline, 5, **flux_call())
    m = (1.15 - 0.5) / (4096 - 256)
    mu = 64 * m + 0.5 - 256 * m  # of 8x8 patches of latents
    ramp = np.linspace(1, 0.2, 5).tolist()  # what Flux's pipelines hand to their schedulers
    table = TableauScheduler.from_scheduler(scheduler, "euler", sigmas=ramp, mu=mu)
    pipeline.scheduler = table
    assert_same(run(pipeline, 5, **flux_call()), theirs)
    pipeline.scheduler = TableauScheduler.from_scheduler(scheduler, "euler", 5, mu=1.0)
    with pytest.warns(UserWarning, match=r"made for mu=1, and this size of picture has mu=0\.46"):
        run(pipeline, 5, **flux_call())
    # With an image to begin with.
    image = {"image": random(1, 3, 16, 16).sigmoid(), "strength": 0.6}
    theirs, ours = (
        run(FluxImg2ImgPipeline(scheduler=each, **flux), 5, **image, **flux_call())
        for each in (scheduler, table)
    )
    assert_same(ours, theirs)


def test_stable_diffusion_3_runs_a_flow(stable_diffusion_3):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    call = {
        **prompts(height=16, width=16),
        "pooled_prompt_embeds": random(1, 8),
        "negative_pooled_prompt_embeds": random(1, 8, seed=1),
    }
    table = TableauScheduler.from_scheduler(scheduler, "euler", 5)
    theirs, ours = (
        run(StableDiffusion3Pipeline(scheduler=each, **stable_diffusion_3), 5, **call)
        for each in (scheduler, table)
    )
    assert_same(ours, theirs)
    unipc = UniPCMultistepScheduler.from_config(table.config)
    assert unipc.config.use_flow_sigmas
    assert (unipc.config.flow_shift, unipc.config.prediction_type) == (3.0, "flow_prediction")
    image = {"image": random(1, 3, 16, 16).sigmoid(), "strength": 0.6}
    theirs, ours = (
        run(
            StableDiffusion3Img2ImgPipeline(scheduler=each, **stable_diffusion_3),
            5,
            **image,
            **call,
        )
        for each in (scheduler, table)
    )
    assert_same(ours, theirs)
