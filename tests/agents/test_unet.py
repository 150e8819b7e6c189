"""The U-Net body: diffusers' network, unchanged; its sizes are those of the papers."""

import copy
import json
import sys

import diffusers
import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.networks import PRESETS, UNet2D, body_from_config
from fewstep.agents.denoisers.parameterisations import time_range_of
from fewstep.agents.pretrained import from_pretrained, save_pretrained
from fewstep.common.checkpoint import save_checkpoint
from fewstep.envs import VE, DiscreteVP

SHAPES = {
    "tiny": (1, 8, 8),
    "cifar10": (3, 32, 32),
    "celeba64": (3, 64, 64),
}


def weights_of(body):
    return sum(parameter.numel() for parameter in body.parameters())


@pytest.fixture
def sample(generator):
    return torch.randn(3, 2, 8, 8, generator=generator())


@pytest.mark.parametrize("time", [7, 7.5])
def test_the_body_is_the_raw_model(time, make_unet, sample):
    body = make_unet()
    shared = torch.tensor([time]).expand(3)
    expected = body.unet(sample, time if isinstance(time, int) else torch.tensor(time)).sample
    assert torch.equal(body(sample, shared), expected)
    assert torch.equal(body(sample, shared.clone()), expected)


def test_every_sample_has_its_own_time(make_unet, sample):
    body = make_unet()
    times = torch.tensor([0, 500, 999])
    each = [body.unet(sample[n : n + 1], times[n]).sample for n in range(3)]
    torch.testing.assert_close(body(sample, times), torch.cat(each))


def test_a_time_range_is_mapped_to_the_thousand_times_of_the_model(make_unet, sample):
    process = VE()
    body = make_unet(time_range=time_range_of("edm", process))
    denoiser = Denoiser(body, process, "edm")
    for sigma, time in ((0.002, 0.0), ((0.002 * 80) ** 0.5, 500.0), (80.0, 1000.0)):
        scale = (sigma**2 + 0.25) ** -0.5
        expected = body.unet(scale * sample, torch.tensor(time)).sample
        torch.testing.assert_close(denoiser(sample, sigma), expected, rtol=1e-4, atol=1e-5)


def test_out_is_the_last_layer_and_its_input_the_features(make_unet, sample):
    body, seen = make_unet(), []
    with_hook = body.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    prediction = body(sample, torch.zeros(3))
    with_hook.remove()
    assert seen[0].shape == (3, 8, 8, 8)
    assert torch.equal(body.out(seen[0]), prediction)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_and_come_back_from_their_config(name):
    shape = SHAPES[name]
    with torch.device("meta"):
        body = UNet2D(shape, name)
        again = body_from_config(json.loads(json.dumps(body.config)))
        assert body(torch.empty(2, *shape), torch.zeros(2)).shape == (2, *shape)
    assert again.config == body.config
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in body.state_dict().items()
    }


def test_presets_have_the_sizes_of_the_papers():
    with torch.device("meta"):
        sizes = {name: weights_of(UNet2D(SHAPES[name], name)) for name in PRESETS}
    assert sizes["tiny"] < 0.5e6
    # Ho et al. 2020, appendix B: "35.7 million"; Song et al. 2021 use Ho's network on CelebA.
    assert sizes["cifar10"] == 35_746_307
    assert sizes["celeba64"] == 78_700_803


def test_the_cifar10_preset_is_the_network_of_the_hub():
    # The settings of google/ddpm-cifar10-32/config.json; dropout is for training.
    theirs = {
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": (128, 256, 256, 256),
        "center_input_sample": False,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    with torch.device("meta"):
        body = UNet2D((3, 32, 32), "cifar10")
        hub = UNet2D.from_model(diffusers.UNet2DModel(**theirs))
    assert body.config == {**hub.config, "dropout": 0.1}


@pytest.mark.parametrize(("name", "size"), [("cifar10", 32), ("celeba64", 64)])
def test_attention_is_at_sixteen_pixels(name, size):
    seen = []
    with torch.device("meta"):
        body = UNet2D((3, size, size), name)
        for part in (*body.unet.down_blocks, *body.unet.up_blocks):
            for module in getattr(part, "attentions", []):
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
        body(torch.empty(1, 3, size, size), torch.zeros(1))
    assert seen == [16] * 5  # two blocks on the way down, three on the way up


def test_options_win_over_the_preset(make_unet):
    with torch.device("meta"):
        body = UNet2D((1, 8, 8), "tiny", dropout=0.3, layers_per_block=2)
    assert body.config["dropout"] == 0.3
    assert body.config["layers_per_block"] == 2
    assert body.config["block_out_channels"] == list(PRESETS["tiny"]["block_out_channels"])


def test_a_model_that_exists_is_shared_not_copied(make_unet):
    model = make_unet().unet
    assert UNet2D.from_model(model).unet is model
    oblong = diffusers.UNet2DModel(**{**model.config, "sample_size": (8, 16)})
    assert UNet2D.from_model(oblong).config["shape"] == [2, 8, 16]


def test_a_denoiser_with_a_unet_is_saved_and_copied(make_unet, sample, tmp_path):
    denoiser = Denoiser(make_unet(time_range=(0.0, 500.0)), DiscreteVP.linear(500), clip=True)
    denoiser.save(tmp_path / "unet")
    for again in (Denoiser.load(tmp_path / "unet"), copy.deepcopy(denoiser)):
        assert again.clip
        assert torch.equal(again(sample, 30), denoiser(sample, 30))


def test_a_file_from_before_clip_is_not_clipped(make_unet, tmp_path):
    tree = Denoiser(make_unet(), DiscreteVP.linear(10), clip=True).to_tree()
    assert tree.pop("clip") is True
    save_checkpoint(tmp_path / "old", {"kind": "denoiser", **tree})
    assert Denoiser.load(tmp_path / "old").clip is False


def test_gradients_reach_every_weight(make_unet, sample):
    body = make_unet().train()
    body(sample, torch.tensor([3, 4, 5])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


def test_a_denoiser_for_other_images_is_noticed(make_unet):
    denoiser = Denoiser(make_unet(), DiscreteVP.linear(10))
    denoiser.check_shape((2, 8, 8))
    for other in ((3, 8, 8), (2, 16, 16), (2,)):
        with pytest.raises(ValueError, match=r"shape \(2, 8, 8\), here they have"):
            denoiser.check_shape(other)


def test_networks_that_are_no_plain_bodies_are_refused(make_unet):
    with pytest.raises(ValueError, match="unknown U-Net preset 'cifar'; did you mean 'cifar10'"):
        UNet2D((3, 32, 32), "cifar")
    with pytest.raises(ValueError, match="unknown option of UNet2DModel 'drop_out'; did you mean"):
        UNet2D((1, 8, 8), "tiny", drop_out=0.1)
    with pytest.raises(ValueError, match="unknown option of UNet2DModel 'in_channels'"):
        UNet2D((1, 8, 8), "tiny", in_channels=1)
    with pytest.raises(ValueError, match=r"for images, .* got shape \(2,\)"):
        UNet2D((2,), "tiny")
    with pytest.raises(ValueError, match="multiples of 8, got 32x28"):
        UNet2D((3, 32, 28), "cifar10", block_out_channels=[32] * 4)
    with pytest.raises(ValueError, match=r"has 10 class embeddings, of which .* know 8 classes"):
        make_unet(num_class_embeds=10, classes=8)
    with pytest.raises(ValueError, match=r"class_embed_type='timestep'.*: pass classes"):
        make_unet(class_embed_type="timestep")
    with pytest.raises(ValueError, match=r"'identity'.*from_pretrained takes them as class_embedd"):
        make_unet(class_embed_type="identity")
    with pytest.raises(ValueError, match="class_embed_type='names'; fewstep reads None, 'timestep"):
        make_unet(class_embed_type="names")
    with pytest.raises(ValueError, match="'positional', not 'fourier'"):
        make_unet(time_embedding_type="fourier")
    with pytest.raises(ValueError, match="finite and increasing"):
        make_unet(time_range=(1.0, 1.0))
    config = {**make_unet().unet.config}
    with pytest.raises(ValueError, match="names no sample_size"):
        UNet2D.from_model(diffusers.UNet2DModel(**{**config, "sample_size": None}))
    with pytest.raises(ValueError, match="reads 2 channels and predicts 4"):
        UNet2D.from_model(diffusers.UNet2DModel(**{**config, "out_channels": 4}))


def test_without_diffusers_there_is_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'needs diffusers .*pip install "fewstep\[images\]"'):
        UNet2D((1, 8, 8), "tiny")
    with pytest.raises(ImportError, match="save_pretrained needs diffusers"):
        save_pretrained(Denoiser(nn.Identity(), DiscreteVP.linear(10)), "folder")
    with pytest.raises(ImportError, match="from_pretrained needs diffusers"):
        from_pretrained("folder")
