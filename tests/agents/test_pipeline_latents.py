"""Pictures as a pipeline's latents, its network trained on them, and the pipeline saved."""

import copy
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")

import tiny_pipelines
from diffusers import DiffusionPipeline
from tiny_pipelines import PROMPTS

from fewstep.agents import SFT, BehaviorCloning, Denoiser
from fewstep.agents.pipelines import OpenedPipeline, open_pipeline
from fewstep.agents.pipelines.latents import DecodedFeatures, latent_target
from fewstep.agents.pipelines.write import save_pipeline
from fewstep.agents.solvers import build_solver
from fewstep.envs import DiffusionMDP
from fewstep.envs.mdp import no_reward
from fewstep.envs.targets.images import ImageSet

COUNT = 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: the folder of a tiny pipeline."""
    return tiny_pipelines.kept_in(tmp_path_factory.mktemp("pipelines"))


def opened_at(path, name):
    return open_pipeline(path, size=(16, 16) if name == "flux" else None)


def pictures(side, count=COUNT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def images_for(opened, **changes):
    side = opened.family.picture[0]
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(COUNT)]
    given = {
        "samples": pictures(side),
        "held_out": pictures(side, 2, 1),
        "labels": torch.arange(COUNT) % 2,
        "held_out_labels": torch.arange(2),
        "flip": False,
        "captions": texts,
        "held_out_captions": ["a bird", PROMPTS[0]],
    }
    return ImageSet(**{**given, **changes})


def mdp_for(opened, target, steps=3):
    process = opened.terms.process
    schedule = opened.own_schedule(steps)
    return DiffusionMDP(target, process, schedule, no_reward, conditional=True)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "dit", "ddpm"])
def test_pictures_become_what_the_pipelines_make_of_them(name, saved):
    opened = opened_at(saved(name), name)
    family, images = opened.family, pictures(opened.family.picture[0])
    latents = family.compressed(images)
    assert latents.shape == (COUNT, *family.shape)
    asked = images.float() / 127.5 - 1
    if name == "ddpm":
        expected = asked
    else:
        # As diffusers' image-to-image pipelines write it.
        vae = opened.pipeline.vae
        with torch.no_grad():
            said = vae.encode(asked).latent_dist.mean
        expected = (said - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        if name == "flux":
            expected = opened.pipeline._pack_latents(expected, *expected.shape)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"pictures are bytes \(N, 3, "):
        family.compressed(images[..., :-1])


def test_the_vae_is_asked_once_for_the_same_pictures(saved, tmp_path, monkeypatch):
    opened = opened_at(saved("sd"), "sd")
    images, family = images_for(opened), opened.family
    asked, compress = [], family.compress
    monkeypatch.setattr(family, "compress", lambda p: asked.append(len(p)) or compress(p))
    first, prompts = latent_target(opened, images, tmp_path)
    assert prompts == [*PROMPTS, "a bird"]
    assert first.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert first.held_out_labels.tolist() == [4, 0]
    assert sum(asked) == COUNT + 2
    again, _ = latent_target(opened, images, tmp_path)
    assert sum(asked) == COUNT + 2
    assert torch.equal(again.samples, first.samples)
    assert again.fingerprint == first.fingerprint
    # Another VAE has files of its own, and a damaged file is written anew.
    with torch.no_grad():
        opened.pipeline.vae.quant_conv.bias += 1
    other, _ = latent_target(opened, images, tmp_path)
    assert sum(asked) == 2 * (COUNT + 2)
    assert not torch.equal(other.samples, first.samples)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[:-3])
    third, _ = latent_target(opened, images, tmp_path)
    assert sum(asked) == 3 * (COUNT + 2)
    assert torch.equal(third.samples, other.samples)


@pytest.mark.numeric
def test_cloning_descends_on_the_pipelines_own_loss_and_is_saved_as_a_pipeline(saved, tmp_path):
    opened = opened_at(saved("sd"), "sd")
    pipeline = opened.pipeline
    target, prompts = latent_target(opened, images_for(opened), tmp_path / "kept")
    frozen = opened.denoiser(prompts).given(torch.arange(2))
    denoiser = opened.denoiser(prompts, trains=True)
    settings = {"batch_size": 4, "learning_rate": 1e-3, "ema": 0.5, "label_dropout": 0.0}
    agent = BehaviorCloning(mdp_for(opened, target), denoiser, rounds=2, **settings)
    before = copy.deepcopy(pipeline.unet)
    twin = copy.deepcopy(before).requires_grad_(True)
    seen = []

    # The first round's gradient, by diffusers' calls alone.
    def watch(_, args, options):
        seen.append((args[0].clone(), args[1].clone(), options["encoder_hidden_states"].clone()))

    handle = pipeline.unet.register_forward_pre_hook(watch, with_kwargs=True)
    drawn, loss = [], agent._loss

    def noted(clean, times, noise, condition):
        drawn.append(noise)
        return loss(clean, times, noise, condition)

    agent._loss = noted
    agent.learn(total_timesteps=4)
    handle.remove()
    noisy, times, states = seen[0]
    assert set(map(tuple, states.flatten(1).tolist())) <= set(
        map(tuple, denoiser.body.rows["states"].flatten(1).tolist())
    )
    answer = twin(noisy, times, encoder_hidden_states=states).sample
    (answer - drawn[0]).square().mean().backward()
    moved = [
        (new - old).flatten()
        for old, new in zip(before.parameters(), pipeline.unet.parameters(), strict=True)
    ]
    slopes = [weight.grad.flatten() for weight in twin.parameters()]
    # Adam's first step is against the sign of the gradient.
    sure = torch.cat(slopes).abs() > 1e-5
    assert sure.sum() > 1000
    assert torch.equal(torch.cat(moved)[sure].sign(), -torch.cat(slopes)[sure].sign())

    averaged = agent.sampling_denoiser
    folder = tmp_path / "tuned"
    table = build_solver("ddim", opened.own_schedule(3))
    save_pipeline(averaged, folder, table)
    loaded = DiffusionPipeline.from_pretrained(folder)
    noise = torch.randn(2, *opened.family.shape, generator=torch.Generator().manual_seed(1))
    ours = table.sample(averaged.given(torch.arange(2)), noise)
    loaded.set_progress_bar_config(disable=True)
    theirs = loaded(
        prompts[:2], num_inference_steps=3, guidance_scale=1, latents=noise, output_type="latent"
    ).images
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * scale)
    # The pipeline that is open has the live network, and its own scheduler still.
    live = table.sample(frozen, noise)
    assert (live - ours).abs().max() > 1e-3 * scale
    assert type(opened.pipeline.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.slow
def test_a_checkpoint_goes_on_and_other_agents_train_the_network_too(saved, tmp_path):
    opened = opened_at(saved("sd"), "sd")
    target, prompts = latent_target(opened, images_for(opened), tmp_path)
    make = partial(opened_at, saved("sd"), "sd")
    settings = {"batch_size": 2, "ema": 0.5}

    def agent_of(its):
        return BehaviorCloning(
            mdp_for(its, target), its.denoiser(prompts, trains=True), rounds=2, **settings
        )

    whole = agent_of(make())
    whole.learn()
    cut = agent_of(make())
    cut.learn(total_timesteps=cut.timesteps_per_round)
    cut.save(tmp_path / "half.safetensors")
    went_on = agent_of(make())
    went_on.resume(tmp_path / "half.safetensors")
    went_on.learn(reset_num_timesteps=False)
    for ours, theirs in zip(
        whole.tree()["live"].values(), went_on.tree()["live"].values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    tuned = SFT(
        mdp_for(opened, target, 2), opened.denoiser(prompts, trains=True), rounds=1, batch_size=2
    )
    tuned.learn()


def test_features_see_the_pictures(saved):
    opened = opened_at(saved("sd"), "sd")
    latents = opened.family.compressed(pictures(opened.family.picture[0]))

    class Mean:
        name, description = "mean", "the mean of all pixels"

        def __call__(self, images):
            assert images.shape == (COUNT, 3, *opened.family.picture)
            return images.flatten(1).mean(1, keepdim=True)

    seen = DecodedFeatures(opened.family, Mean())
    expected = 2 * opened.family.decoded(latents).flatten(1).mean(1) - 1
    torch.testing.assert_close(seen(latents)[:, 0], expected)
    assert seen.name == "mean, decoded"


def test_what_cannot_be_trained_or_encoded_is_one_sentence(saved, tmp_path):
    opened = opened_at(saved("sd"), "sd")
    with pytest.raises(ValueError, match="the pictures have no captions"):
        latent_target(opened, images_for(opened, captions=None), tmp_path)
    half = OpenedPipeline.of(opened.pipeline.to(torch.float16))
    with pytest.raises(ValueError, match=r"open the pipeline with dtype=torch\.float32"):
        half.denoiser(trains=True, prompts=PROMPTS)
    with pytest.raises(ValueError, match="and this one's body is a Identity"):
        save_pipeline(Denoiser(torch.nn.Identity(), opened.terms.process), tmp_path / "out")
    assert not (tmp_path / "out").exists()
