"""The second head: what it reads, what it says before any training, and its files."""

import copy

import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser
from fewstep.agents.denoisers.networks import MLP, ResidualMLP, SmallUNet, UNet2D
from fewstep.agents.denoisers.variance_head import VarianceHead
from fewstep.common.checkpoint import load_checkpoint, save_checkpoint
from fewstep.envs import VE, DiscreteVP

pytestmark = pytest.mark.numeric

DDPM = DiscreteVP.linear(1000)
BODIES = {
    "mlp": lambda: MLP((2,), 1000, hidden=16),
    "residual-mlp": lambda: ResidualMLP((1, 8, 8), hidden=16),
    "small-unet": lambda: SmallUNet((1, 8, 8), width=8),
    "unet2d": lambda: UNet2D((1, 8, 8), "tiny"),
}


def randomise(module):
    rng = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.2, generator=rng)


def made(name, kind="sn", process=DDPM, prediction="epsilon", **options):
    """A denoiser with a random body and a random head."""
    body = BODIES[name]()
    denoiser = Denoiser(body, process, prediction)
    shape = tuple(body.config["shape"])
    randomise(denoiser)
    with torch.no_grad():
        features = denoiser.head_inputs(torch.zeros(1, *shape), process.t_max)[1].features
    denoiser.head = VarianceHead.on_features(kind, features, shape, hidden=8, **options)
    randomise(denoiser.head)
    return denoiser


@torch.no_grad()
@pytest.mark.parametrize("name", BODIES)
def test_the_features_are_what_the_last_layer_reads(name, generator, count_calls):
    denoiser = made(name)
    x = torch.randn(3, *denoiser.head.shape, generator=generator())
    t = torch.tensor([3, 500, 1000])
    calls = count_calls(denoiser.body)
    raw, read = denoiser.head_inputs(x, t)
    assert len(calls) == 1
    assert torch.equal(raw, denoiser(x, t))
    torch.testing.assert_close(denoiser.body.out(read.features).view_as(x), raw)
    assert torch.equal(read.epsilon, denoiser.epsilon(x, t))
    assert read.alpha.flatten().tolist() == pytest.approx(DDPM.alpha(t).tolist())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sn", "npr"])
@pytest.mark.parametrize("name", BODIES)
def test_outputs_with_covariance(name, kind, generator, count_calls):
    """The outputs are those without; one time for all equals a time for each; MATH.md 1.12."""
    denoiser = made(name, kind)
    x = torch.randn(3, *denoiser.head.shape, generator=generator())
    calls = count_calls(denoiser.body)
    noise, covariance = denoiser.outputs_with_covariance(x, 400.0)
    clean, same = denoiser.outputs_with_covariance(x, 400.0, "sample")
    assert len(calls) == 2
    assert torch.equal(covariance, same)
    assert torch.equal(noise, denoiser.epsilon(x, 400.0))
    assert torch.equal(clean, denoiser.denoised(x, 400.0))
    each = denoiser.outputs_with_covariance(x, torch.full((3,), 400))[1]
    torch.testing.assert_close(each, covariance, rtol=1e-4, atol=1e-5)
    alpha, sigma = DDPM.levels(400.0)
    said = denoiser.head(*denoiser.head_inputs(x, 400.0)[1])
    excess = said - noise.square() if kind == "sn" else said
    expected = ((sigma / alpha) ** 2 * excess).clamp(0, 1)
    torch.testing.assert_close(covariance, expected)
    assert covariance.shape == x.shape
    assert (said >= 0).all()
    # Neither end of the range hides the formula.
    inside = (expected > 0) & (expected < 1)
    assert len(covariance[inside].unique()) > covariance.numel() / 4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sn", "npr"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v", "edm"])
def test_at_first_it_is_right_for_gaussian_data(kind, prediction, generator):
    """Var[x_0 | x_t] = s^2 sigma^2 / (alpha^2 s^2 + sigma^2), whatever the network predicts."""
    process = VE(0.01, 50.0) if prediction == "edm" else DDPM
    body = MLP((2,), 1000, time_range=(-1.2, 1.0) if prediction == "edm" else None)
    denoiser = Denoiser(body, process, prediction)
    denoiser.head = VarianceHead(kind, (2,), 128, convolutional=False, data_std=0.4)
    x = torch.randn(5, 2, generator=generator())
    for t in (process.t_min, 0.3 * process.t_max, process.t_max):
        alpha, sigma = process.levels(t)
        expected = (0.4 * sigma) ** 2 / ((0.4 * alpha) ** 2 + sigma**2)
        covariance = denoiser.outputs_with_covariance(x, t)[1]
        torch.testing.assert_close(covariance, torch.full_like(x, expected), rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "small-unet"])
def test_a_mean_over_pixels_is_one_number_a_sample(name, generator):
    fine = made(name)
    coarse = made(name, per_pixel=False)
    x = torch.randn(3, *fine.head.shape, generator=generator())
    each, mean = (d.outputs_with_covariance(x, 700.0)[1] for d in (fine, coarse))
    assert mean.shape == (3, *[1] * (x.ndim - 1))
    torch.testing.assert_close(mean.flatten(), each.flatten(1).mean(1))


@torch.no_grad()
@pytest.mark.parametrize("name", BODIES)
def test_files_keep_gamma_and_head(name, tmp_path, generator):
    denoiser = made(name, "npr", per_pixel=False, data_std=0.3)
    denoiser.gamma = torch.rand(1000, generator=generator(), dtype=torch.float64)
    denoiser.save(tmp_path / "file")
    again = Denoiser.load(tmp_path / "file")
    assert torch.equal(again.gamma, denoiser.gamma)
    assert again.gamma.dtype == torch.float64
    x = torch.randn(2, *denoiser.head.shape, generator=generator(1))
    for ours, theirs in zip(
        denoiser.outputs_with_covariance(x, 10.0),
        again.outputs_with_covariance(x, 10.0),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert again.head.config == denoiser.head.config


def test_older_files_have_neither(make_denoiser, tmp_path):
    tree = {"kind": "denoiser", **make_denoiser().to_tree()}
    assert tree.pop("gamma") is None
    assert tree.pop("head") is None
    save_checkpoint(tmp_path / "old", tree)
    again = Denoiser.load(tmp_path / "old")
    assert again.gamma is None
    assert again.head is None


def test_a_head_that_does_not_fit_its_weights_is_refused(tmp_path):
    made("mlp").save(tmp_path / "file")
    tree = load_checkpoint(tmp_path / "file")
    tree["head"]["config"]["hidden"] = 9
    save_checkpoint(tmp_path / "file", tree)
    with pytest.raises(ValueError, match="do not fit"):
        Denoiser.load(tmp_path / "file")


@torch.no_grad()
def test_copies_and_later_calls_are_their_own(generator):
    """No hook stays behind that would tie a copy to its original."""
    denoiser = made("mlp")
    x = torch.randn(2, 2, generator=generator())
    before = denoiser.outputs_with_covariance(x, 9.0)
    other = copy.deepcopy(denoiser)
    randomise(denoiser.body)
    nn.init.zeros_(denoiser.head.layers[-1].weight)
    for ours, theirs in zip(other.outputs_with_covariance(x, 9.0), before, strict=True):
        assert torch.equal(ours, theirs)
    assert not denoiser.body.out._forward_pre_hooks
    assert other.to(torch.float64).head.layers[0].weight.dtype == torch.float64


def test_a_bfloat16_network_tells_a_float32_head(generator):
    denoiser = made("small-unet").run_with("bf16")
    x = torch.randn(2, 1, 8, 8, generator=generator())
    noise, covariance = denoiser.outputs_with_covariance(x, 300.0)
    assert noise.dtype == covariance.dtype == torch.float32
    exact = made("small-unet").outputs_with_covariance(x, 300.0)[1]
    torch.testing.assert_close(covariance, exact, rtol=0.2, atol=0.05)


def test_networks_that_hide_their_features_are_refused(wave, make_denoiser):
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"`body.out`; Wave has none"):
        wave.head_inputs(x.double(), 5.0)
    compiled = make_denoiser()
    compiled.body.compile()
    with pytest.raises(ValueError, match="leave compile off"):
        compiled.head_inputs(x, 3.0)
    with pytest.raises(ValueError, match="this denoiser has not"):
        make_denoiser().outputs_with_covariance(x, 3.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VarianceHead("ns", (2,), 4, False), "kind of variance head 'ns'"),
        (lambda: VarianceHead("sn", (2,), 4, False, data_std=0.0), "data_std"),
        (
            lambda: VarianceHead.on_features("sn", torch.zeros(1, 4, 4, 4), (1, 8, 8)),
            r"features \(N, F\), or \(N, F, H, W\) of the images' size.*\(1, 4, 4, 4\)",
        ),
        (lambda: VarianceHead.on_features("sn", torch.zeros(1, 7, 4), (1, 8, 8)), r"\(1, 7, 4\)"),
    ],
)
def test_what_makes_no_sense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
