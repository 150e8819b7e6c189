import pytest
import torch
from torch import nn

from fewstep.critics import ConvCritic, MLPBaseline, MLPCritic, make_baseline, make_critic
from fewstep.critics.networks import ConvBaseline, FourierFeatures

pytestmark = pytest.mark.numeric

SHAPES = [(2,), (5, 3), (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 16, 24)]


@pytest.mark.parametrize("shape", SHAPES)
def test_default_networks_give_one_number_a_sample(shape):
    sample = torch.randn(3, *shape)
    critic, baseline = make_critic(shape), make_baseline(shape, 4)
    assert isinstance(critic, ConvCritic if len(shape) == 3 else MLPCritic)
    assert critic(sample).shape == (3,)
    assert baseline(sample, torch.tensor([0, 3, 1])).shape == (3,)
    assert baseline(sample.expand(4, 3, *shape)).shape == (4, 3)
    # Sample by sample, whatever the batch.
    assert torch.allclose(critic(sample)[1:2], critic(sample[1:2]), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 24)])
def test_the_convolutional_baseline_is_a_critic_whose_channels_know_the_step(shape):
    baseline = make_baseline(shape, 4, "conv", width=8).double()
    assert isinstance(baseline, ConvBaseline)
    states = torch.randn(4, 3, *shape).double()
    critic = ConvCritic(shape, 8).double()
    critic.layers.load_state_dict(baseline.layers.state_dict())
    # Its embeddings begin as ones.
    torch.testing.assert_close(baseline(states).flatten(), critic(states.flatten(0, 1)))
    with torch.no_grad():
        for embedding in baseline.embeddings:
            embedding.uniform_(0.5, 1.5)
    step = torch.arange(4).repeat_interleave(3)
    flat = baseline(states.flatten(0, 1), step)
    torch.testing.assert_close(baseline(states).flatten(), flat)
    torch.testing.assert_close(baseline(states[2:3], torch.tensor([2]))[0], flat[6:9])
    assert not torch.allclose(baseline(states[:1].expand_as(states))[1], flat[:3])
    with pytest.raises(ValueError, match="has 4 steps, got states of 2"):
        baseline(states[:2])


def test_features_of_several_bandwidths_have_those_deviations():
    features = FourierFeatures(2, 2000, (6.0, 25.0))
    coarse, fine = features.projections.split(2000, dim=1)
    # The standard error of a deviation of 4000 normal numbers is 1.1 %.
    assert float(coarse.std()) == pytest.approx(6, rel=0.05)
    assert float(fine.std()) == pytest.approx(25, rel=0.05)
    x = torch.randn(3, 2)
    assert features(x).shape == (3, features.width) == (3, 2 + 2 * 4000)
    assert make_critic((2,), bandwidths=(6.0, 25.0)).features.width == 2 + 2 * 2 * 32
    for bad in ((), (6.0, -1.0), (float("inf"),)):
        with pytest.raises(ValueError, match="bandwidths must be positive and finite"):
            FourierFeatures(2, 4, bad)


@pytest.mark.parametrize("rows", [2, 300])  # fewer and more rows than hidden units
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_both_forms_of_the_baseline_agree_in_value_and_gradient(shape, rows):
    baseline = MLPBaseline(shape, steps=5, hidden=16).double()
    states = torch.randn(5, rows, *shape).double()
    step = torch.arange(5).repeat_interleave(rows)
    forms = baseline(states).flatten(), baseline(states.flatten(0, 1), step)
    torch.testing.assert_close(*forms)
    # Not a function of the sample alone.
    assert not torch.allclose(baseline(states[:1].expand_as(states))[0], baseline(states)[1])
    gradients = (
        torch.autograd.grad(values.square().sum(), list(baseline.parameters()), retain_graph=True)
        for values in forms
    )
    for fast, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain)


def test_baseline_multiplies_hidden_layers_by_the_embedding_before_the_activation():
    baseline = MLPBaseline((2,), steps=3, hidden=4, layers=1)
    layer = baseline.hidden[0]
    assert layer.embedding.shape == (3, 4)
    assert layer.embedding.min() >= 0 and layer.embedding.max() < 1
    sample = torch.randn(6, 2)
    hidden = torch.nn.functional.silu(layer.linear(sample) * layer.embedding[2])
    by_hand = baseline.out(hidden).squeeze(1)
    torch.testing.assert_close(baseline(sample, torch.full((6,), 2)), by_hand)


@pytest.mark.parametrize(
    ("shape", "width", "channels"),
    [
        ((1, 8, 8), None, [64, 1]),
        ((3, 32, 32), None, [256, 512, 1024, 1]),  # Fan & Lee's
        ((1, 28, 28), 8, [8, 16, 1]),
        ((3, 64, 64), 8, [8, 16, 32, 32, 1]),
    ],
)
def test_stages_of_the_convolutional_critic(shape, width, channels):
    layers = [m for m in ConvCritic(shape, width).modules() if isinstance(m, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == channels


def test_bad_shapes_and_steps():
    for shape in [(2,), (3, 7, 8), (1, 1, 8, 8)]:
        with pytest.raises(ValueError, match=r"ConvCritic needs images \(C, H, W\)"):
            ConvCritic(shape)
    with pytest.raises(ValueError, match="at least one step"):
        MLPBaseline((2,), steps=0)
    baseline = MLPBaseline((2,), steps=3)
    with pytest.raises(ValueError, match="has 3 steps, got states of 1"):
        baseline(torch.zeros(1, 4, 2))
    with pytest.raises(IndexError):
        baseline(torch.zeros(4, 2), torch.tensor([0, 1, 2, -1]))
