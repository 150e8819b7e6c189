"""Sets of images on disk, read once into bytes: MNIST, Fashion-MNIST, CIFAR-10, CelebA, your own.

`load_images(name, data_dir)` gives what a `Target` is made of. The files lie where torchvision
looks for them, and torchvision fetches them when asked to; nothing is ever written otherwise. The
two MNISTs are also read from their `.gz` files as they are, so a folder without write access will
do.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.files import cache_root
from ...common.reading import read_text
from .captions import read_captions


def default_data_dir() -> Path:
    """Where data files are looked for unless `data_dir` says otherwise: see `cache_root`."""
    return cache_root() / "data"


IMAGE_SUFFIXES = (
    ".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
FOLDER_SIZE = 64
SPLIT_SEED = 0
MOST_HELD_OUT = 10_000
# Precision and recall look at the third nearest of the other images.
FEWEST_HELD_OUT, FEWEST_IMAGES = 4, 2
# Aligned faces are 178 x 218; the square of DDPM's and DDIM's CelebA-64 leaves the background out.
CELEBA_CROP, CELEBA_SIZE = 140, 64

# Images that a thread decodes before it fetches its next task.
_BATCH = 64


@dataclass(frozen=True)
class ImageSet:
    """Images in memory, as bytes: the arguments of a `Target`.

    Attributes:
        samples: Training images `(N, C, H, W)` uint8.
        held_out: Images of the test split `(M, C, H, W)` uint8, or None.
        labels: Classes of the training images, `(N,)` integers, or None.
        held_out_labels: Classes of the held-out images, `(M,)` integers, or None.
        flip: Whether a mirrored image is as real as the image.
        captions: Texts of the training images, or None.
        held_out_captions: Texts of the held-out images, or None.
    """

    samples: Tensor
    held_out: Tensor | None
    labels: Tensor | None
    held_out_labels: Tensor | None
    flip: bool
    captions: Sequence[str] | None = None
    held_out_captions: Sequence[str] | None = None


@dataclass(frozen=True)
class ImageSource:
    """How a set of images is read.

    Attributes:
        load: `(root, download, image_size) -> ImageSet`.
        shape: Shape of one image, `(C, H, W)`, unless `image_size` says otherwise.
    """

    load: Callable[[Path, bool, int], ImageSet]
    shape: tuple[int, int, int]


def load_images(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    captions: bool = False,
) -> ImageSet:
    """Read a set of images.

    Args:
        name: A key of `IMAGE_SETS`.
        data_dir: Folder of the data files, torchvision's root, `default_data_dir()` if None; for
            `ImageFolder` the folder of images itself, which has no default.
        download: Fetch missing files through torchvision; `ImageFolder` has no source to fetch.
        image_size: Side in pixels of the images of `ImageFolder`, at least 1.
        captions: Read the captions of `ImageFolder`, too, see `read_captions`.

    Raises:
        FileNotFoundError: Files are missing.
        ValueError: A file is damaged, `image_size` is below 1, or `captions` of another set.
        ConnectionError: The download failed.
        ImportError: torchvision is needed and not installed.
    """
    if name == "ImageFolder" and data_dir is None:
        raise FileNotFoundError("ImageFolder needs to know your folder of images: give data_dir")
    size = FOLDER_SIZE if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size must be at least 1; got {size}")
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    if captions:
        if name != "ImageFolder":
            raise ValueError(f"{name} has no captions; ImageFolder reads those of your own images")
        return image_folder(root, download, size, captions=True)
    return IMAGE_SETS[name].load(root, download, size)


def mnist(root: Path, download: bool, image_size: int, name: str = "MNIST") -> ImageSet:
    """70,000 images of 10 classes, 1 x 28 x 28, from `root/NAME/raw`, packed or not."""
    folder = root / name / "raw"
    names = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in _IDX_KINDS]

    def missing() -> list[str]:
        packed = [f"{file}.gz" for file in names if not (folder / file).is_file()]
        return [file for file in packed if not (folder / file).is_file()]

    _provide(name, root, folder, missing, download)
    samples, labels, held_out, held_out_labels = (_read_idx(folder, file) for file in names)
    sets = ((samples, labels, names[1]), (held_out, held_out_labels, names[3]))
    for images, classes, file in sets:
        if len(images) != len(classes):
            raise ValueError(
                f"{folder / file} has {len(classes)} labels for {len(images)} images: remove both "
                "files and use download=True"
            )
    return ImageSet(samples[:, None], held_out[:, None], labels, held_out_labels, flip=False)


def cifar10(root: Path, download: bool, image_size: int) -> ImageSet:
    """60,000 photographs of 10 classes, 3 x 32 x 32, from `root/cifar-10-batches-py`."""
    folder = root / "cifar-10-batches-py"
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]

    def missing() -> list[str]:
        return [name for name in names if not (folder / name).is_file()]

    _provide("CIFAR10", root, folder, missing, download)
    # The files are pickles: torchvision compares their checksums before it opens them.
    try:
        train, test = (_torchvision("CIFAR10").CIFAR10(root, train) for train in (True, False))
    except RuntimeError:
        raise ValueError(
            f"files of CIFAR10 in {folder} are damaged, their checksums are wrong: remove them and "
            "use download=True"
        ) from None
    samples, held_out = (
        torch.as_tensor(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test)
    )
    labels, held_out_labels = (torch.as_tensor(split.targets) for split in (train, test))
    return ImageSet(samples, held_out, labels, held_out_labels, flip=True)


def celeba64(root: Path, download: bool, image_size: int) -> ImageSet:
    """182,732 aligned faces of the training and test splits, from `root/celeba`.

    The central 140 x 140 pixels, resized to 3 x 64 x 64. The validation split is left out.
    """
    folder = root / "celeba"
    partition, pictures = folder / "list_eval_partition.txt", folder / "img_align_celeba"

    def missing() -> list[str]:
        found = {partition.name: partition.is_file(), f"{pictures.name}/": pictures.is_dir()}
        return [name for name, there in found.items() if not there]

    if missing() and download and importlib.util.find_spec("gdown") is not None:
        _fetch("CelebA64", root, lambda datasets: datasets.CelebA(root, download=True))
    if absent := missing():
        raise FileNotFoundError(
            f"CelebA64 is not at hand: {' and '.join(absent)} not found in {folder}; put the "
            "unpacked img_align_celeba.zip and list_eval_partition.txt of the CelebA site there, "
            "or pip install gdown and use download=True"
        )
    splits: dict[str, list[Path]] = {"0": [], "1": [], "2": []}
    seen = set()
    for number, line in enumerate(read_text(partition).splitlines(), 1):
        name, _, split = line.strip().partition(" ")
        if not name or Path(name).name != name or split.strip() not in splits:
            raise ValueError(f"line {number} of {partition} is not 'FILE SPLIT', split 0, 1 or 2")
        if name in seen:
            raise ValueError(f"line {number} of {partition} names {name} a second time")
        seen.add(name)
        splits[split.strip()].append(pictures / name)
    if not splits["0"] or not splits["2"]:
        raise ValueError(f"{partition} names no images for training (0), or none to test on (2)")
    samples, held_out = (decode(splits[split], CELEBA_SIZE, CELEBA_CROP) for split in ("0", "2"))
    return ImageSet(samples, held_out, None, None, flip=True)


def image_folder(root: Path, download: bool, image_size: int, captions: bool = False) -> ImageSet:
    """Your own images in a folder, at any depth: the central square of each, resized, in RGB.

    There have to be 2 or more. A seeded 10 % of them, at most 10,000, are held out; of fewer than
    40 none, as metrics compare at least 4 images with as many. If all lie in sub-folders, two or
    more, those are their classes, numbered in alphabetical order. Hidden files and those without an
    image's suffix (`IMAGE_SUFFIXES`) are passed over. With `captions` their texts are read, too.
    """
    files = _image_files(root)
    if not files:
        raise FileNotFoundError(
            f"no images in {root}: ImageFolder takes files that end in {', '.join(IMAGE_SUFFIXES)}"
        )
    if len(files) < FEWEST_IMAGES:
        raise ValueError(
            f"ImageFolder needs at least {FEWEST_IMAGES} images, 40 to hold some out; {root} holds "
            f"{len(files)}"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(files))
    count = min(len(files) // 10, MOST_HELD_OUT)
    training, kept = np.split(order, [len(files) - (count if count >= FEWEST_HELD_OUT else 0)])
    texts = read_captions(root, files, IMAGE_SUFFIXES) if captions else None
    parents = [file.parts[0] if len(file.parts) > 1 else "" for file in files]
    classes = {name: number for number, name in enumerate(sorted(set(parents)))}
    labels = None
    if len(classes) > 1 and "" not in classes:
        labels = torch.tensor([classes[parent] for parent in parents])

    def pick(rows: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        if not len(rows):
            return None, None
        images = decode([root / files[row] for row in rows], image_size)
        return images, None if labels is None else labels[torch.from_numpy(rows)]

    (samples, sample_labels), (held_out, held_out_labels) = pick(training), pick(kept)
    assert samples is not None  # at most a tenth is held out
    sample_texts, held_out_texts = (
        None if texts is None or not len(rows) else [texts[row] for row in rows]
        for rows in (training, kept)
    )
    return ImageSet(
        samples,
        held_out,
        sample_labels,
        held_out_labels,
        # The text may speak of a side.
        flip=not captions,
        captions=sample_texts,
        held_out_captions=held_out_texts,
    )


IMAGE_SETS: dict[str, ImageSource] = {
    "MNIST": ImageSource(mnist, (1, 28, 28)),
    "FashionMNIST": ImageSource(partial(mnist, name="FashionMNIST"), (1, 28, 28)),
    "CIFAR10": ImageSource(cifar10, (3, 32, 32)),
    "CelebA64": ImageSource(celeba64, (3, CELEBA_SIZE, CELEBA_SIZE)),
    "ImageFolder": ImageSource(image_folder, (3, FOLDER_SIZE, FOLDER_SIZE)),
}


def decode(files: Sequence[Path], size: int, crop: int | None = None) -> Tensor:
    """Decode image files in parallel threads.

    Args:
        files: At least one.
        size: Side in pixels of what comes out.
        crop: Side of the central square that is cut out first; the largest if None.

    Returns:
        `(N, 3, size, size)` uint8, in the order of the files.

    Raises:
        ValueError: A file cannot be read as an image of 8 bits a channel, or is smaller than the
            crop; the sentence names it.
        FileNotFoundError: A file is missing.
    """
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    pixels = images.numpy()

    def place(start: int) -> None:
        for row in range(start, min(start + _BATCH, len(files))):
            pixels[row] = _decode_one(files[row], size, crop).transpose(2, 0, 1)

    # Pillow lets go of the interpreter's lock while it decodes and resizes.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for _ in pool.map(place, range(0, len(files), _BATCH)):
            pass
    return images


def _decode_one(file: Path, size: int, crop: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            mode = opened.mode
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {file} is missing") from None
    except Exception as error:  # the decoders fail in many ways on damaged files
        raise ValueError(f"{file} is no readable image: {error}") from None
    if mode.startswith(("I", "F")):
        raise ValueError(f"{file} has more than 8 bits a channel; convert it to 8 bits")
    side = min(picture.size) if crop is None else crop
    if side > min(picture.size):
        raise ValueError(
            f"{file} is {picture.width} x {picture.height} pixels, too small for the central "
            f"{side} x {side}"
        )
    left, top = (round((length - side) / 2) for length in picture.size)
    picture = picture.crop((left, top, left + side, top + side))
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def _image_files(root: Path) -> list[Path]:
    """The images beneath a folder, relative to it, in alphabetical order."""
    found = []
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [
            Path(folder, name).relative_to(root)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


# The axes behind the first, and the largest value, of each kind of file.
_IDX_KINDS = {"images-idx3": ((28, 28), 255), "labels-idx1": ((), 9)}
# EMNIST, the largest set in this format, has 240,000 digits to train on.
_MOST_IDX = 250_000


def _read_idx(folder: Path, name: str) -> Tensor:
    """Read bytes in MNIST's IDX format: a type, the number of axes, big-endian sides, values.

    No more is read, or unpacked, than the header announces.
    """
    file = folder / name
    each, most = next(what for kind, what in _IDX_KINDS.items() if kind in name)
    axes = 1 + len(each)
    packed = not file.is_file()
    if packed:
        file = folder / f"{name}.gz"
    try:
        with gzip.open(file) if packed else file.open("rb") as opened:
            head = opened.read(4 + 4 * axes)
            if head[:4] != bytes((0, 0, 8, axes)) or len(head) != 4 + 4 * axes:
                raise ValueError("wrong first bytes")
            count, *sides = np.frombuffer(head[4:], ">u4").tolist()
            if tuple(sides) != each or not 1 <= count <= _MOST_IDX:
                raise ValueError(f"its header announces {count} x {tuple(sides)}, not N x {each}")
            size = count * math.prod(each)
            data = opened.read(size + 1)
            if len(data) != size:
                raise ValueError("wrong length")
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(count, *each)
        if int(values.max()) > most:
            raise ValueError(f"it holds {int(values.max())}, the largest value there is is {most}")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and use download=True") from None
    return values


def _torchvision(name: str) -> ModuleType:
    try:
        from torchvision import datasets
    except ImportError:
        raise ImportError(f"{name} needs torchvision: pip install torchvision") from None
    return datasets


def _fetch(name: str, root: Path, call: Callable[[Any], object]) -> None:
    """Let torchvision download a set."""
    datasets = _torchvision(name)
    try:
        call(datasets)
    except PermissionError:
        raise
    except Exception as error:  # mirrors, Google Drive and archives each fail in their own way
        reason = " ".join(str(error).split())
        raise ConnectionError(f"could not download {name} into {root}: {reason}") from error


def _provide(
    name: str, root: Path, folder: Path, missing: Callable[[], list[str]], download: bool
) -> None:
    """Download what is missing in the folder of one of torchvision's sets, or say what is."""
    if download and missing():
        _fetch(name, root, lambda datasets: getattr(datasets, name)(root, download=True))
    if absent := missing():
        raise FileNotFoundError(
            f"{name} is not at hand: {', '.join(absent)} not found in {folder}; use download=True "
            "to fetch what is missing, or another data_dir"
        )
