"""`open_pipeline`: a pipeline of diffusers as a denoiser in its latents, under prompts.

    opened = open_pipeline("stabilityai/stable-diffusion-xl-base-1.0", device="cuda")
    denoiser = opened.denoiser(["a red bicycle", "a lighthouse at night"])
    guided = denoiser.given(0, guidance=5.0)

Weights are read from safetensors files, nothing is fetched unasked, and no code that comes with a
pipeline is run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...common.arguments import checked
from ...common.checkpoint import CheckpointError, unreadable
from ...common.reading import DAMAGE, reason
from ...envs import Schedule
from ..denoisers.denoiser import Denoiser
from ..denoisers.networks.unet import require_diffusers
from .body import PipelineBody, TrainedBody
from .families import FAMILIES, Family
from .families.base import too_long
from .folder import INDEX, check_weights, family_of
from .own import own_scheduler
from .terms import own_schedule, terms_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names


@dataclass(frozen=True)
class OpenedPipeline:
    """A pipeline whose network can be asked.

    Attributes:
        family: what the network is asked, and how.
        terms: the noise process, the prediction, and what else the scheduler says.
    """

    family: Family
    terms: Any

    @classmethod
    def of(
        cls, pipeline: Any, size: tuple[int, int] | None = None, guidance: float = 1.0
    ) -> OpenedPipeline:
        """Wrap a pipeline that is loaded already.

        Args:
            pipeline: one of `FAMILIES`.
            size: (height, width) of the pictures in pixels; the pipeline's own if None.
            guidance: what a network with an embedding of the guidance is told.

        Raises:
            ValueError: an unknown kind of pipeline, a scheduler of no Gaussian process, or a size
                that the pipeline cannot make.
        """
        kind = type(pipeline).__name__
        if kind not in FAMILIES:
            raise ValueError(
                f"fewstep does not know how a {kind} asks its network; it knows "
                f"{', '.join(FAMILIES)}. Give another network to a Denoiser by hand, as a body of "
                "your own."
            )
        lacking = [n for n in FAMILIES[kind].components if getattr(pipeline, n, None) is None]
        if lacking:
            raise ValueError(f"This {kind} lacks its {', '.join(lacking)}.")
        family = FAMILIES[kind](pipeline, size, guidance)
        family.network.requires_grad_(False).eval()
        return cls(family, terms_of(pipeline.scheduler, family.tokens))

    @property
    def pipeline(self) -> Any:
        """The pipeline of diffusers."""
        return self.family.pipeline

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.family.network.device

    def denoiser(
        self,
        prompts: Sequence[str] | None = None,
        *,
        negative: str = "",
        micro_batch: int = 8,
        trains: bool = False,
    ) -> Denoiser:
        """Encode prompts, and return the denoiser that is asked under them.

        Args:
            prompts: texts, or of a network of classes their numbers; their places in the list are
                the denoiser's classes. None for an unconditional network.
            negative: the prompt that guidance leads away from.
            micro_batch: most samples of one network call.
            trains: whether the network's weights are to be trained, in place; `save_pipeline`
                writes the pipeline with them.

        Returns:
            A denoiser of samples (N, *family.shape). It waits for a prompt's number:
            `denoiser.given(0, guidance=5.0)`.

        Raises:
            ValueError: prompts for an unconditional network, or none for another; a class that does
                not exist; weights to train that are not float32.
        """
        family, terms = self.family, self.terms
        if (prompts is None) != (family.prompts is None):
            what = "takes no prompts" if prompts is not None else f"needs {family.prompts}"
            raise ValueError(f"The network of this {type(self.pipeline).__name__} {what}.")
        rows = None
        if prompts is not None:
            if not prompts:
                raise ValueError("There are no prompts.")
            for sentence in too_long(family.readers, prompts):
                warnings.warn(sentence, stacklevel=2)
            rows = family.encode(prompts, negative)
        return Denoiser(
            (TrainedBody if trains else PipelineBody)(family, rows, micro_batch),
            terms.process,
            terms.prediction,
            terms.sigma_data,
            terms.clip,
            terms.variance,
            classes=None if prompts is None else len(prompts),
            drops=family.splits,
        )

    def park_encoders(self) -> None:
        """Move text encoders to the CPU: once prompts are encoded nobody asks them."""
        for part in self.family.components:
            if part.startswith("text_encoder"):
                getattr(self.pipeline, part).to("cpu")

    def own_schedule(self, steps: int) -> Schedule:
        """Return the times that the pipeline's own scheduler visits in so many steps."""
        scheduler = own_scheduler(PipelineBody(self.family, None), steps)
        return own_schedule(scheduler, self.terms.process)


@checked
def open_pipeline(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
    guidance: float = 1.0,
    variant: str | None = None,
    revision: str | None = None,
    download: bool = False,
) -> OpenedPipeline:
    """Open a pipeline of diffusers from a folder, or by its name on the hub.

    Args:
        name_or_folder: a folder with a model_index.json, or "owner/name" in the local hub cache.
        device: where it goes.
        dtype: of the weights; as they are stored if None.
        size: see `OpenedPipeline.of`.
        guidance: see `OpenedPipeline.of`.
        variant: which of a repository's weights, such as "fp16"; by default those without a name,
            and where there are none those of "fp16".
        revision: the commit, branch or tag on the hub.
        download: fetch what the cache lacks.

    Raises:
        FileNotFoundError: no such folder or name, or files are missing.
        CheckpointError: an unknown kind of pipeline, a part that is left out, pickled or damaged
            weights.
        ValueError: a scheduler of no Gaussian process, or settings that fewstep does not honour.
        ImportError: diffusers, or transformers for its text encoders, is not installed.
    """
    require_diffusers("open_pipeline")
    given = Path(name_or_folder).expanduser()
    folder = given if given.is_dir() else _snapshot(str(name_or_folder), revision, download)
    family = family_of(folder)
    chosen = check_weights(folder, family.components, variant)
    return OpenedPipeline.of(_load(folder, family, device, dtype, chosen), size, guidance)


def _snapshot(name: str, revision: str | None, download: bool) -> Path:
    """Return the folder in the hub cache that holds a pipeline."""
    import huggingface_hub

    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"There is no folder {name}, and it is no name of the hub's, such as "
            "stabilityai/stable-diffusion-xl-base-1.0."
        )
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            # No pickles, and no code.
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            local_files_only=not download,
        )
    except (OSError, ValueError) as error:
        if download:
            raise FileNotFoundError(f"Could not download {name}: {reason(error)}") from None
        raise FileNotFoundError(
            f"There is no folder {name}, and the local hub cache lacks it: fetch it with "
            f"`hf download {name}`, or pass download=True."
        ) from None
    return Path(folder)


def _load(
    folder: Path,
    family: type[Family],
    device: str | torch.device,
    dtype: torch.dtype | None,
    variant: str | None,
) -> Any:
    if any("text" in part for part in family.components):
        _require_transformers()
    from diffusers import DiffusionPipeline

    if "TableauScheduler" in (folder / "scheduler" / "scheduler_config.json").read_text(
        errors="replace"
    ):
        from ..pretrained import scheduler  # noqa: F401  diffusers looks the class up by its name
    options: dict[str, Any] = dict.fromkeys(family.unused)
    if "safety_checker" in options:
        options["requires_safety_checker"] = False
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder,
            **{_dtype_keyword(): dtype or _stored_dtype(folder / family.network_name)},
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            low_cpu_mem_usage=False,
            **options,
        )
    except (OSError, AttributeError, *DAMAGE) as error:
        raise CheckpointError(
            f"{folder} and its {INDEX} give no pipeline: {reason(error)}"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _dtype_keyword() -> str:
    """Return what diffusers calls the type of the weights: older versions name torch."""
    import diffusers.utils

    return "dtype" if hasattr(diffusers.utils, "_resolve_dtype") else "torch_dtype"


def _stored_dtype(place: Path) -> torch.dtype:
    """Return the type in which a network's weights are stored."""
    file = min(place.glob("*.safetensors"))
    try:
        with safe_open(file, framework="pt") as opened:
            name = next(iter(opened.keys()))
            return DTYPES.get(_NAMES.get(opened.get_slice(name).get_dtype(), ""), torch.float32)
    except (SafetensorError, OSError, ValueError, StopIteration) as error:
        raise unreadable(file, error) from None


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ImportError(
            "The text encoders of pipelines need transformers: pip install 'fewstep[pipelines]'."
        ) from None
