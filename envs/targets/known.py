"""Known targets by their names: the toys and the sets of images."""

from __future__ import annotations

from pathlib import Path

import torch

from ...common.arguments import checked
from ...common.names import unknown_name
from .images import IMAGE_SETS, load_images
from .target import Target
from .toys import TOYS


@checked
def make_target(
    name: str,
    *,
    device: torch.device | str = "cpu",
    data_dir: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    captions: bool = False,
) -> Target:
    """Build a known target.

    `SwissRoll`, `Moons`, `GaussianCluster` and `Digits` need no files; `MNIST`,
    `FashionMNIST`, `CIFAR10`, `CelebA64` and `ImageFolder` read images from `data_dir`.

    Args:
        name: Which one.
        device: Where its samples shall live.
        data_dir: Folder of the data files, for targets that need one: torchvision's root, by
            default `images.default_data_dir()`; for `ImageFolder` the folder of images itself.
        download: Fetch missing files of `MNIST`, `FashionMNIST`, `CIFAR10` or `CelebA64` into
            `data_dir`, through torchvision.
        image_size: Side in pixels, at least 1, that `ImageFolder` resizes to; 64 by default.
        captions: Read the captions of `ImageFolder`, a file `captions.tsv`, see `read_captions`;
            its images are then never mirrored.

    Raises:
        ValueError: The name is unknown, `image_size` is below 1 or given for another target, or a
            file is damaged, or `captions` of a target that has none.
        FileNotFoundError: `data_dir` is given and is not a folder, or data files are missing.
        ConnectionError: The download failed.
        ImportError: torchvision is needed and not installed.
    """
    if name not in TOYS and name not in IMAGE_SETS:
        raise unknown_name("target", name, [*TOYS, *IMAGE_SETS])
    if image_size is not None and name != "ImageFolder":
        raise ValueError(f"image_size is for ImageFolder; the size of {name} is fixed")
    # A download makes its own folder.
    if data_dir is not None and not download and not Path(data_dir).expanduser().is_dir():
        found = "is a file" if Path(data_dir).expanduser().exists() else "does not exist"
        raise FileNotFoundError(f"data folder {str(data_dir)!r} {found}")
    if name in TOYS and captions:
        raise ValueError(f"{name} has no captions; ImageFolder reads those of your own images")
    if name in TOYS:
        return TOYS[name]().to(device)
    images = load_images(
        name, data_dir, download=download, image_size=image_size, captions=captions
    )
    return Target(name, **vars(images)).to(device)
