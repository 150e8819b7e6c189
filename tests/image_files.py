"""Tiny sets of images in the formats of the real ones, for tests."""

import gzip
import os
import pickle
import struct
from functools import partial

import numpy as np
import torchvision
from PIL import Image


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_mnist(root, packed=True, name="MNIST"):
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 30), ("t10k", 12)):
        arrays = {"images-idx3": noise(count, 28, 28, seed=count), "labels-idx1": noise(count) % 10}
        for kind, array in arrays.items():
            data, name = idx(array), f"{split}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        batch = {"data": noise(8, 3072, seed=seed), "labels": (noise(8, seed=seed) % 10).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [str(i) for i in range(10)]})
    )


def write_celeba(root, splits=(0, 1, 0, 2, 0, 2)):
    pictures = root / "celeba" / "img_align_celeba"
    pictures.mkdir(parents=True)
    lines = []
    for i, split in enumerate(splits):
        Image.fromarray(noise(218, 178, 3, seed=i)).save(pictures / f"{i:06}.jpg")
        lines.append(f"{i:06}.jpg {split}\n")
    (root / "celeba" / "list_eval_partition.txt").write_text("".join(lines))


def write_folder(root, count=40, classes=("cats", "dogs"), size=(48, 32)):
    for i in range(count):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*size, 3, seed=i)).save(folder / f"{i:03}.png")


WRITERS = {
    "MNIST": write_mnist,
    "FashionMNIST": partial(write_mnist, name="FashionMNIST"),
    "CIFAR10": write_cifar10,
    "CelebA64": write_celeba,
    "ImageFolder": write_folder,
}


def without_checksums(monkeypatch):
    """Let torchvision take a CIFAR-10 that is not the real one."""
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path)
    )
