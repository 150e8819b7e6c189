import gzip
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path
from urllib.error import URLError

import gymnasium as gym
import numpy as np
import pytest
import torch
import torchvision
from gymnasium.utils.env_checker import check_env
from image_files import (
    WRITERS,
    noise,
    without_checksums,
    write_celeba,
    write_cifar10,
    write_folder,
    write_mnist,
)
from PIL import Image
from torchvision.transforms import v2

from fewstep.envs import ENVIRONMENTS, Schedule, Target, make_mdp, make_target
from fewstep.envs.targets.images import IMAGE_SETS, decode

IMAGE_ENVIRONMENTS = list(IMAGE_SETS)
REAL_MNIST = Path("/work/shared/data/MNIST/raw")
REAL_FASHION = Path("/work/shared/data/FashionMNIST/raw")


def to_bytes(samples):
    """Undo what a target does to its images."""
    return ((samples + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture
def no_checksums(monkeypatch):
    """Let torchvision take a CIFAR-10 that is not the real one."""
    without_checksums(monkeypatch)


@pytest.fixture(params=IMAGE_ENVIRONMENTS)
def at_hand(request, tmp_path, no_checksums):
    """The name of an image environment and the folder of a small set for it."""
    WRITERS[request.param](tmp_path)
    return request.param, tmp_path


# What every set keeps.


def test_every_set_is_a_target_of_bytes_in_range(at_hand):
    name, folder = at_hand
    target = make_target(name, data_dir=folder)
    assert target.name == name
    assert target.shape == IMAGE_SETS[name].shape
    assert target.flip is (not name.endswith("MNIST"))
    for samples in (target.take(4), target.sample(4), target.sample_fresh(2)):
        assert samples.dtype == torch.float32
        assert samples.min() >= -1
        assert samples.max() <= 1
        assert samples.std() > 0.1
    assert (target.labels is None) == (name == "CelebA64")
    if target.labels is not None:
        assert target.labels.shape == (len(target),)
        assert target.fresh_labels(target.fresh_limit).shape == (target.fresh_limit,)
    again = make_target(name, data_dir=folder)
    assert torch.equal(again.samples, target.samples)


@pytest.mark.parametrize("name", IMAGE_ENVIRONMENTS)
def test_a_missing_set_is_said_in_one_sentence(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make_target(name, data_dir=tmp_path)
    complaint = str(caught.value)
    assert str(tmp_path) in complaint
    assert "\n" not in complaint
    wanted = {
        "MNIST": ["train-images-idx3-ubyte.gz", "download=True"],
        "FashionMNIST": ["FashionMNIST", "train-images-idx3-ubyte.gz", "download=True"],
        "CIFAR10": ["data_batch_3", "download=True"],
        "CelebA64": ["img_align_celeba.zip", "list_eval_partition.txt", "gdown", "download=True"],
        "ImageFolder": [".png"],
    }
    for word in wanted[name]:
        assert word in complaint


def test_only_what_is_missing_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"hand: t10k-labels-idx1-ubyte.gz not found"):
        make_target("MNIST", data_dir=tmp_path)


def test_a_folder_of_images_has_no_default_place():
    with pytest.raises(FileNotFoundError, match="give data_dir"):
        make_target("ImageFolder")


def test_the_default_place_is_the_user_s_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / ".cache/fewstep/data/MNIST/raw")):
        make_target("MNIST")


@pytest.mark.parametrize("name", ["SwissRoll", "Digits", "MNIST", "CIFAR10", "CelebA64"])
def test_other_sets_have_one_size(name):
    with pytest.raises(ValueError, match=f"the size of {name} is fixed"):
        make_target(name, image_size=32)


# MNIST.


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_what_torchvision_reads(tmp_path, packed, name):
    write_mnist(tmp_path, packed, name)
    target = make_target(name, data_dir=tmp_path)
    if packed:
        write_mnist(tmp_path := tmp_path / "again", packed=False, name=name)
    for train, samples, labels in (
        (True, target.samples, target.labels),
        (False, target.sample_fresh(12, seed=5), target.fresh_labels(12, seed=5)),
    ):
        oracle = getattr(torchvision.datasets, name)(tmp_path, train=train)
        images, classes = oracle.data, oracle.targets
        if not train:
            order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
            images, classes = images[order], classes[order]
        assert torch.equal(to_bytes(samples), images[:, None])
        assert torch.equal(labels, classes)


@pytest.mark.skipif(not REAL_MNIST.is_dir(), reason=f"the real MNIST is not in {REAL_MNIST}")
def test_the_real_mnist():
    before = sorted(REAL_MNIST.iterdir())
    target = make_target("MNIST", data_dir=REAL_MNIST.parents[1])
    assert sorted(REAL_MNIST.iterdir()) == before
    assert (len(target), target.fresh_limit) == (60_000, 10_000)
    # The moments that everyone normalises MNIST with, of pixels in [0, 1].
    assert (target.take(60_000).mean() + 1) / 2 == pytest.approx(0.1307, abs=1e-4)
    assert target.std / 2 == pytest.approx(0.3081, abs=1e-4)
    assert target.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert target.labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert target.held_out_labels[:3].tolist() == [7, 2, 1]


@pytest.mark.skipif(not REAL_FASHION.is_dir(), reason=f"it is not in {REAL_FASHION}")
def test_the_real_fashion_mnist():
    target = make_target("FashionMNIST", data_dir=REAL_FASHION.parents[1])
    assert (len(target), target.fresh_limit) == (60_000, 10_000)
    # The moments that everyone normalises Fashion-MNIST with, of pixels in [0, 1].
    assert (target.take(60_000).mean() + 1) / 2 == pytest.approx(0.2860, abs=1e-4)
    assert target.std / 2 == pytest.approx(0.3530, abs=1e-4)
    assert target.labels.bincount().tolist() == [6000] * 10


def damage_end(data):
    return data[: len(data) // 2]


def damage_start(data):
    return b"\x01\x02" + data[2:]


def too_short(data):
    return gzip.compress(gzip.decompress(data)[:-1])


def other_kind(data):
    return gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:])


@pytest.mark.parametrize("damage", [damage_end, damage_start, too_short, other_kind])
@pytest.mark.parametrize("kind", ["train-images-idx3", "t10k-labels-idx1"])
def test_a_damaged_mnist_file_is_named(tmp_path, damage, kind):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / f"{kind}-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{kind}-ubyte.gz is damaged .* remove it"):
        make_target("MNIST", data_dir=tmp_path)


def rewritten(root, name, change):
    """Change the array of a packed IDX file, keeping its header true."""
    file = root / "MNIST" / "raw" / f"{name}-ubyte.gz"
    data = bytearray(gzip.decompress(file.read_bytes()))
    file.write_bytes(gzip.compress(bytes(change(data))))


@pytest.mark.parametrize("label", [10, 255])
@pytest.mark.parametrize("split", ["train", "t10k"])
def test_a_label_beyond_nine_is_refused(tmp_path, split, label):
    write_mnist(tmp_path)
    rewritten(tmp_path, f"{split}-labels-idx1", lambda data: data[:-1] + bytes([label]))
    with pytest.raises(ValueError, match=rf"{split}-labels-idx1-ubyte.gz is .*holds {label}"):
        make_target("MNIST", data_dir=tmp_path)


def test_as_many_labels_as_images(tmp_path):
    write_mnist(tmp_path)
    rewritten(tmp_path, "train-labels-idx1", lambda data: data[:7] + bytes([29]) + data[8:-1])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte has 29 labels for 30 images"):
        make_target("MNIST", data_dir=tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    write_mnist(tmp_path)
    rewritten(tmp_path, "train-images-idx3", lambda data: data[:11] + bytes([14]) + data[12:])
    with pytest.raises(ValueError, match=r"30 x \(14, 28\), not N x \(28, 28\)"):
        make_target("MNIST", data_dir=tmp_path)


@pytest.mark.parametrize("announced", [30, 2**32 - 1])
def test_no_more_is_unpacked_than_the_header_announces(tmp_path, announced):
    """A file of 260 kB that unpacks to 256 MiB: 30 images are 23,520 bytes."""
    write_mnist(tmp_path)
    head = bytes((0, 0, 8, 3)) + struct.pack(">3I", announced, 28, 28)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(head) + gzip.compress(bytes(2**23)) * 32)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"images-idx3-ubyte.gz is damaged"):
            make_target("MNIST", data_dir=tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


# CIFAR-10.


def test_cifar10_is_what_torchvision_reads(tmp_path, no_checksums):
    write_cifar10(tmp_path)
    target = make_target("CIFAR10", data_dir=tmp_path)
    oracle = torchvision.datasets.CIFAR10(tmp_path, transform=v2.PILToTensor())
    assert torch.equal(to_bytes(target.samples), torch.stack([image for image, _ in oracle]))
    assert target.labels.tolist() == [label for _, label in oracle]
    assert target.fresh_limit == 8


def test_a_cifar10_of_other_bytes_is_never_unpickled(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(ValueError, match=r"CIFAR10 in .* are damaged"):
        make_target("CIFAR10", data_dir=tmp_path)


# CelebA.


def test_celeba_is_cropped_and_resized_as_usual(tmp_path):
    write_celeba(tmp_path)
    target = make_target("CelebA64", data_dir=tmp_path)
    usual = v2.Compose([v2.CenterCrop(140), v2.Resize(64), v2.PILToTensor()])
    pictures = tmp_path / "celeba" / "img_align_celeba"
    expected = [usual(Image.open(pictures / f"{i:06}.jpg")) for i in (0, 2, 4)]
    assert torch.equal(to_bytes(target.samples), torch.stack(expected))
    assert target.fresh_limit == 2


def test_a_celeba_that_is_not_whole_is_refused(tmp_path):
    write_celeba(tmp_path)
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"000003\.jpg is missing"):
        make_target("CelebA64", data_dir=tmp_path)
    Image.new("RGB", (139, 218)).save(folder / "img_align_celeba" / "000003.jpg")
    with pytest.raises(ValueError, match=r"000003\.jpg is 139 x 218 pixels, too small"):
        make_target("CelebA64", data_dir=tmp_path)
    (folder / "list_eval_partition.txt").write_text("000000.jpg 0\n000001.jpg 3\n")
    with pytest.raises(ValueError, match=r"line 2 of .*list_eval_partition\.txt is not"):
        make_target("CelebA64", data_dir=tmp_path)
    for twice in ("000000.jpg 0\n000000.jpg 2\n", "000000.jpg 0\n../celeba/000001.jpg 2\n"):
        (folder / "list_eval_partition.txt").write_text(twice)
        with pytest.raises(
            ValueError, match=r"line 2 of .*list_eval_partition\.txt (names|is not)"
        ):
            make_target("CelebA64", data_dir=tmp_path)
    (folder / "list_eval_partition.txt").write_bytes(b"\xff\xfe 0\n")
    with pytest.raises(
        ValueError, match=r"list_eval_partition\.txt is damaged or foreign: no UTF-8"
    ):
        make_target("CelebA64", data_dir=tmp_path)
    (folder / "list_eval_partition.txt").write_text("000000.jpg 0\n")
    with pytest.raises(ValueError, match="names no images for training"):
        make_target("CelebA64", data_dir=tmp_path)


# Folders.


def file_of(image, root):
    """The file whose crop, made by torchvision, is this image."""
    usual = v2.Compose([v2.CenterCrop(32), v2.PILToTensor()])
    (file,) = (f for f in root.rglob("*.png") if torch.equal(usual(Image.open(f)), image))
    return file.relative_to(root)


def test_a_folder_is_split_once_and_labelled_by_its_sub_folders(tmp_path):
    write_folder(tmp_path)
    target = make_target("ImageFolder", data_dir=tmp_path, image_size=32)
    assert (len(target), target.fresh_limit) == (36, 4)
    images = to_bytes(torch.cat([target.samples, target.sample_fresh(4, seed=1)]))
    labels = torch.cat([target.labels, target.fresh_labels(4, seed=1)])
    files = [file_of(image, tmp_path) for image in images]
    assert len(set(files)) == 40
    assert [["cats", "dogs"][label] for label in labels] == [file.parts[0] for file in files]
    # The first samples are no longer in the order of the folders.
    assert 0 < target.labels[:12].sum() < 12


def test_images_are_cut_square_and_resized_as_torchvision_does(tmp_path):
    write_folder(tmp_path, count=2, classes=["cats"], size=(301, 144))
    target = make_target("ImageFolder", data_dir=tmp_path)
    usual = v2.Compose([v2.CenterCrop(144), v2.Resize(64), v2.PILToTensor()])
    expected = [usual(Image.open(tmp_path / "cats" / f"{i:03}.png")) for i in range(2)]
    assert any(torch.equal(to_bytes(target.samples)[0], image) for image in expected)
    assert target.fresh_limit == 0


@pytest.mark.parametrize(("count", "held_out"), [(2, 0), (10, 0), (30, 0), (39, 0), (40, 4)])
def test_none_are_held_out_or_enough_to_compare(tmp_path, count, held_out):
    write_folder(tmp_path, count=count, size=(8, 8))
    target = make_target("ImageFolder", data_dir=tmp_path, image_size=8)
    assert (len(target), target.fresh_limit) == (count - held_out, held_out)


def test_one_image_is_no_distribution(tmp_path):
    write_folder(tmp_path, count=1)
    with pytest.raises(ValueError, match=f"at least 2 images.*; {tmp_path} holds 1"):
        make_target("ImageFolder", data_dir=tmp_path)


@pytest.mark.parametrize("classes", [["."], ["all"], ["all/cats", "all/dogs"], [".", "dogs"]])
def test_a_folder_without_classes_has_no_labels(tmp_path, classes):
    write_folder(tmp_path, count=42, classes=classes)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._000.png").write_text("no image either")
    target = make_target("ImageFolder", data_dir=tmp_path, image_size=8)
    assert (len(target), target.fresh_limit) == (38, 4)
    assert target.labels is target.held_out_labels is None


def test_any_colours_become_rgb(tmp_path):
    grey = Image.fromarray(noise(16, 16))
    pictures = {
        "grey.png": grey,
        "palette.png": grey.quantize(16),
        "alpha.png": Image.merge("RGBA", [grey] * 4),
        "black-and-white.bmp": grey.convert("1"),
        "cmyk.tif": grey.convert("CMYK"),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    files = [tmp_path / name for name in pictures]
    for image, picture in zip(decode(files, 16), pictures.values(), strict=True):
        expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(image, expected)


def test_a_picture_stands_as_its_camera_says(tmp_path):
    picture, exif = Image.fromarray(noise(16, 16)), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(np.asarray(picture), -1)
    assert np.array_equal(decode([tmp_path / "turned.png"], 16)[0, 0].numpy(), expected)


def test_threads_keep_the_order(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(200)]
    for i, file in enumerate(files):
        Image.new("L", (2, 2), i).save(file)
    assert decode(files, 2)[:, 0, 0, 0].tolist() == list(range(200))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_a_damaged_image_is_named(tmp_path, suffix, share):
    write_folder(tmp_path, count=3, classes=["."])
    file = tmp_path / f"broken.{suffix}"
    Image.fromarray(noise(32, 32, 3)).save(file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"broken\.{suffix} is no readable image: .") as caught:
        make_target("ImageFolder", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_an_image_of_sixteen_bits_is_named(tmp_path):
    write_folder(tmp_path, count=2, classes=["."])
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits a channel"):
        make_target("ImageFolder", data_dir=tmp_path)


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_below_one_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"image_size must be at least 1; got {size}"):
        make_target("ImageFolder", data_dir=tmp_path, image_size=size)


# Downloads.


def test_a_download_is_torchvision_s(tmp_path, monkeypatch, no_checksums):
    calls = []

    def fetch(root, download):
        calls.append((root, download))
        Path(root).mkdir()
        write_mnist(Path(root), packed=False)

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    root = tmp_path / "new"
    for _ in range(2):  # what is there is not fetched again
        assert len(make_target("MNIST", data_dir=root, download=True)) == 30
    assert calls == [(root, True)]


@pytest.mark.parametrize(
    "failure", [URLError("no network"), RuntimeError("Tried a,\ngot:\n no network"), TimeoutError()]
)
@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_a_failed_download_is_said_in_one_sentence(tmp_path, monkeypatch, name, failure):
    def fail(root, download):
        raise failure

    monkeypatch.setattr(torchvision.datasets, name, fail)
    with pytest.raises(ConnectionError, match=f"could not download {name} into") as caught:
        make_target(name, data_dir=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_a_folder_one_may_not_write_to_is_no_network_s_fault(tmp_path, monkeypatch):
    def fail(root, download):
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(PermissionError, match="Permission denied"):
        make_target("MNIST", data_dir=tmp_path, download=True)


def test_torchvision_is_asked_for_only_where_needed(tmp_path, monkeypatch):
    for name in ("MNIST", "CIFAR10", "CelebA64"):
        WRITERS[name](tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(make_target("MNIST", data_dir=tmp_path)) == 30
    assert len(make_target("CelebA64", data_dir=tmp_path)) == 3
    with pytest.raises(ImportError, match="CIFAR10 needs torchvision: pip install torchvision"):
        make_target("CIFAR10", data_dir=tmp_path)


# Environments.


def test_image_environments_are_ddpm_s(at_hand):
    name, folder = at_hand
    mdp = make_mdp(name, data_dir=folder)
    assert ENVIRONMENTS[name].target == mdp.target.name == name
    assert mdp.process.t_max == 1000
    assert mdp.schedule == Schedule.uniform(mdp.process, 10)


def test_gymnasium_check_env(at_hand, reward):
    name, folder = at_hand
    env = gym.make(
        f"fewstep/{name}-v0", data_dir=folder, steps=3, reward=reward, render_mode="rgb_array"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    messages = [str(w.message) for w in caught]
    assert [m for m in messages if "symmetric and normalized space" not in m] == []


def test_no_environment_turns_a_whole_set_of_bytes_into_floats(at_hand, monkeypatch):
    name, folder = at_hand

    def whole(target):
        raise AssertionError("the whole set was converted")

    monkeypatch.setattr(Target, "samples", property(whole))
    monkeypatch.setattr("fewstep.envs.mdp.DEFAULT_REWARD_SAMPLES", 2)
    env = gym.make_vec(
        f"fewstep/{name}-v0", 2, data_dir=folder, steps=1, render_mode="rgb_array"
    ).unwrapped
    observation, _ = env.reset(seed=0)
    assert env.reward.real.shape == (2, *env.target.shape)
    _, gained, terminated, _, _ = env.step(observation["sample"])
    assert gained.isfinite().all()
    assert terminated.all()
    assert env.render()[0].dtype == np.uint8


def test_environments_take_the_size_and_the_download(tmp_path, monkeypatch):
    write_folder(tmp_path / "mine", count=10)
    settings = {"data_dir": tmp_path / "mine", "image_size": 16}
    for env in (
        gym.make_vec("fewstep/ImageFolder-v0", 2, **settings),
        gym.make("fewstep/ImageFolder-v0", **settings),
    ):
        assert env.unwrapped.target.shape == (3, 16, 16)
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download: write_mnist(root))
    env = gym.make("fewstep/MNIST-v0", data_dir=tmp_path, download=True)
    assert env.unwrapped.target.shape == (1, 28, 28)
