"""The flags of `fewstep benchmark`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...envs.targets.images import FOLDER_SIZE


@dataclass(frozen=True)
class BenchmarkSettings:
    """Run a declared study, or go on with it: finished cells are kept."""

    study: Annotated[str, tyro.conf.Positional] = "list"
    """Which study; `list`, the default, shows them all."""
    log_dir: Path = Path("logs")
    """The study's folder is LOG_DIR/benchmark/STUDY."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU where there is one."""
    workers: int = 1
    """Processes that share a study's cells, at least 1."""
    threads: int | None = None
    """CPU threads of each process, at least 1; if omitted 1 for vectors, and for images PyTorch's
    default, which the workers share."""
    seeds: tuple[int, ...] | None = None
    """Training seeds, if not the study's."""
    steps: tuple[int, ...] | None = None
    """Network calls of a sample, if not the study's."""
    data_dir: Path | None = None
    """Folder of the data files of studies on image sets; of those on ImageFolder, your pictures."""
    download: bool = False
    """Fetch missing data files into that folder."""
    image_size: int | None = None
    """Side in pixels to which ImageFolder's pictures are cropped and resized."""
    inception_weights: Path | None = None
    """Weights of torch-fidelity's Inception network, for FID on images of 32 pixels and more."""
    rounds: int | None = None
    """Rounds of every training, cloning included, if not the presets' (a quick look)."""
    evaluation_samples: int | None = None
    """Most samples of each metric, at least 2, if not the study's."""

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.log_dir / "benchmark" / self.study

    def data_of(self, env: str) -> str:
        """Name what an environment's data are: for `ImageFolder` the folder and the size, too."""
        if env != "ImageFolder" or self.data_dir is None:
            return env
        folder = self.data_dir.expanduser().resolve()
        size = self.image_size or FOLDER_SIZE
        return f"{env}-{folder.name}-{size}-{zlib.crc32(bytes(folder)):08x}"
