"""Class-conditional networks of diffusers, in and out: its own loops are the judge."""

import copy
import json
import warnings

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from torch import nn

from fewstep.agents import SFT, BehaviorCloning, CheckpointError, Denoiser
from fewstep.agents.denoisers.networks import DiT, SmallUNet, UNet2D
from fewstep.agents.pretrained import export_pipeline, from_pretrained, save_pretrained
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.agents.solvers import ddim, make_solver
from fewstep.envs import DiffusionMDP, DiscreteVP, Schedule, Target
from fewstep.envs.mdp import no_reward

pytestmark = pytest.mark.numeric

CHAIN = DDIMScheduler(beta_end=5e-3, clip_sample=False)  # keeps samples of unit size
LABELS = torch.tensor([2, 0, 1])
TABLE = torch.linspace(-1, 1, 4 * 32).reshape(4, 32)  # what an "identity" network reads
# What a UNet2DModel is made with, and what `from_pretrained` is told of it.
UNETS = {
    "all are classes": ({"num_class_embeds": 3}, {"classes": 3}),
    "the last is none": ({"num_class_embeds": 4}, {"classes": 3}),
    "as numbers": ({"class_embed_type": "timestep"}, {"classes": 3, "drops": True}),
    "as embeddings": (
        {"class_embed_type": "identity"},
        {"classes": 3, "class_embeddings": TABLE},
    ),
}


@pytest.fixture
def unet_folder(tmp_path):
    """`unet_folder(**options)`: a class-conditional network and its chain, as diffusers writes."""

    def write(**options):
        torch.manual_seed(0)
        model = UNet2DModel(
            8, 2, 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **options,
        )  # fmt: skip
        DDPMPipeline(model, CHAIN).save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return write


@pytest.fixture
def dit_pipeline():
    """A DiTPipeline of random weights, with a learned variance, in float64."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        2, 8, in_channels=4, out_channels=8, num_layers=2, sample_size=4, norm_num_groups=4
    )
    nn.init.normal_(model.proj_out_2.weight, std=0.3)
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=4
    )
    # In training mode it would drop labels.
    return quiet(DiTPipeline(model.eval(), vae.eval(), copy.deepcopy(CHAIN)).to(torch.float64))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def exact(scheduler):
    """Give a scheduler its betas in float64: their float32 moves samples by 1e-4."""
    betas = torch.linspace(1e-4, 5e-3, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def their_loop(ask, scheduler, sample, steps, guidance=1.0):
    """The ten lines of docs/conditions.md; `ask(sample, t, hidden)` without the class if hidden."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            raw = ask(sample, t, False)
            if guidance != 1:
                without = ask(sample, t, True)
                raw = without + guidance * (raw - without)
            sample = scheduler.step(raw, t, sample).prev_sample
    return sample


def three_classes(process, conditional=True):
    target = Target("Three", torch.randn(64, 2, 8, 8), labels=torch.randint(3, (64,)))
    return DiffusionMDP(target, process, Schedule.uniform(process, 2), no_reward, conditional)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_conditional_unet_samples_as_in_diffusers(name, guidance, unet_folder, generator):
    options, told = UNETS[name]
    path = unet_folder(**options)
    # diffusers embeds numbers in float32 only, where its betas alone move samples by 1e-5.
    dtype, tolerance = (torch.float32, 1e-4) if name == "as numbers" else (torch.float64, 1e-7)
    model = UNet2DModel.from_pretrained(path / "unet").to(dtype)
    denoiser = from_pretrained(path, **told).to(dtype)
    assert (denoiser.classes, denoiser.is_open) == (3, True)

    def ask(sample, t, hidden):
        classes = torch.full((3,), 3) if hidden else LABELS
        if options.get("class_embed_type") == "identity":
            classes = TABLE[classes].to(dtype)
        return model(sample, t, classes).sample

    if guidance != 1 and name == "all are classes":
        with pytest.raises(ValueError, match="trained without dropped labels"):
            denoiser.given(LABELS, guidance)
        return
    start = torch.randn(3, 2, 8, 8, generator=generator(), dtype=dtype)
    expected = their_loop(ask, exact(copy.deepcopy(CHAIN)), start, 5, guidance)
    table = ddim(Schedule.leading(denoiser.process, 5))
    with torch.no_grad():
        ours = table.sample(denoiser.given(LABELS, guidance), start)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_dit_samples_as_its_pipeline_does(guidance, dit_pipeline, tmp_path, monkeypatch):
    dit_pipeline.save_pretrained(tmp_path)
    denoiser = from_pretrained(tmp_path).double()
    assert (denoiser.classes, denoiser.shape) == (1000, (4, 4, 4))
    table = ddim(Schedule.leading(denoiser.process, 4))
    start = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    view = denoiser.given(torch.tensor([7, 999]), guidance)
    with torch.no_grad():
        expected = table.sample(view, start)
    # The pipeline draws the same start: in float32, so that both have the same numbers.
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: start.clone()
    )
    exact(dit_pipeline.scheduler)
    export_pipeline(denoiser, tmp_path / "ours", table)
    exported = quiet(DiTPipeline.from_pretrained(tmp_path / "ours", vae=dit_pipeline.vae))
    for pipeline in (dit_pipeline, exported.to(torch.float64)):
        options = {"class_labels": [7, 999], "guidance_scale": guidance, "output_type": "pt"}
        pictures = pipeline(**options, num_inference_steps=4).images
        with torch.no_grad():
            latents = expected / dit_pipeline.vae.config.scaling_factor
            ours = dit_pipeline.vae.decode(latents).sample / 2 + 0.5
        torch.testing.assert_close(pictures, ours.clamp(0, 1), rtol=1e-7, atol=1e-7)


def test_what_is_exported_diffusers_samples_and_we_read_back(make_unet, generator, tmp_path):
    denoiser = Denoiser(make_unet(classes=3), DiscreteVP.linear(1000, 1e-4, 5e-3), drops=True)
    table = make_solver("dpm-solver++-2m", Schedule.log_snr(denoiser.process, 4))
    export_pipeline(denoiser.given(1, 2.0), tmp_path / "ours", table)
    DDPMPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    start = torch.randn(3, 2, 8, 8, generator=generator())
    with torch.no_grad():
        expected = table.sample(denoiser.given(LABELS, 2.0), start)
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        model = UNet2DModel.from_pretrained(path, subfolder="unet")
        scheduler = TableauScheduler.from_pretrained(path, subfolder="scheduler")

        def ask(sample, t, hidden, model=model):
            return model(sample, t, torch.full((3,), 3) if hidden else LABELS).sample

        actual = their_loop(ask, scheduler, start, 4, 2.0)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = from_pretrained(path)  # as its folder says how many classes there are
        # The condition and the guidance of the view were not the network's.
        assert (again.classes, again.is_open) == (3, True)
        with torch.no_grad():
            assert torch.equal(table.sample(again.given(LABELS, 2.0), start), expected)
    save_pretrained(denoiser, tmp_path / "plain")
    assert from_pretrained(tmp_path / "plain").given(None).classes == 3


@pytest.mark.parametrize("kind", [UNet2D, DiT])
def test_a_conditional_network_is_saved_in_our_files(kind, make_unet, tmp_path):
    if kind is UNet2D:
        body = make_unet(classes=3)
    else:
        body = DiT((2, 8, 8), 3, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    denoiser = Denoiser(body, DiscreteVP.linear(100), drops=True).given(2, 3.0)
    denoiser.save(tmp_path / "file")
    again, x = Denoiser.load(tmp_path / "file"), torch.randn(3, 2, 8, 8)
    assert type(again.body) is kind
    assert torch.equal(again.epsilon(x, 40), denoiser.epsilon(x, 40))


def test_a_conditional_unet_is_cloned(make_unet):
    """Its row of "none" is trained by the labels that are dropped."""
    process = DiscreteVP.linear(100)
    mdp = three_classes(process)
    denoiser = Denoiser(make_unet(classes=3), process)
    before = denoiser.body.unet.class_embedding.weight.clone()
    agent = BehaviorCloning(mdp, denoiser, batch_size=64, label_dropout=0.3)
    agent.learn(3 * agent.timesteps_per_round)
    assert (denoiser.body.unet.class_embedding.weight != before).any(1).all()
    assert denoiser.given(None, 1.0).classes == 3
    without = Denoiser(make_unet(num_class_embeds=3), process)
    agent = BehaviorCloning(mdp, without, batch_size=64, label_dropout=0.5)
    with pytest.raises(ValueError, match=r'for 3 classes and none for "no class", which .*dropout'):
        agent.learn(agent.timesteps_per_round)


def test_nothing_says_what_the_last_embedding_means(unet_folder):
    path = unet_folder(num_class_embeds=4)
    with pytest.warns(UserWarning, match=r"whether its last class .* pass classes=3") as seen:
        denoiser = from_pretrained(path)
    assert seen[0].filename == __file__
    assert denoiser.classes == 4
    with pytest.raises(ValueError, match="trained without dropped labels"):
        denoiser.given(1, guidance=2.0)
    assert from_pretrained(path, classes=3).given(1, guidance=2.0).evaluations(5) == 2


@pytest.mark.parametrize(
    ("options", "told", "sentence"),
    [
        ({"num_class_embeds": 4}, {"classes": 10}, "4 class embeddings, .* cannot know 10 classes"),
        ({"num_class_embeds": 4}, {"classes": 4, "drops": True}, "that, pass classes=3"),
        ({}, {"classes": 3}, "no class embeddings: it is unconditional"),
        ({}, {"drops": True}, "unconditional: no labels can have been dropped"),
        ({"class_embed_type": "timestep"}, {}, "nothing of their number: pass classes"),
        ({"class_embed_type": "identity"}, {}, "as class_embeddings, one row for each class"),
        ({"class_embed_type": "identity"}, {"class_embeddings": TABLE[:, :3]}, r"be \(rows, 32\)"),
        ({"num_class_embeds": 4}, {"class_embeddings": TABLE}, "'identity'; this network has not"),
    ],
)  # fmt: skip
def test_classes_that_do_not_fit_are_refused(options, told, sentence, unet_folder):
    with pytest.raises(CheckpointError, match=sentence):
        from_pretrained(unet_folder(**options), **told)


def test_networks_and_environments_have_to_agree(unet_folder):
    path = unet_folder(num_class_embeds=4)
    conditional = from_pretrained(path, classes=3)
    process = conditional.process
    SFT(three_classes(process), conditional)
    with pytest.raises(ValueError, match="The denoiser is conditional and the environment is not"):
        SFT(three_classes(process, conditional=False), conditional)
    with pytest.raises(ValueError, match="denoiser knows 4 classes, the environment has 3"):
        SFT(three_classes(process), from_pretrained(path, classes=4))
    x = torch.zeros(2, 2, 8, 8)
    with pytest.raises(
        ValueError, match=r"say under which condition .*denoiser\.given\(condition\)"
    ):
        conditional.epsilon(x, 5)
    unconditional = from_pretrained(unet_folder())
    with pytest.raises(ValueError, match="has 3 classes and the denoiser is unconditional"):
        SFT(three_classes(process), unconditional)
    with pytest.raises(ValueError, match="unconditional: it takes neither condition nor guidance"):
        unconditional.given(3)


def test_dits_that_are_none_are_refused(dit_pipeline, tmp_path):
    dit_pipeline.to(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match='has 1000 classes beside "no class"'):
        from_pretrained(tmp_path, classes=999)
    path = tmp_path / "transformer" / "config.json"
    good = json.loads(path.read_text())
    for change, sentence in (
        ({"num_layers": 10**6}, "num_layers is 1000000"),
        ({"sample_size": 5}, "no whole number of patches of 2"),
        ({"sample_size": 10**9}, "sample_size=1000000000 and patch_size=2"),
        ({"out_channels": 5}, "reads 4 channels and predicts 5"),
        ({"num_attention_heads": 10**6}, "weights, the files have"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=sentence):
            from_pretrained(tmp_path)
    # The first DiTs bear the name of the class that theirs was split from.
    path.write_text(json.dumps({**good, "_class_name": "Transformer2DModel"}))
    assert from_pretrained(tmp_path).classes == 1000


def test_what_is_no_network_of_diffusers_is_not_exported(make_unet, tmp_path):
    process = DiscreteVP.linear(10)
    own = Denoiser(SmallUNet((2, 8, 8), width=8, classes=3), process)
    with pytest.raises(ValueError, match="this denoiser's body is a SmallUNet"):
        save_pretrained(own, tmp_path)
    with pytest.raises(ValueError, match="A vae goes with a DiT"):
        save_pretrained(Denoiser(make_unet(), process), tmp_path, vae=nn.Identity())
    assert not [*tmp_path.iterdir()]
