import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fewstep.critics import (
    Cifar10ResNet,
    ClassifierFeatures,
    InceptionFeatures,
    train_classifier,
)

# Beside the checkout, where there is one.
RESNET = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10_resnet"


class Unsafe:
    """A pickle that would touch a file on loading."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- Inception ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of Inception's layout with random weights."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=file)
    torch.save(network.state_dict(), file)
    return file


def test_inception_sees_the_bytes_of_the_images(inception_file):
    extractor = InceptionFeatures(inception_file)
    assert extractor.name == "inception-v3-compat"
    pixels = torch.randint(256, (2, 1, 9, 9), dtype=torch.uint8)
    # Off by less than half a level, and beyond the ends: the same bytes.
    grey = pixels / 127.5 - 1 + noise(2, 1, 9, 9) * 0.4 / 127.5
    grey += torch.where(pixels == 255, 5.0, 0.0) - torch.where(pixels == 0, 5.0, 0.0)
    network = FeatureExtractorInceptionV3(
        "x", ["2048"], feature_extractor_weights_path=str(inception_file)
    )
    expected = network(pixels.repeat(1, 3, 1, 1))[0]
    assert expected.std() > 0
    assert torch.equal(extractor(grey), expected)
    assert torch.equal(extractor(grey.repeat(1, 3, 1, 1)), expected)
    with pytest.raises(ValueError, match="grey or RGB images, got 4 channels"):
        extractor(torch.zeros(2, 4, 9, 9))


def test_missing_and_foreign_inception_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hub/checkpoints/weights-incep.*download https"):
        InceptionFeatures()
    file, touched = tmp_path / "weights.pth", tmp_path / "touched"
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is not Inception v3 weights"):
        InceptionFeatures(file)
    torch.save(Unsafe(touched), file)
    with pytest.raises(ValueError, match="is not a torch file of tensors alone"):
        InceptionFeatures(file)
    assert not touched.exists()


# -- the ResNet of CIFAR-10 --------------------------------------------------------------------


def resnet_by_hand(w, x):
    """ResNet-20 with option A, from a dict of weights alone."""

    def unit(h, conv, bn, stride=1):
        h = F.conv2d(h, w[f"{conv}.weight"], stride=stride, padding=1)
        mean, var = w[f"{bn}.running_mean"], w[f"{bn}.running_var"]
        return F.batch_norm(h, mean, var, w[f"{bn}.weight"], w[f"{bn}.bias"])

    h = unit(x, "conv1", "bn1").relu()
    for stage, block in [(s, b) for s in (1, 2, 3) for b in range(3)]:
        name = f"layer{stage}.{block}."
        halves = stage > 1 and block == 0
        shortcut = h
        if halves:
            n, c, height, width = h.shape
            shortcut = torch.zeros(n, 2 * c, height // 2, width // 2)
            shortcut[:, c // 2 : c // 2 + c] = h[..., ::2, ::2]
        inner = unit(h, name + "conv1", name + "bn1", 2 if halves else 1).relu()
        h = (unit(inner, name + "conv2", name + "bn2") + shortcut).relu()
    return F.avg_pool2d(h, h.shape[-1]).flatten(1)


def random_resnet_file(folder):
    """Weights of the published layout, made without the network's code."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def add(conv, bn, i, o):
        weights[f"{conv}.weight"] = torch.randn(o, i, 3, 3, generator=generator) / math.sqrt(9 * i)
        for part in ("weight", "running_var"):
            weights[f"{bn}.{part}"] = torch.rand(o, generator=generator) + 0.5
        for part in ("bias", "running_mean"):
            weights[f"{bn}.{part}"] = torch.randn(o, generator=generator) * 0.1

    add("conv1", "bn1", 3, 16)
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            narrow = width // 2 if stage > 1 and block == 0 else width
            add(f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.bn1", narrow, width)
            add(f"layer{stage}.{block}.conv2", f"layer{stage}.{block}.bn2", width, width)
    weights |= {"linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}
    file = folder / Cifar10ResNet.FILE
    torch.save({"state_dict": {f"module.{key}": w for key, w in weights.items()}}, file)
    return file


def check_resnet(file):
    extractor = Cifar10ResNet(file)
    images = noise(3, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = ((images.permute(0, 2, 3, 1) + 1) / 2 - mean) / std
    weights = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    weights = {key.removeprefix("module."): value.detach() for key, value in weights.items()}
    expected = resnet_by_hand(weights, inputs.permute(0, 3, 1, 2))
    assert expected.std() > 0
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    assert "inception" not in extractor.name


def test_the_resnet_computes_what_its_weights_say(tmp_path):
    file = random_resnet_file(tmp_path)
    check_resnet(file)
    assert Cifar10ResNet(tmp_path).name == "cifar10-resnet20"


@pytest.mark.skipif(not RESNET.is_dir(), reason=f"the published weights are not in {RESNET}")
def test_the_published_weights_load_strictly():
    check_resnet(RESNET / Cifar10ResNet.FILE)


def test_bad_resnet_files_and_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No weights of the CIFAR-10 ResNet-20 at"):
        Cifar10ResNet(tmp_path)
    file = random_resnet_file(tmp_path)
    extractor = Cifar10ResNet(file)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, 32, 32\)"):
        extractor(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="images holds NaN"):
        extractor(torch.full((2, 3, 32, 32), math.nan))
    content = torch.load(file, weights_only=True)
    del content["state_dict"]["module.layer2.1.conv1.weight"]
    torch.save(content, file)
    with pytest.raises(ValueError, match="is not weights of the CIFAR-10 ResNet-20"):
        Cifar10ResNet(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a torch file of tensors alone"):
        Cifar10ResNet(file)


# -- the classifier ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    images = torch.tensor(found.images[:, None] / 8 - 1, dtype=torch.float32)
    order = np.random.default_rng(1).permutation(len(images))
    labels = torch.tensor(found.target)
    train, test = order[:-400], order[-400:]
    return images[train], labels[train], images[test], labels[test]


@pytest.fixture(scope="module")
def classifier(digits):
    return train_classifier(*digits, name="digits-classifier")


def test_the_digits_classifier_is_accurate_and_says_how_accurate(classifier, digits):
    _, _, images, labels = digits
    right = (classifier.logits(images).argmax(1) == labels).double().mean()
    assert classifier.accuracy == pytest.approx(float(right))
    assert classifier.accuracy > 0.95
    assert f"accuracy {100 * classifier.accuracy:.1f} %" in classifier.description


def test_features_are_the_input_of_the_last_layer_and_cut_at_the_ends(classifier, digits):
    images = digits[2][:50]
    features = classifier(images)
    assert features.shape == (50, 64)
    assert features.dtype == torch.float32
    assert features.min() == 0
    w, b = classifier.head.weight, classifier.head.bias
    torch.testing.assert_close(features @ w.T + b, classifier.logits(images))
    # Nothing is learned or drawn by looking, and samples count as they are shown.
    assert torch.equal(classifier(images), features)
    beyond = noise(20, 1, 8, 8) * 2
    assert torch.equal(classifier(beyond.double()), classifier(beyond.clamp(-1, 1)))
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 9, 9), (3, 16, 28), (2, 32, 32)])
def test_it_takes_images_of_other_sizes_and_survives_a_file(shape, tmp_path):
    images, labels = noise(40, *shape), torch.arange(40) % 3
    trained = train_classifier(images, labels, images, labels, name="x", epochs=1, batch_size=16)
    file = tmp_path / "classifier.safetensors"
    trained.save(file)
    random = torch.get_rng_state()
    loaded = ClassifierFeatures.load(file)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(loaded(images), trained(images))
    assert (loaded.name, loaded.accuracy, loaded.classes) == ("x", trained.accuracy, 3)
    assert loaded.description == trained.description


def test_the_seed_decides_and_the_global_generator_is_left_alone(digits):
    def train(seed):
        few = digits[0][:200], digits[1][:200], digits[2][:50], digits[3][:50]
        return train_classifier(*few, name="x", seed=seed, epochs=1)(digits[2])

    before = torch.random.get_rng_state()
    first = train(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(train(0), first)
    assert not torch.equal(train(1), first)


def test_bad_classifier_files_are_refused(classifier, tmp_path):
    file = tmp_path / "classifier.safetensors"
    with pytest.raises(FileNotFoundError, match="No classifier at"):
        ClassifierFeatures.load(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a feature classifier of ours"):
        ClassifierFeatures.load(file)
    classifier.save(file)
    weights = load_file(file)
    save_file(weights, file)
    with pytest.raises(ValueError, match="is not a feature classifier of ours"):
        ClassifierFeatures.load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(8)}, "labels must be 8 integers"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, "labels must be 8 integers"),
        ({"labels": torch.full((8,), -1)}, "labels must be 0 or more, got -1"),
        ({"held_out_labels": torch.zeros(2)}, "held_out_labels must be 8 integers"),
        (
            {"labels": torch.zeros(8).long(), "held_out_labels": torch.zeros(8).long()},
            "two classes",
        ),
        ({"images": torch.full((8, 1, 8, 8), math.inf)}, "images holds NaN or infinite"),
        ({"held_out_images": torch.zeros(8, 1, 9, 8)}, r"shape \(N, 1, 8, 8\)"),
        ({"epochs": 0}, "at least one epoch"),
    ],
)
def test_bad_training_data_are_refused(changes, message):
    images, labels = noise(8, 1, 8, 8), torch.arange(8) % 2
    arguments = {
        "images": images,
        "labels": labels,
        "held_out_images": images,
        "held_out_labels": labels,
    }
    with pytest.raises(ValueError, match=message):
        train_classifier(**(arguments | changes), name="x")
    with pytest.raises(ValueError, match="needs images"):
        ClassifierFeatures("x", (1, 3, 8), 2)
